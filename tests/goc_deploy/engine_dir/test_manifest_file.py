"""Manifests as files."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from goc_deploy.engine_dir.keys import Target
from goc_deploy.engine_dir.manifest import (
    EngineEntry,
    FileEntry,
    GraphEntry,
    Manifest,
    Parameter,
    PlanEntry,
)
from goc_deploy.engine_dir.manifest_file import (
    MANIFEST_VERSION,
    manifest_from_json,
    manifest_to_json,
)
from goc_deploy.errors import EngineDirError, GocError, SafetyError
from goc_deploy.spec import DecoderSpec, FrameCache, ModelSpec, TextSpec, VideoDecoderSpec
from tests.fuzz.mutations import mutated_value

SPEC = ModelSpec(1, 8, 2, 32, 2, 4, 4, 10, False)
LABELS = Parameter("y_embedder.embedding_table.weight", 0, (11, 8))
ENGINE = EngineEntry(
    "engines/x/0.engine",
    "0" * 32,
    Target("tensorrt", "10.9", "linux-x86_64", ("8.6",)),
    "none",
    ("onnx/embed.onnx",),
    3,
    0,
    None,
)


def unit(name: str, *parameters: Parameter) -> GraphEntry:
    weights = f"onnx/{name}.weights" if parameters else None
    return GraphEntry(name, f"onnx/{name}.onnx", weights, parameters, False, 1e-6, "fp16")


UNITS = (
    unit("conditioning", LABELS),
    unit("embed"),
    unit("block_00_attn", Parameter("qkv", 0, (24, 8)), Parameter("bias", 384, (24,))),
    unit("block_00_mlp", Parameter("fc1", 0, (32, 8))),
)
SIZES = {
    "onnx/conditioning.weights": 176,
    "onnx/block_00_attn.weights": 432,
    "onnx/block_00_mlp.weights": 512,
    "engines/x/0.engine": 9,
    "onnx/predict_0.onnx": 9,
    "onnx/segment_0.onnx": 9,
    "plans/a.json": 9,
    "schedules/a.json": 9,
    "captions/a.npz": 9,
    "text_encoder/tokenizer.json": 9,
    **{unit.onnx: 9 for unit in UNITS},
}
MANIFEST = Manifest(
    model=SPEC,
    precision="fp16",
    max_batch=4,
    graphs=UNITS,
    predict={"2w*2": "onnx/predict_0.onnx"},
    plans=(PlanEntry("a", "none", "plans/a.json", "schedules/a.json"),),
    files=tuple(FileEntry(path, size, "0f" * 32) for path, size in SIZES.items()),
    provenance={"options": {"any": [1, None]}},
    engines=(ENGINE,),
    class_names=tuple(f"class {i}" for i in range(10)),
    decoder=DecoderSpec(3, 8, 4, 1),
    video_decoder=VideoDecoderSpec(4, 3, 8, 4, (FrameCache(4, 1), FrameCache(96, 8))),
    stored_captions="captions/a.npz",
    text=TextSpec("text_encoder/tokenizer.json", 32128, 1, 0),
    segments={"w*2": "onnx/segment_0.onnx"},
    scheduler={"_class_name": "DDIMScheduler", "trained_betas": [0.1, 0.2]},
)
OF_TEXT = replace(
    MANIFEST,
    model=replace(
        SPEC,
        choices=0,
        branches=("attn", "cross", "mlp"),
        caption_channels=8,
        caption_tokens=4,
        prediction_type="flow",
        mlp_norm_eps=1e-5,
    ),
    class_names=(),
    segments={},
    tables={"01": "plans/a.json"},
)


def fields() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(manifest_to_json(MANIFEST))
    return found


def read(found: Any) -> Manifest:
    return manifest_from_json(json.dumps(found).encode(), "m.json")


@pytest.mark.parametrize(
    "manifest",
    [
        MANIFEST,
        replace(
            MANIFEST,
            decoder=None,
            video_decoder=None,
            stored_captions=None,
            text=None,
            segments={},
            scheduler=None,
        ),
        OF_TEXT,
    ],
)
def test_saving_and_loading_a_manifest_is_the_identity(manifest: Manifest) -> None:
    text = manifest_to_json(manifest)
    loaded = manifest_from_json(text.encode(), "m.json")
    assert loaded == manifest
    assert manifest_to_json(loaded) == text


def test_fields_that_came_later_may_be_missing_and_newer_ones_are_ignored() -> None:
    found = fields()
    for name in ("engines", "segments", "scheduler"):
        del found[name]
    loaded = read({**found, "from_the_future": [1]})
    assert loaded == replace(MANIFEST, engines=(), segments={}, scheduler=None)


def test_engine_directories_of_an_older_version_ask_for_a_new_export() -> None:
    old = {"format": "goc_deploy.engine_dir", "version": MANIFEST_VERSION - 1}
    with pytest.raises(
        EngineDirError, match=f"this goc_deploy reads {MANIFEST_VERSION}; export again"
    ):
        read(old)


Changes = dict[str, tuple[Callable[[dict[str, Any]], object], str]]
WRONG_TYPES: Changes = {
    "no model": (lambda m: m.pop("model"), "$.model: required field is missing"),
    "depth": (lambda m: m["model"].update(depth=0), "$.model.depth: expected int >= 1, got 0"),
    "word": (lambda m: m["model"].update(depth="4"), "$.model.depth: expected int, got '4'"),
    "huge": (
        lambda m: m["model"].update(hidden=10**7),
        "$.model.hidden: expected int <= 1000000, got 10000000",
    ),
    "choices": (
        lambda m: m["model"].update(choices=-1),
        "$.model.choices: expected int >= 0, got -1",
    ),
    "branches": (
        lambda m: m["model"].update(branches=[]),
        "$.model.branches: expected array of length >= 1, got 0",
    ),
    "batch": (lambda m: m.update(max_batch=0), "$.max_batch: expected int >= 1, got 0"),
    "size": (
        lambda m: m["files"][2].update(size=-1),
        "$.files[2].size: expected int >= 0, got -1",
    ),
    "digest": (
        lambda m: m["files"][0].update(sha256="0"),
        r"$.files[0].sha256: expected str matching regex '^[0-9a-f]{64}\\Z', got '0'",
    ),
    "offset": (
        lambda m: m["graphs"][2]["parameters"][1].update(offset=-8),
        "$.graphs[2].parameters[1].offset: expected int >= 0, got -8",
    ),
    "shape": (
        lambda m: m["graphs"][2]["parameters"][1].update(shape=[1.5]),
        "$.graphs[2].parameters[1].shape[0]: expected int, got 1.5",
    ),
    "predict": (lambda m: m.update(predict={"1": 2}), "$.predict[...]: expected str, got int"),
    "plan": (
        lambda m: m["plans"][0].update(policy=None),
        "$.plans[0].policy: expected str, got None",
    ),
    "capability": (
        lambda m: m["engines"][0]["target"].update(capabilities=[8.6]),
        "$.engines[0].target.capabilities[0]: expected str, got 8.6",
    ),
    "upscale": (
        lambda m: m["decoder"].update(upscale=10**5),
        "$.decoder.upscale: expected int <= 10000, got 100000",
    ),
    "scheduler": (lambda m: m.update(scheduler=3), "$.scheduler: expected object | null, got 3"),
}
BROKEN_RULES: Changes = {
    "tables": (
        lambda m: m.update(tables={"01": "plans/a.json"}),
        "$.tables: expected none, because the model modulates by labels or captions",
    ),
    "unknown": (lambda m: m["model"].update(width=3), "$.model.width: unknown field"),
    "unknown in a list": (
        lambda m: m["graphs"][3]["parameters"][0].update(scale=3),
        "$.graphs[3].parameters[0].scale: unknown field",
    ),
    "prediction type": (
        lambda m: m["model"].update(prediction_type="score"),
        "$.model.prediction_type: expected eps or v or x0 or flow or flow_to_noise, got 'score'",
    ),
    "no classes": (
        lambda m: (m["model"].update(choices=0), m.update(class_names=[])),
        "$.model.choices: expected int >= 1, got 0",
    ),
    "no tokens": (
        lambda m: m["model"].update(caption_channels=8),
        "$.model.caption_tokens: expected int >= 1, got 0",
    ),
    "branches": (
        lambda m: m["model"].update(branches=["attn", "cross"]),
        "$.model.branches: expected units that read the text if caption_channels is "
        "not 0 and only then, got attn, cross",
    ),
    "class names": (
        lambda m: m["class_names"].pop(),
        "$.class_names: expected 0 or 10 names, got 9",
    ),
    "image channels": (
        lambda m: m["decoder"].update(channels=2),
        "$.decoder.channels: expected 1 or 3, got 2",
    ),
    "video channels": (
        lambda m: m["video_decoder"].update(channels=2),
        "$.video_decoder.channels: expected 1 or 3, got 2",
    ),
    "video latents": (
        lambda m: m["video_decoder"].update(latent_channels=16),
        "$.video_decoder.latent_channels: expected 4, got 16",
    ),
    "tile": (lambda m: m["decoder"].update(tile=9), "$.decoder.tile: expected int <= 8, got 9"),
    "overlap": (
        lambda m: m["decoder"].update(overlap=4),
        "$.decoder.overlap: expected int < 4, got 4",
    ),
    "parameter outside": (
        lambda m: m["graphs"][3]["parameters"][0].update(offset=2),
        "$.graphs[3].parameters[0]: 'fc1' ends at byte 514, but its weights file has 512 bytes",
    ),
    "dtype of a parameter": (
        lambda m: m["graphs"][3]["parameters"][0].update(dtype="int2"),
        "$.graphs[3].parameters[0].dtype: expected None or int8 or int4 or float8_e4m3fn, "
        "got 'int2'",
    ),
    "quantised weights": (
        lambda m: m["graphs"][3]["parameters"][0].update(dtype="int4"),
        "$.graphs[3].weights_file: 'onnx/block_00_mlp.weights' is listed with 512 bytes, but its "
        "parameters take 128",
    ),
    "no weights file": (
        lambda m: m["graphs"][3].update(weights_file=None),
        "$.graphs[3].parameters[0]: 'fc1' ends at byte 512, but its weights file has 0 bytes",
    ),
    "larger weights": (
        lambda m: m["files"][2].update(size=2**62),
        "$.graphs[3].weights_file: 'onnx/block_00_mlp.weights' is listed with "
        "4611686018427387904 bytes, but its parameters take 512",
    ),
    "label table": (
        lambda m: (m["model"].update(choices=9), m["class_names"].pop()),
        "$.graphs[0].parameters[0]: the model has 9 classes, but its label table "
        "'y_embedder.embedding_table.weight' has 11 rows",
    ),
    "segments": (
        lambda m: m["graphs"].pop(3),
        "$.segments: made of unit block_00_mlp, which $.graphs does not list with weights",
    ),
    **{
        path: (alter, f"{path}: 'x' is not in $.files")
        for path, alter in {
            "$.graphs[1].onnx": lambda m: m["graphs"][1].update(onnx="x"),
            "$.predict.2w*2": lambda m: m["predict"].update({"2w*2": "x"}),
            "$.segments.w*2": lambda m: m["segments"].update({"w*2": "x"}),
            "$.plans[0].plan": lambda m: m["plans"][0].update(plan="x"),
            "$.plans[0].schedule": lambda m: m["plans"][0].update(schedule="x"),
            "$.engines[0].path": lambda m: m["engines"][0].update(path="x"),
            "$.engines[0].graphs[0]": lambda m: m["engines"][0].update(graphs=["x"]),
            "$.stored_captions": lambda m: m.update(stored_captions="x"),
            "$.text.tokenizer": lambda m: m["text"].update(tokenizer="x"),
        }.items()
    },
}
BROKEN_ENGINES: Changes = {
    "backend": (
        lambda m: m["engines"][0]["target"].update(backend="x"),
        "$.engines[0].target.backend: expected tensorrt-rtx or tensorrt, got 'x'",
    ),
}

UNKNOWN_CHOICES = {
    "precision": (
        lambda m: m.update(precision="fp8"),
        "$.precision: invalid enum value 'fp8'",
    ),
    "unit precision": (
        lambda m: m["graphs"][1].update(precision="fp8"),
        "$.graphs[1].precision: invalid enum value 'fp8'",
    ),
    "weight mode": (
        lambda m: m["engines"][0].update(weight_mode="x"),
        "$.engines[0].weight_mode: invalid enum value 'x'",
    ),
}


@pytest.mark.parametrize(
    ("change", "end"),
    [
        *((change, "") for change in WRONG_TYPES.values()),
        *((change, "; export again") for change in BROKEN_RULES.values()),
        *((change, "; build the engines again") for change in BROKEN_ENGINES.values()),
        *((change, "") for change in UNKNOWN_CHOICES.values()),
    ],
    ids=[*WRONG_TYPES, *BROKEN_RULES, *BROKEN_ENGINES, *UNKNOWN_CHOICES],
)
def test_a_wrong_field_is_named_with_its_path(
    change: tuple[Callable[[dict[str, Any]], object], str], end: str
) -> None:
    alter, message = change
    found = fields()
    alter(found)
    with pytest.raises(EngineDirError) as caught:
        read(found)
    assert str(caught.value).startswith(f"m.json: {message}")
    assert str(caught.value).endswith(end)


def test_a_table_that_is_not_listed_is_named_with_its_key() -> None:
    found = json.loads(manifest_to_json(replace(OF_TEXT, tables={"01": "x"})))
    with pytest.raises(
        EngineDirError, match=r"\$\.tables\.01: 'x' is not in \$\.files; export again"
    ):
        read(found)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a//b", "a/../b", ".x", "a\n", "", "é"])
def test_a_file_that_may_lie_outside_the_directory_is_refused(path: str) -> None:
    found = fields()
    found["files"][3]["path"] = path
    with pytest.raises(SafetyError, match=r"\$\.files\[3\]\.path: .* may lie outside the dir"):
        read(found)


def test_a_file_that_is_listed_twice_is_refused() -> None:
    found = fields()
    found["files"].append({**found["files"][1], "path": found["files"][1]["path"].upper()})
    last = len(SIZES)
    message = rf"\$\.files\[{last}\]\.path: .* is listed as \$\.files\[1\] already; do not use"
    with pytest.raises(SafetyError, match=message):
        read(found)


def test_mutated_manifests_are_read_or_refused() -> None:
    sound, generator = fields(), random.Random(0)
    for _ in range(1500):
        with contextlib.suppress(GocError):
            read(mutated_value(sound, generator))
