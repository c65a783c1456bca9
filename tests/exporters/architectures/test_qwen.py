"""Qwen-Image: the graphs, the images and the loop of diffusers, and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from goc_deploy.conditions.captions import MASKED
from goc_deploy.errors import ModelError, UsageError
from goc_deploy.exporters.architectures.qwen import (
    FAMILY,
    QWEN_IMAGE,
    spec_from_config,
    spec_from_tensors,
    spec_of,
)
from goc_deploy.exporters.model_folder import read_model_folder
from goc_deploy.exporters.units import GraphKind
from goc_deploy.size_inputs import size_tensors
from goc_deploy.spec import ModelSpec
from tests.distances import relative_l2
from tests.qwen_folder import LENGTHS, random_qwen

GRIDS = [(3, 5), (4, 2)]
diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself


@pytest.fixture(scope="module")
def judge() -> Any:
    return random_qwen()


def tiny(grid: tuple[int, int] = GRIDS[0]) -> ModelSpec:
    spec = spec_of(3, 3, (4, 14, 14), channels=16, text=40)
    return replace(spec, grid=grid, max_grid=grid, caption_tokens=LENGTHS[0])


def packed(latents: Tensor) -> Tensor:
    """Latents (N, C, H, W) as diffusers packs them: (N, T, C*2*2)."""
    count, channels, height, width = latents.shape
    patches = latents.view(count, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * 4)


def unpacked(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The opposite of `packed`."""
    rows, columns = grid
    patches = tokens.view(len(tokens), rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(len(tokens), -1, 2 * rows, 2 * columns)


def judged(judge: Any, latents: Tensor, t: Tensor, embeds: Tensor, mask: Tensor | None) -> Tensor:
    """The output of the model of diffusers, (N, C, H, W)."""
    grid = (latents.shape[2] // 2, latents.shape[3] // 2)
    with torch.inference_mode():
        tokens = judge(
            packed(latents), embeds, mask, t / 1000, img_shapes=[[(1, *grid)]] * len(latents)
        ).sample
    return unpacked(tokens, grid)


def features_of(judge: Any, kept: dict[str, list[Tensor]]) -> list[Any]:
    """Hooks that keep the features of every unit, by its name; the image's before the text's."""

    def keep(name: str, *, first: bool = True) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, out: Any) -> None:
            values = list(out) if isinstance(out, tuple) else [out]
            kept[name] = values if first else [*kept[name], *values]

        return hook

    hooks = []
    for i, block in enumerate(judge.transformer_blocks):
        name = f"block_{i:02d}"
        hooks.append(block.attn.register_forward_hook(keep(f"{name}_attn")))
        hooks.append(block.img_mlp.register_forward_hook(keep(f"{name}_mlp")))
        hooks.append(block.txt_mlp.register_forward_hook(keep(f"{name}_mlp", first=False)))
    return hooks


def graphs_in_order(
    all_kinds: Sequence[GraphKind], spec: ModelSpec, state: dict[str, Tensor]
) -> Iterator[tuple[str, GraphKind]]:
    """Every graph in the order of execution, whose module has the weights of its copy."""
    kinds = {name: kind for kind in all_kinds for name in kind.copies}
    for name in ("conditioning", "captions", "embed", *spec.unit_names, "final"):
        kind = kinds[name]
        weights = {
            parameter: torch.cat([slab.read(state, torch.float32) for slab in slabs])
            for parameter, slabs in kind.copies[name].items()
        }
        kind.module.load_state_dict(weights)
        yield name, kind


@pytest.mark.parametrize("grid", GRIDS)
def test_every_unit_computes_what_diffusers_computes(judge: Any, grid: tuple[int, int]) -> None:
    """The graphs in a chain, with a padded caption, and the law of a collapsed step."""
    spec, rng = tiny(grid), torch.Generator().manual_seed(1)
    latents = torch.randn((2, *spec.latents), generator=rng)
    captions = torch.randn((2, spec.caption_tokens, 40), generator=rng)
    mask = torch.arange(spec.caption_tokens) < torch.tensor(LENGTHS)[:, None]
    kept: dict[str, list[Tensor]] = {}
    hooks = features_of(judge, kept)
    expected = judged(judge, latents, torch.full((2,), 731.25), captions, mask)
    for hook in hooks:
        hook.remove()
    rows = torch.arange(2)
    tensors = {name: torch.from_numpy(v) for name, v in size_tensors(spec).items()}
    tensors |= {"timesteps": torch.tensor([999.0, 731.25]), "captions": captions}
    tensors |= {"bias": MASKED * (~mask).float(), "caption_rows": rows, "rows": rows}
    tensors["latents"] = latents.reshape(spec.in_patches((2, *spec.latents)))
    total = torch.zeros(())
    for name, kind in graphs_in_order(FAMILY.graph_kinds(spec, "fp32"), spec, judge.state_dict()):
        tensors |= rows_of(spec, name, tensors)
        if name == "final":
            assert relative_l2(total.numpy(), tensors["x"].double().numpy()) < 1e-6
            tensors["x"] = tensors["x"].reshape(2, *grid, -1)
        with torch.inference_mode():
            found = kind.module(*(tensors[i.name] for i in kind.inputs))
        made = dict(zip(kind.outputs, found if isinstance(found, tuple) else [found], strict=True))
        tensors |= {output.removesuffix("_out"): value for output, value in made.items()}
        if name == "embed":
            tensors["x"] = tensors["x"].flatten(1, 2)
            total = tensors["x"].double()
        if name.startswith("block"):
            for feature, theirs in zip(("feature", "feature_text"), kept[name], strict=True):
                if feature in made:
                    assert relative_l2(made[feature].numpy(), theirs.flatten(0, 1).numpy()) < 1e-4
            gated = tensors["gate"].double()[:, None] * made["feature"].double().view_as(total)
            total = total + gated
    found = tensors["prediction"].reshape(expected.shape)
    assert relative_l2(found.numpy(), expected.numpy()) < 1e-4


def rows_of(spec: ModelSpec, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of the table that a graph reads, for the second of two timesteps."""
    places: dict[str, int] = {}
    if name.startswith("block"):
        places = spec.modulation.of_unit(spec.unit_names.index(name))
    if name == "final":
        places = {"shift": spec.modulation.final_shift, "scale": spec.modulation.final_scale}
    return {row: tensors["table"][1, place].expand(2, -1) for row, place in places.items()}


def test_the_tensors_alone_show_the_sizes(judge: Any) -> None:
    state = judge.state_dict()
    assert QWEN_IMAGE.matches(list(state))
    assert spec_from_tensors(state, None) == spec_from_config(
        json.loads(judge.to_json_string()), ""
    )
    with pytest.raises(ModelError, match="`num_heads` must be their number"):
        spec_from_tensors(state, 2)


def test_the_public_model_has_the_sizes_of_its_page() -> None:
    spec = spec_from_config({"_class_name": "QwenImageTransformer2DModel"}, "")
    assert (spec.depth, spec.units, spec.hidden, spec.heads) == (60, 120, 3072, 24)
    assert len(spec.features) == 120 + 118
    assert (spec.tokens, spec.latents) == (83 * 83, (16, 166, 166))
    count = sum(math.prod(shape) for shape in FAMILY.shapes(spec).values())
    assert round(count / 1e9, 2) == 20.43


def test_the_last_block_has_no_queries_of_the_text() -> None:
    """No graph binds the tensors of the last block that change the text only."""
    spec = tiny()
    kinds = FAMILY.graph_kinds(spec, "fp32")
    copies = (binding for kind in kinds for binding in kind.copies.values())
    used = {slab.key for binding in copies for slabs in binding.values() for slab in slabs}
    block = "transformer_blocks.2"
    layers = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    dead = {f"{block}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert FAMILY.shapes(spec).keys() - used == dead | {f"{block}.attn.norm_added_q.weight"}


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "references of Edit-2511": ({"zero_cond_t": True}, "zero_cond_t is True, only False"),
    "layers": ({"use_layer3d_rope": True}, "use_layer3d_rope is True"),
    "another time": ({"use_additional_t_cond": True}, "use_additional_t_cond is True"),
    "embedded guidance": ({"guidance_embeds": True}, "guidance_embeds is True"),
    "another patch": ({"patch_size": 1}, "patch_size is 1, only 2"),
    "more channels in": ({"in_channels": 128}, "in_channels is 128 and out_channels 16"),
    "odd axes": ({"axes_dims_rope": [6, 13, 13]}, r"axes_dims_rope is \[6, 13, 13\]"),
    "other axes": ({"axes_dims_rope": [8, 14, 14]}, "attention_head_dim 32"),
    "two axes": ({"axes_dims_rope": [18, 14]}, "axes_dims_rope"),
    "too deep": ({"num_layers": 2000}, "num_layers is 2000"),
    "an unknown setting": ({"colour": 1}, "a setting 'colour' that this version does not know"),
    "another class": ({"_class_name": "FluxTransformer2DModel"}, "_class_name is"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_configurations_that_do_not_fit_are_refused_by_name(judge: Any, change: str) -> None:
    values, message = CHANGES[change]
    config = json.loads(judge.to_json_string())
    with pytest.raises(ModelError, match=message):
        spec_from_config({**config, **values}, "config.json")


def test_half_precision_is_refused() -> None:
    with pytest.raises(UsageError, match="tokens of a Qwen-Image exceed the range of fp16; use"):
        FAMILY.graph_kinds(tiny(), "fp16")


@pytest.mark.parametrize("pipeline", ["QwenImageEditInpaintPipeline", "QwenImageLayeredPipeline"])
def test_pipelines_that_start_from_a_picture_are_refused(pipeline: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(ModelError, match=f"holds a {pipeline}; this version exports"):
        read_model_folder(tmp_path, {"qwen-image": QWEN_IMAGE})
