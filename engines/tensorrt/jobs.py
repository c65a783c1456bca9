"""The engines that an engine directory should have, and the graph that each is built from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace

from goc_deploy.compiler import in_form
from goc_deploy.compiler.cache_ops import taps_from_signature
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.graph_check import check_graph, external_tensors
from goc_deploy.engine_dir.keys import EngineWeightMode, Recipe, Target, dimension_profiles
from goc_deploy.engine_dir.manifest import EngineEntry, FileEntry, GraphEntry, Manifest
from goc_deploy.engines.plugin.stacking import KERNEL_SHA256, stack_updates
from goc_deploy.engines.tensorrt import graphs
from goc_deploy.engines.tensorrt.quantized import use_constant_scales
from goc_deploy.options import EngineOptions


@dataclass(frozen=True, slots=True)
class Job:
    """An engine that should exist.

    Attributes:
        recipe: the recipe of its build.
        unit: the first unit that it serves.
        served: ONNX files that it serves.
        profiles: per optimisation profile, the shapes of its dynamic inputs.
        weight_mode: ``embedded``, ``shared``, or ``none``.
        parts: units whose weights the graph of ``unit`` has, by prefix.
    """

    recipe: Recipe
    unit: GraphEntry
    served: tuple[str, ...]
    profiles: tuple[graphs.Shapes, ...]
    weight_mode: EngineWeightMode
    parts: Mapping[str, GraphEntry]

    @property
    def name(self) -> str:
        """Name for messages."""
        return self.unit.name + (
            f" and {len(self.served) - 1} like it" if len(self.served) > 1 else ""
        )

    @property
    def path(self) -> str:
        """Path of the engine file."""
        return f"{self.recipe.target.folder}/{self.unit.name}-{self.recipe.key[:12]}.engine"

    def accepts(self, entry: EngineEntry, *, as_asked: bool) -> bool:
        """Whether an engine of the directory does this job.

        Args:
            entry: the engine.
            as_asked: accept only an engine that was built by exactly this recipe. A command that
                builds needs that: it keeps to the limit on scratch memory, and tries the plugin
                again if an earlier build could not use it. To run, an engine with another limit or
                without the plugin is enough, because it computes the same.
        """
        built_so = self.recipe_of(entry, as_asked=as_asked) is not None
        return built_so and entry.graphs == self.served

    def recipe_of(self, entry: EngineEntry, *, as_asked: bool) -> Recipe | None:
        """Return the recipe that an engine was built by if it can do this job, else None.

        Args:
            entry: the engine, of this directory or of another one with other weights.
            as_asked: as for `accepts`.
        """
        recipes = [self.recipe]
        if not as_asked:
            recipe = replace(self.recipe, scratch_limit_bytes=entry.scratch_limit_bytes)
            recipes = [recipe, replace(recipe, plugin_sha256=None)]
        if entry.target != self.recipe.target:
            return None
        return next((recipe for recipe in recipes if recipe.key == entry.key), None)


def wanted_engines(directory: EngineDir, target: Target, options: EngineOptions) -> list[Job]:
    """List one job per engine: per unit or kind of unit with shared weights, and per segment.

    Predict graphs that only the host form of a plan launches (`goc_deploy.compiler.forms`) get no
    engine, and neither do accumulate graphs, which our kernel serves. A segment whose weights are
    too large for one graph reads them at an address in both weight modes.
    """
    manifest, plans = directory.manifest, directory.plans()
    steps = max((plan.steps for plan in plans), default=1)
    ways = dimension_profiles(
        target.backend, manifest.model, manifest.max_batch, steps, manifest.video_tile
    )
    launched = {
        signature
        for plan in plans
        for signature in in_form(plan, manifest.model, "device").signatures
    }
    not_launched = {signature for plan in plans for signature in plan.signatures} - launched
    not_launched |= {s for s in manifest.predict if taps_from_signature(s) is not None}
    jobs: dict[str, Job] = {}
    for unit in _units(manifest, not_launched):
        where = f"{directory.path / unit.onnx}"
        content, parts = directory.read(unit.onnx), manifest.parts(unit)
        check_graph(content, external_tensors(parts), where)
        model = graphs.model_from_bytes(content, where)
        weight_files = [
            directory.file(part.weights_file)
            for part in parts.values()
            if part.weights_file and not part.weights_are_inputs
        ]
        fits = (
            len(weight_files) == 1
            or sum(file.size for file in weight_files) <= graphs.MAX_GRAPH_BYTES
        )
        embeds = options.weight_mode == "embedded" and bool(weight_files) and fits
        (graphs.drop_weight_places if embeds else graphs.share_weights)(model)
        use_constant_scales(model)
        stacked = stack_updates(model) if options.plugin else 0
        profiles = {
            used: shapes
            for shapes, used in (graphs.input_shapes(model, ranges, where) for ranges in ways)
        }
        recipe = Recipe(
            graph_sha256=hashlib.sha256(graphs.graph_bytes(model)).hexdigest(),
            weights_sha256=_digest_of_all(weight_files) if embeds else None,
            target=target,
            profiles=tuple(profiles),
            scratch_limit_bytes=options.scratch_limit_bytes,
            plugin_sha256=KERNEL_SHA256 if stacked else None,
        )
        earlier = jobs.get(recipe.key)
        served = (*(earlier.served if earlier else ()), unit.onnx)
        weight_mode: EngineWeightMode = "embedded" if embeds else "shared" if parts else "none"
        if earlier:
            unit, parts = earlier.unit, earlier.parts
        jobs[recipe.key] = Job(recipe, unit, served, tuple(profiles.values()), weight_mode, parts)
    return list(jobs.values())


def _digest_of_all(files: list[FileEntry]) -> str:
    """Return the digest of a file, or of the digests of several."""
    digests = [file.sha256 for file in files]
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    )


def _units(manifest: Manifest, without: Set[str]) -> Iterator[GraphEntry]:
    """Yield every graph except some predict graphs."""
    skipped = {manifest.predict[signature] for signature in without}
    yield from (unit for unit in manifest.all_graphs() if unit.onnx not in skipped)


def graph_of_job(directory: EngineDir, job: Job) -> bytes:
    """Return the graph in the form that the parser takes."""
    where = f"{directory.path / job.unit.onnx}"
    model = graphs.model_from_bytes(directory.read(job.unit.onnx), where)
    if job.recipe.weights_sha256 is None:
        graphs.share_weights(model)
    for prefix, path in embedded_weights(job).items():
        part, weights = job.parts[prefix], directory.read(path)
        graphs.embed_weights(model, part, weights, where, prefix)
    use_constant_scales(model)
    if job.recipe.plugin_sha256 is not None:
        stack_updates(model)
    return graphs.graph_bytes(model)


def embedded_weights(job: Job) -> dict[str, str]:
    """Return prefix -> weights file that an engine embeds."""
    if job.recipe.weights_sha256 is None:
        return {}
    return {prefix: part.weights_file for prefix, part in job.parts.items() if part.weights_file}
