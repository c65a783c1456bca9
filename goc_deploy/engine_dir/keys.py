"""Keys of TensorRT engines. Engines with equal keys can replace each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from goc_deploy.options import WeightMode
from goc_deploy.spec import LONGEST_SIDE, ModelSpec, tiles_at_once

ENGINE_BACKENDS = ("tensorrt-rtx", "tensorrt")
WEIGHT_MODES: tuple[WeightMode, ...] = get_args(WeightMode)
EngineWeightMode = Literal["embedded", "shared", "none"]  # "none": the graph has no weights
RECIPE_VERSION = 3  # increased whenever the same recipe leads to another engine

Range = tuple[int, int, int]  # (smallest, usual, largest) size of a dynamic dimension


@dataclass(frozen=True, slots=True)
class Target:
    """The library, platform and GPUs that an engine is built for. It runs nowhere else.

    Attributes:
        backend: one of ``ENGINE_BACKENDS``.
        version: full version of the library.
        platform: operating system and machine, such as ``linux-x86_64``.
        capabilities: compute capabilities of the GPUs, ascending, such as ``("8.6", "8.9")``.
    """

    backend: str
    version: str
    platform: str
    capabilities: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Folder of its engines in an engine directory."""
        architectures = "+".join(
            f"sm{capability.replace('.', '')}" for capability in self.capabilities
        )
        return f"engines/{self.backend}-{self.version}-{architectures}"

    def refusal(self, backend: str, version: str, platform: str, capability: str) -> str | None:
        """Explain why an engine of this target cannot run on a machine, or return None if it can.

        Args:
            backend: the library that would load the engine.
            version: version of that library.
            platform: platform of the machine.
            capability: compute capability of the machine's GPU.
        """
        for what, built, present in (
            ("backend", self.backend, backend),
            ("version", self.version, version),
            ("platform", self.platform, platform),
        ):
            if built != present:
                return f"it was built for {what} {built}, this is {present}"
        if capability not in self.capabilities:
            built = ", ".join(self.capabilities)
            return f"it was built for compute capability {built}, this GPU has {capability}"
        return None


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides what an engine computes, how fast, and on what hardware.

    Attributes:
        graph_sha256: digest of the graph that the parser reads, without weights.
        weights_sha256: digest of the weights file that is embedded, or None.
        target: the target of the engine.
        profiles: per optimisation profile, symbol of each dynamic dimension of the graph -> sizes.
        scratch_limit_bytes: limit on scratch memory, 0 for no limit.
        plugin_sha256: digest of the plugin's kernel source if the graph calls it, else None.
    """

    graph_sha256: str
    weights_sha256: str | None
    target: Target
    profiles: tuple[tuple[tuple[str, Range], ...], ...]
    scratch_limit_bytes: int
    plugin_sha256: str | None

    @property
    def optima(self) -> tuple[str, ...]:
        """Per profile, the sizes that kernels are chosen for, such as ``batch=2``."""
        return tuple(
            " ".join(f"{symbol}={usual}" for symbol, (_, usual, _) in profile)
            for profile in self.profiles
        )

    @property
    def key(self) -> str:
        """32 hexadecimal digits, different for every recipe."""
        text = json.dumps([RECIPE_VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def dimension_profiles(
    backend: str, spec: ModelSpec, max_batch: int, steps: int, tile: int = 0
) -> tuple[Mapping[str, Range], ...]:
    """Return the accepted sizes and those that kernels are chosen for, per profile.

    TensorRT chooses kernels at build time, for the usual sizes of an optimisation profile. It gets
    two profiles of all sizes: one for a single image, one for the largest batch. TensorRT for RTX
    compiles kernels at run time for the sizes that occur, so a second profile would double its
    engines without any benefit.

    Args:
        backend: one of ``ENGINE_BACKENDS``.
        spec: as for `dimension_ranges`.
        max_batch: as for `dimension_ranges`.
        steps: as for `dimension_ranges`.
        tile: as for `dimension_ranges`.
    """
    most = dimension_ranges(spec, max_batch, steps, tile)
    if backend == "tensorrt-rtx":
        return (most,)
    single = dimension_ranges(spec, 1, steps, tile)
    return {symbol: (low, single[symbol][1], high) for symbol, (low, _, high) in most.items()}, most


def dimension_ranges(
    spec: ModelSpec, max_batch: int, steps: int, tile: int = 0
) -> Mapping[str, Range]:
    """Return the sizes of every dynamic dimension that the exporters name.

    Args:
        spec: the model.
        max_batch: largest number of images per run; with guidance an image has
            `ModelSpec.rows_per_image` rows.
        steps: number of steps of the longest plan.
        tile: side of a tile of the decoder of videos in latent pixels, or 0 if it decodes frames of
            any size in one piece.
    """
    images, rows = max_batch, spec.rows_per_image * max_batch
    labels = rows if spec.pooled_channels else rows - max_batch + 1
    modulation = spec.modulation.count
    usual, most = spec.tokens, spec.largest.tokens
    references = max(1, spec.tokens_of("reference"))
    sides = dict(zip(("F", "H", "W"), _sides(spec.sample, spec.largest.sample), strict=True))
    axes = _sides(spec.axes, spec.largest.axes)
    of_decoder = {  # of videos, whose levels are larger by powers of two
        name if factor == 1 else f"{factor}*{name}": _multiple(factor, _tiled(sides[side], tile))
        for name, side in (("height", "H"), ("width", "W"))
        for factor in (1, 2, 4, 8, 16)
    }
    return {
        "tokens": (1, usual, most),
        "T": (1, usual, max([most, *map(spec.largest.tokens_of, spec.streams)])),
        "reference_tokens": (1, references, max(1, spec.largest.tokens_of("reference"))),
        **sides,
        **of_decoder,
        **dict(zip(("token_frames", "token_rows", "token_columns"), axes, strict=True)),
        "batch": (1, rows, rows),
        "B": (1, rows, rows),
        "images": (1, images, images),
        "N": (1, images, images),
        "labels": (1, 2, labels),
        "R": (1, 2, labels),
        "M": (1, modulation, modulation),
        "steps": (1, steps, steps),
        "captions": (1, 2, rows),
        "tiles": (1, tiles_at_once(spec), tiles_at_once(spec)),
    }


def _tiled(sizes: Range, tile: int) -> Range:
    low, usual, most = sizes
    return (low, min(usual, tile), min(most, tile)) if tile else sizes


def _multiple(factor: int, sizes: Range) -> Range:
    low, usual, most = sizes
    return factor * low, factor * usual, factor * most


def _sides(usual: tuple[int, ...], most: tuple[int, ...]) -> tuple[Range, Range, Range]:
    """Return the sizes along (frames, height, width): a side may be longer if the other is shorter.

    Args:
        usual: sizes of the usual sample, without frames for an image.
        most: sizes of the largest sample.
    """
    frames = (1, usual[0], most[0]) if len(usual) == 3 else (1, 1, 1)
    height, width = (
        (1, side, LONGEST_SIDE * largest)
        for side, largest in zip(usual[-2:], most[-2:], strict=True)
    )
    return frames, height, width
