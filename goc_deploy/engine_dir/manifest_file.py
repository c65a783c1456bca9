"""The manifest as JSON, and the strict checks of one that is read."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from operator import index
from typing import Any

from goc_deploy.engine_dir.keys import ENGINE_BACKENDS, WEIGHT_MODES, Target
from goc_deploy.engine_dir.manifest import (
    IMAGE_CHANNELS,
    EngineEntry,
    FileEntry,
    Manifest,
    Parameter,
    PlanEntry,
    Unit,
)
from goc_deploy.errors import EngineDirError, SafetyError
from goc_deploy.spec import ITEM_BYTES, PRECISIONS, PREDICTIONS, DecoderSpec, ModelSpec, TextSpec
from goc_deploy.strict_json import build, check_format, dump_json, parse_json

MANIFEST_FORMAT, MANIFEST_VERSION = "goc_deploy.engine_dir", 5
LABEL_TABLE = "embedding_table.weight"  # end of the names of tables with a row per class
_SAFE_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,@-]*(/[A-Za-z0-9][A-Za-z0-9._+=,@-]*){0,3}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def manifest_to_json(manifest: Manifest) -> str:
    """A manifest as JSON."""
    return dump_json({"format": MANIFEST_FORMAT, "version": MANIFEST_VERSION, **asdict(manifest)})


def manifest_from_json(text: bytes, where: str) -> Manifest:
    """Read and check a manifest.

    Raises:
        EngineDirError: not JSON, another format or version, a field of the wrong form.
        SafetyError: a path that leaves the directory.
    """
    found = parse_json(text, where, EngineDirError)
    check_format(found, MANIFEST_FORMAT, MANIFEST_VERSION, where, EngineDirError)
    manifest: Manifest = build(lambda: _manifest_from_fields(found), where, EngineDirError)
    build(lambda: _check(manifest, where), where, EngineDirError)
    return manifest


def _manifest_from_fields(found: dict[str, Any]) -> Manifest:
    model = {
        **found["model"],
        "branches": tuple(str(branch) for branch in found["model"]["branches"]),
    }
    return Manifest(
        model=ModelSpec(**model),
        precision=str(found["precision"]),
        max_batch=index(found["max_batch"]),
        units=tuple(_unit_from_fields(unit) for unit in found["units"]),
        predict={str(key): str(path) for key, path in found["predict"].items()},
        plans=tuple(PlanEntry(**plan) for plan in found["plans"]),
        files=tuple(FileEntry(**entry) for entry in found["files"]),
        provenance=dict(found["provenance"]),
        engines=tuple(_engine_from_fields(engine) for engine in found.get("engines", ())),
        class_names=tuple(str(name) for name in found["class_names"]),
        decoder=None if found["decoder"] is None else DecoderSpec(**found["decoder"]),
        captions=None if found["captions"] is None else str(found["captions"]),
        text=None if found["text"] is None else TextSpec(**found["text"]),
        segments={str(key): str(path) for key, path in found.get("segments", {}).items()},
        scheduler=None if found.get("scheduler") is None else dict(found["scheduler"]),
    )


def _engine_from_fields(engine: dict[str, Any]) -> EngineEntry:
    target = engine["target"]
    target = Target(**{**target, "capabilities": tuple(str(c) for c in target["capabilities"])})
    names = {
        name: tuple(str(text) for text in engine.get(name, ())) for name in ("graphs", "optima")
    }
    return EngineEntry(**{**engine, "target": target, **names})


def _unit_from_fields(unit: dict[str, Any]) -> Unit:
    parameters = tuple(
        Parameter(str(p["name"]), index(p["offset"]), tuple(index(d) for d in p["shape"]))
        for p in unit["parameters"]
    )
    return Unit(**{**unit, "parameters": parameters})


def _check(manifest: Manifest, where: str) -> None:
    model = manifest.model
    sizes = (
        model.depth,
        model.hidden,
        model.heads,
        model.patch,
        model.grid,
        model.channels,
        manifest.max_batch,
        *(
            [model.caption_channels, model.caption_tokens]
            if model.draws_captions
            else [model.classes]
        ),
    )
    if (
        not all(type(size) is int and 0 < size <= 10**6 for size in sizes)
        or manifest.precision not in PRECISIONS
    ):
        raise EngineDirError(f"{where} has sizes or a precision out of range; export again")
    if model.prediction not in PREDICTIONS:
        raise EngineDirError(
            f"{where}: the model predicts {model.prediction!r}, which this version does not know; export again"
        )
    if (
        type(model.classes) is not int
        or model.classes < 0
        or ("cross" in model.branches) != model.draws_captions
    ):
        raise EngineDirError(
            f"{where}: the classes, captions and branches do not fit each other; export again"
        )
    _check_decoder(manifest, where)
    if len(manifest.class_names) not in (0, model.classes):
        raise EngineDirError(
            f"{where} names {len(manifest.class_names)} classes of a model with {model.classes}; export again"
        )
    paths = [entry.path for entry in manifest.files]
    for path in paths:
        if not isinstance(path, str) or not _SAFE_PATH.fullmatch(path):
            raise SafetyError(
                f"{where} names a file that may lie outside the directory: {path!r}; do not use this directory"
            )
    if len({path.lower() for path in paths}) != len(paths):
        raise SafetyError(
            f"{where} lists a file twice (names that differ only in case count as equal)"
        )
    if not all(
        type(e.size) is int and e.size >= 0 and _SHA256.fullmatch(e.sha256) for e in manifest.files
    ):
        raise EngineDirError(f"{where} lists a file without a valid size and SHA-256")
    _check_weights(manifest, where)
    if manifest.segments and not set(model.unit_names) <= {
        unit.name for unit in manifest.units if unit.weights
    }:
        raise EngineDirError(
            f"{where} lists segments without the units that they are made of; export again"
        )
    used = [u.onnx for u in manifest.units] + [u.weights for u in manifest.units if u.weights]
    for engine in manifest.engines:
        if engine.target.backend not in ENGINE_BACKENDS or engine.weights not in (
            *WEIGHT_MODES,
            "none",
        ):
            raise EngineDirError(
                f"{where} lists engine {engine.path!r} of an unknown kind; build the engines again"
            )
        used += [engine.path, *engine.graphs]
    used += [
        *manifest.predict.values(),
        *manifest.segments.values(),
        *(p.plan for p in manifest.plans),
        *(p.schedule for p in manifest.plans),
    ]
    used += [manifest.captions] if manifest.captions is not None else []
    used += [manifest.text.tokenizer] if manifest.text is not None else []
    missing = sorted(set(used) - set(paths))
    if missing:
        raise EngineDirError(f"{where} uses {missing[0]!r} but does not list it; export again")


def _check_weights(manifest: Manifest, where: str) -> None:
    """Check that weights files hold their parameters and no more, so that nothing else is read, and that labels have rows."""
    sizes = {entry.path: entry.size for entry in manifest.files}
    for unit in manifest.units:
        if unit.precision not in PRECISIONS:
            raise EngineDirError(
                f"{where}: unit {unit.name} has an unknown precision; export again"
            )
        size, needed = sizes.get(unit.weights or "", 0), 0
        for p in unit.parameters:
            end = p.offset + math.prod(p.shape) * ITEM_BYTES[unit.precision]
            if min(p.offset, *p.shape, end) < 0 or end > size:
                raise EngineDirError(
                    f"{where} places {p.name} of unit {unit.name} outside its weights file; export again"
                )
            takes_labels = p.name.endswith(LABEL_TABLE) and not manifest.model.draws_captions
            rows = p.shape[0] if takes_labels else None
            if rows not in (None, manifest.model.classes + 1):  # the last one is the null label
                raise EngineDirError(
                    f"{where} describes a model with {manifest.model.classes} classes, but its label table {p.name} has {rows} rows; export again"
                )
            needed = max(needed, end)
        if unit.weights in sizes and size != needed:
            raise EngineDirError(
                f"{where} lists {unit.weights} with {size} bytes, but its parameters take {needed}; export again"
            )


def _check_decoder(manifest: Manifest, where: str) -> None:
    decoder = manifest.decoder
    if decoder is None:
        return
    sizes = (decoder.upscale, decoder.tile, decoder.overlap)
    if (
        decoder.channels not in IMAGE_CHANNELS
        or not all(type(size) is int and 0 < size <= 10**4 for size in sizes)
        or not decoder.overlap < decoder.tile <= manifest.model.side
    ):
        raise EngineDirError(f"{where} describes a decoder that cannot be; export again")
