"""The manifest as JSON, and the strict checks of one that is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from itertools import chain

from goc_deploy.engine_dir.keys import ENGINE_BACKENDS
from goc_deploy.engine_dir.manifest import IMAGE_CHANNELS, Manifest, Parameter
from goc_deploy.errors import EngineDirError, SafetyError
from goc_deploy.precision import DTYPE_OF_FORMAT
from goc_deploy.spec import PREDICTION_TYPES, ModelSpec
from goc_deploy.strict_json import (
    check_format,
    convert,
    dump_json,
    expected,
    parse_json,
    unknown_field,
)

MANIFEST_FORMAT, MANIFEST_VERSION = "goc_deploy.engine_dir", 7
_LABEL_TABLE = "embedding_table.weight"  # how names of tables with a row per class end
_PARAMETER_DTYPES = (None, *dict.fromkeys(DTYPE_OF_FORMAT.values()))
_FIELDS = {field.name for field in fields(Manifest)}
_SAFE_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,@-]*(/[A-Za-z0-9][A-Za-z0-9._+=,@-]*){0,3}")


def manifest_to_json(manifest: Manifest) -> str:
    """Write a manifest as JSON."""
    return dump_json({"format": MANIFEST_FORMAT, "version": MANIFEST_VERSION, **asdict(manifest)})


def manifest_from_json(text: bytes, where: str) -> Manifest:
    """Read and check a manifest.

    Raises:
        EngineDirError: the text is not JSON, has another format or version, or a field is missing,
            unknown or wrong; the message has the field's path.
        SafetyError: a path leads out of the directory.
    """
    fields = parse_json(text, where, EngineDirError)
    check_format(fields, MANIFEST_FORMAT, MANIFEST_VERSION, where, EngineDirError)
    manifest: Manifest = convert(fields, Manifest, where, EngineDirError)
    # Later releases may add fields at the top level without a new version, but none below.
    unknown = unknown_field({name: fields[name] for name in _FIELDS & fields.keys()}, manifest)
    if unknown is not None:
        raise EngineDirError(f"{where}: {unknown}: unknown field; export again")
    for problem in _unsafe_paths(manifest):
        raise SafetyError(f"{where}: {problem}; do not use this directory")
    for problem in chain(
        _model_problems(manifest),
        _decoder_problems(manifest),
        _video_decoder_problems(manifest),
        _clip_problems(manifest),
        _unit_problems(manifest),
        _unlisted_files(manifest),
    ):
        raise EngineDirError(f"{where}: {problem}; export again")
    for problem in _engine_problems(manifest):
        raise EngineDirError(f"{where}: {problem}; build the engines again")
    return manifest


# Rules that types cannot express. Each yields the path of a wrong field and the reason.


def _unsafe_paths(manifest: Manifest) -> Iterator[str]:
    """Yield files that may be outside the directory, and files that are listed twice."""
    seen: dict[str, int] = {}  # names that differ only in case are one file on some systems
    for i, file in enumerate(manifest.files):
        if not _SAFE_PATH.fullmatch(file.path):
            yield f"$.files[{i}].path: {file.path!r:.60} may lie outside the directory"
        first = seen.setdefault(file.path.lower(), i)
        if first != i:
            yield f"$.files[{i}].path: {file.path!r:.60} is listed as $.files[{first}] already"


def _model_problems(manifest: Manifest) -> Iterator[str]:
    model = manifest.model
    if model.prediction_type not in PREDICTION_TYPES:
        yield f"$.model.prediction_type: {expected(PREDICTION_TYPES, model.prediction_type)}"
    needed = "caption_tokens" if model.text_conditional else "choices"
    if not getattr(model, needed):
        yield f"$.model.{needed}: expected int >= 1, got 0"
    reads_text = "cross" in model.branches or model.has_text_stream
    if reads_text != model.text_conditional:
        yield (
            "$.model.branches: expected units that read the text if caption_channels is not 0 and "
            f"only then, got {', '.join(model.branches):.60}"
        )
    if ("reference" in model.streams) != (model.max_references > 0):
        yield (
            "$.model.max_references: expected int >= 1 if units read the reference, and 0 if not, "
            f"got {model.max_references}"
        )
    if model.max_references and (model.max_grid is None or model.video or model.references):
        yield "$.model.max_references: expected images of any size, without $.model.references"
    yield from _block_problems(model)
    if len(model.rows) not in (0, len(model.branches)):
        yield f"$.model.rows: expected a list for each of {len(model.branches)} branches"
    if manifest.tables and not model.one_modulation:
        yield "$.tables: expected none, because the model modulates by labels or captions"
    if len(manifest.class_names) not in (0, model.choices):
        yield (
            f"$.class_names: expected 0 or {model.choices} names, got {len(manifest.class_names)}"
        )


def _block_problems(model: ModelSpec) -> Iterator[str]:
    """Yield blocks that are not those of ``depth`` and ``branches``, and units of one name."""
    if not model.blocks:
        return
    blocks = sum(run.count for run in model.blocks)
    if blocks != model.depth:
        yield f"$.model.blocks: expected {model.depth} blocks, got {blocks}"
    names = tuple(dict.fromkeys(unit.branch for run in model.blocks for unit in run.units))
    if names != model.branches:
        yield f"$.model.blocks: expected the branches {', '.join(model.branches):.60}"
    if model.rows:
        yield "$.model.rows: expected none beside $.model.blocks"
    for i, run in enumerate(model.blocks):
        branches = [unit.branch for unit in run.units]
        if len(set(branches)) < len(branches):
            yield f"$.model.blocks[{i}].units: a branch is listed twice"
        for j, unit in enumerate(run.units):
            outputs = [feature.suffix for feature in unit.features]
            changed = {feature.stream for feature in unit.features}
            if len(set(outputs)) < len(outputs) or not changed <= set(unit.reads):
                yield (
                    f"$.model.blocks[{i}].units[{j}].features: expected different suffixes, and "
                    "streams that the unit reads"
                )


def _decoder_problems(manifest: Manifest) -> Iterator[str]:
    decoder = manifest.decoder
    if decoder is None:
        return
    if decoder.channels not in IMAGE_CHANNELS:
        yield f"$.decoder.channels: {expected(IMAGE_CHANNELS, decoder.channels)}"
    if decoder.tile > manifest.model.side:
        yield f"$.decoder.tile: expected int <= {manifest.model.side}, got {decoder.tile}"
    if decoder.overlap >= decoder.tile:
        yield f"$.decoder.overlap: expected int < {decoder.tile}, got {decoder.overlap}"


def _video_decoder_problems(manifest: Manifest) -> Iterator[str]:
    decoder, channels = manifest.video_decoder, manifest.model.channels
    if decoder is None:
        return
    if decoder.channels not in IMAGE_CHANNELS:
        yield f"$.video_decoder.channels: {expected(IMAGE_CHANNELS, decoder.channels)}"
    if decoder.latent_channels != channels:
        yield f"$.video_decoder.latent_channels: expected {channels}, got {decoder.latent_channels}"
    if decoder.tile and decoder.overlap >= decoder.tile:
        yield f"$.video_decoder.overlap: expected int < {decoder.tile}, got {decoder.overlap}"


def _unit_problems(manifest: Manifest) -> Iterator[str]:
    """Yield weights files larger or smaller than their parameters, and segments without units."""
    sizes = {file.path: file.size for file in manifest.files}
    for i, unit in enumerate(manifest.graphs):
        size, needed = sizes.get(unit.weights_file or "", 0), 0
        for j, parameter in enumerate(unit.parameters):
            if parameter.dtype not in _PARAMETER_DTYPES:
                yield (
                    f"$.graphs[{i}].parameters[{j}].dtype: "
                    f"{expected(_PARAMETER_DTYPES, parameter.dtype)}"
                )
                return
            end = unit.end(parameter)
            needed = max(needed, end)
            if end > size:
                yield (
                    f"$.graphs[{i}].parameters[{j}]: {parameter.name!r:.60} ends at byte {end}, "
                    f"but its weights file has {size} bytes"
                )
            yield from _label_table_problems(manifest, parameter, f"$.graphs[{i}].parameters[{j}]")
        if unit.weights_file in sizes and size != needed:
            yield (
                f"$.graphs[{i}].weights_file: {unit.weights_file!r:.60} is listed with {size} "
                f"bytes, but its parameters take {needed}"
            )
    if manifest.segments:
        with_weights = {unit.name for unit in manifest.graphs if unit.weights_file}
        for name in manifest.model.unit_names:
            if name not in with_weights:
                yield f"$.segments: made of unit {name}, which $.graphs does not list with weights"


def _clip_problems(manifest: Manifest) -> Iterator[str]:
    """Yield sizes of CLIP text encoders that do not fit the captions of the model."""
    model, clips = manifest.model, manifest.clip
    if not clips:
        return
    pooled, width = sum(clip.pooled for clip in clips), sum(clip.width for clip in clips)
    if pooled != model.pooled_channels:
        yield f"$.clip: expected pooled embeddings of width {model.pooled_channels}, got {pooled}"
    if width > model.caption_channels:
        yield f"$.clip: expected embeddings of width <= {model.caption_channels}, got {width}"
    longest = max((clip.tokens for clip in clips if clip.width), default=0)
    room = model.caption_tokens - (manifest.text is not None)
    if longest > room:
        yield f"$.clip: expected at most {room} tokens, got {longest}"


def _label_table_problems(manifest: Manifest, parameter: Parameter, path: str) -> Iterator[str]:
    choices, rows = manifest.model.choices, parameter.shape[:1]
    if not parameter.name.endswith(_LABEL_TABLE) or manifest.model.text_conditional:
        return
    if rows != (choices + 1,):  # the last row is the null label
        yield (
            f"{path}: the model has {choices} classes, but its label table {parameter.name!r:.60} "
            f"has {rows[0] if rows else 'no'} rows"
        )


def _engine_problems(manifest: Manifest) -> Iterator[str]:
    for i, engine in enumerate(manifest.engines):
        backend = engine.target.backend
        if backend not in ENGINE_BACKENDS:
            yield f"$.engines[{i}].target.backend: {expected(ENGINE_BACKENDS, backend)}"


def _unlisted_files(manifest: Manifest) -> Iterator[str]:
    listed = {file.path for file in manifest.files}
    for path, name in _used_files(manifest):
        if name not in listed:
            yield f"{path}: {name!r:.60} is not in $.files"


def _used_files(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield the path of every field that names a file, and the file's name."""
    for i, unit in enumerate(manifest.graphs):
        yield f"$.graphs[{i}].onnx", unit.onnx
        if unit.weights_file:
            yield f"$.graphs[{i}].weights_file", unit.weights_file
    for signature, name in manifest.predict.items():
        yield f"$.predict.{signature}", name
    for signature, name in manifest.segments.items():
        yield f"$.segments.{signature}", name
    for graph, name in manifest.heads.items():
        yield f"$.heads.{graph}", name
    for key, name in manifest.tables.items():
        yield f"$.tables.{key}", name
    for i, plan in enumerate(manifest.plans):
        yield f"$.plans[{i}].plan", plan.plan
        yield f"$.plans[{i}].schedule", plan.schedule
        if plan.head is not None:
            yield f"$.plans[{i}].head", plan.head
    for i, engine in enumerate(manifest.engines):
        yield f"$.engines[{i}].path", engine.path
        for j, name in enumerate(engine.graphs):
            yield f"$.engines[{i}].graphs[{j}]", name
    if manifest.stored_captions is not None:
        yield "$.stored_captions", manifest.stored_captions
    for i, encoder in enumerate(manifest.clip):
        yield f"$.clip[{i}].tokenizer", encoder.tokenizer
    if manifest.text is not None:
        yield "$.text.tokenizer", manifest.text.tokenizer
