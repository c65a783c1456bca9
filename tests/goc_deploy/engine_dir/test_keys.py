from __future__ import annotations

from dataclasses import fields, replace

import pytest

from goc_deploy.engine_dir.keys import Recipe, Target, dimension_profiles, dimension_ranges
from goc_deploy.spec import ModelSpec

TARGET = Target("tensorrt-rtx", "1.7.1.116", "linux-x86_64", ("8.6", "12.0"))
RECIPE = Recipe("a" * 64, "b" * 64, TARGET, ((("batch", (1, 2, 2)),),), 0, None)
CHANGED = {
    "graph_sha256": "c" * 64,
    "weights_sha256": None,
    "target": replace(TARGET, capabilities=("8.6",)),
    "profiles": ((("batch", (1, 2, 4)),), (("batch", (1, 4, 4)),)),
    "scratch_limit_bytes": 1,
    "plugin_sha256": "d" * 64,
}


def test_a_key_depends_on_everything_that_decides_an_engine() -> None:
    assert CHANGED.keys() == {field.name for field in fields(Recipe)}
    keys = {RECIPE.key} | {replace(RECIPE, **{name: value}).key for name, value in CHANGED.items()}  # type: ignore[arg-type]
    keys |= {replace(RECIPE, target=replace(TARGET, version="1.7.2")).key}
    assert len(keys) == len(CHANGED) + 2
    assert replace(RECIPE).key == RECIPE.key
    assert all(len(key) == 32 for key in keys)


def test_a_folder_names_backend_version_and_gpus() -> None:
    assert TARGET.folder == "engines/tensorrt-rtx-1.7.1.116-sm86+sm120"


@pytest.mark.parametrize(
    ("here", "reason"),
    [
        (("tensorrt-rtx", "1.7.1.116", "linux-x86_64", "8.6"), None),
        (
            ("tensorrt", "1.7.1.116", "linux-x86_64", "8.6"),
            "backend tensorrt-rtx, this is tensorrt",
        ),
        (
            ("tensorrt-rtx", "1.6.1.120", "linux-x86_64", "8.6"),
            "version 1.7.1.116, this is 1.6.1.120",
        ),
        (
            ("tensorrt-rtx", "1.7.1.116", "linux-aarch64", "8.6"),
            "platform linux-x86_64, this is linux-aarch64",
        ),
        (("tensorrt-rtx", "1.7.1.116", "linux-x86_64", "8.9"), "8.6, 12.0, this GPU has 8.9"),
    ],
)
def test_an_engine_is_refused_where_it_was_not_built_for(
    here: tuple[str, str, str, str], reason: str | None
) -> None:
    found = TARGET.refusal(*here)
    assert found is None if reason is None else found is not None and reason in found


def test_ranges_grow_with_the_batch_and_the_longest_plan() -> None:
    ranges = dimension_ranges(ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False), max_batch=3, steps=20)
    assert ranges["batch"] == ranges["B"] == (1, 6, 6)
    assert ranges["images"] == ranges["N"] == (1, 3, 3)
    assert ranges["labels"] == ranges["R"] == (1, 2, 4)
    assert ranges["M"] == (1, 14, 14)
    assert ranges["steps"] == (1, 20, 20)


def test_a_decoder_of_videos_sees_tiles_only() -> None:
    spec = ModelSpec(2, 8, 2, 16, 2, (21, 30, 52), 16, 0, False, max_grid=(21, 45, 80))
    whole, tiled = (dimension_ranges(spec, 1, 20, tile) for tile in (0, 64))
    assert (whole["height"], whole["8*width"]) == ((1, 60, 180), (8, 832, 2560))
    assert (tiled["height"], tiled["8*width"]) == ((1, 60, 64), (8, 512, 512))
    assert (whole["H"], tiled["H"]) == ((1, 60, 180),) * 2


def test_tensorrt_is_optimised_for_one_image_and_for_the_most_and_rtx_once() -> None:
    spec = ModelSpec(2, 8, 2, 16, 2, 2, 4, 10, False)
    (only,) = dimension_profiles("tensorrt-rtx", spec, 16, 20)
    single, most = dimension_profiles("tensorrt", spec, 16, 20)
    assert only == most == dimension_ranges(spec, 16, 20)
    assert (single["batch"], most["batch"]) == ((1, 2, 32), (1, 32, 32))
    assert (single["images"], most["images"]) == ((1, 1, 16), (1, 16, 16))
    assert {symbol for symbol in single if single[symbol] != most[symbol]} == {
        "batch",
        "B",
        "images",
        "N",
    }
    assert replace(RECIPE, profiles=((("B", (1, 2, 8)),), (("B", (1, 8, 8)),))).optima == (
        "B=2",
        "B=8",
    )
