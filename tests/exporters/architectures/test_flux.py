"""FLUX.1: every unit is that of diffusers, and what is read from folders and files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from goc_deploy.errors import ModelError, UsageError
from goc_deploy.exporters.architectures.flux import (
    FAMILY,
    FLUX,
    FluxConfig,
    spec_from_config,
    spec_of,
)
from goc_deploy.exporters.architectures.flux_authors import DOUBLE, OUTER, SINGLE
from goc_deploy.exporters.model_folder import read_model_folder
from goc_deploy.spec import ModelSpec
from tests.exporters.architectures.graph_chain import Arrays, GraphChain
from tests.reference import relative_l2

CONFIG: dict[str, Any] = {
    "in_channels": 12,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 24,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 28,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 8, 12),
}
SIZES = [(8, 12), (10, 6)]  # of the latents
TOKENS = 13
FINAL = "final_layer.adaLN_modulation.1"
GUIDANCE, TIME = 3.5, 700.0
diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself


def judge_of(**changes: Any) -> Any:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(**{**CONFIG, **changes}).eval()
    for name, parameter in model.named_parameters():
        norm = "attn.norm" in name
        parameter.data.normal_(1.0 if norm else 0.0, 0.1 if parameter.ndim == 1 else 0.15)
    return model.requires_grad_(False)


def tiny(judge: Any) -> ModelSpec:
    """The model of a transformer of diffusers, for captions of few tokens."""
    spec = spec_from_config(json.loads(judge.to_json_string()), "here")
    return replace(spec, caption_tokens=TOKENS, grid=(4, 6), max_grid=(6, 6))


def conditions(spec: ModelSpec) -> Arrays:
    draw = np.random.default_rng(1).standard_normal
    arrays = {
        "captions": draw((2, TOKENS, spec.caption_channels)),
        "pooled": draw((2, spec.pooled_channels)),
        "guidance": np.array([GUIDANCE]),
    }
    return {name: values.astype(np.float32) for name, values in arrays.items()}


def packed(latents: np.ndarray) -> torch.Tensor:
    """Latents as FluxPipeline packs them: (B, T, 4 * C)."""
    batch, channels, height, width = latents.shape
    return diffusers.FluxPipeline._pack_latents(
        torch.from_numpy(latents), batch, channels, height, width
    )


def predicted(judge: Any, latents: np.ndarray, given: Arrays) -> torch.Tensor:
    """The packed prediction of diffusers."""
    height, width = latents.shape[2:]
    guided = judge.config.guidance_embeds
    return judge(
        hidden_states=packed(latents),
        encoder_hidden_states=torch.from_numpy(given["captions"]),
        pooled_projections=torch.from_numpy(given["pooled"]),
        timestep=torch.full((2,), TIME / 1000),
        img_ids=diffusers.FluxPipeline._prepare_latent_image_ids(
            2, height // 2, width // 2, "cpu", torch.float32
        ),
        txt_ids=torch.zeros(TOKENS, 3),
        guidance=torch.full((2,), GUIDANCE) if guided else None,
    ).sample


def with_outputs(judge: Any, call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """The result of a call, and the output of every module meanwhile."""
    seen: dict[str, Any] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _a, out, name=name: seen.update({name: out}))
        for name, module in judge.named_modules()
    ]
    try:
        return call(), seen
    finally:
        for hook in hooks:
            hook.remove()


def expected_of_units(seen: dict[str, Any]) -> list[tuple[str, str, torch.Tensor]]:
    """(unit, output, tensor) of diffusers, for 2 double and 3 single blocks."""
    expected = []
    for i in range(2):
        name, block = f"transformer_blocks.{i}", f"block_{i:02d}"
        image, text = seen[f"{name}.attn"]
        expected += [
            (f"{block}_attn", "feature", image),
            (f"{block}_attn", "feature_text", text),
            (f"{block}_mlp", "feature", seen[f"{name}.ff"]),
            (f"{block}_mlp", "feature_text", seen[f"{name}.ff_context"]),
            (f"{block}_mlp", "text_out", seen[name][0]),
            (f"{block}_mlp", "x_out", seen[name][1]),
        ]
    for i in range(3):
        name, unit = f"single_transformer_blocks.{i}", f"block_{i + 2:02d}_single"
        both = seen[f"{name}.proj_out"]
        expected += [
            (unit, "feature", both[:, TOKENS:]),
            (unit, "x_out", seen[name][1]),
        ]
        if i < 2:
            expected += [
                (unit, "feature_text", both[:, :TOKENS]),
                (unit, "text_out", seen[name][0]),
            ]
    return expected


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def chain(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, GraphChain]:
    judge = judge_of(guidance_embeds=request.param)
    folder = tmp_path_factory.mktemp("flux")
    return judge, GraphChain(FLUX, tiny(judge), judge.state_dict(), folder)


@pytest.mark.parametrize("size", SIZES)
def test_every_unit_is_that_of_diffusers(
    chain: tuple[Any, GraphChain], size: tuple[int, int]
) -> None:
    judge, graphs = chain
    noise = np.random.default_rng(2).standard_normal((2, 3, *size)).astype(np.float32)
    given = conditions(graphs.spec)
    output, seen = with_outputs(judge, lambda: predicted(judge, noise, given))
    found = graphs.step(noise, TIME, given)
    for unit, name, tensor in expected_of_units(seen):
        theirs = tensor.numpy().reshape(found[unit][name].shape)
        assert relative_l2(found[unit][name], theirs) < 1e-4, (unit, name)
    height, width = size
    whole = diffusers.FluxPipeline._unpack_latents(output, 8 * height, 8 * width, 8).numpy()
    assert relative_l2(found["final"]["prediction"], whole) < 1e-4
    assert relative_l2(graphs.collapsed(found), found["final"]["prediction"]) < 1e-6


def test_no_graph_computes_text_that_nothing_reads(chain: tuple[Any, GraphChain]) -> None:
    _, graphs = chain
    assert {entry.name for entry in graphs.entries} == {
        "conditioning", "captions", "embed", "final", *graphs.spec.unit_names,
    }  # fmt: skip
    assert graphs.spec.unit_names == (
        "block_00_attn", "block_00_mlp", "block_01_attn", "block_01_mlp",
        "block_02_single", "block_03_single", "block_04_single",
    )  # fmt: skip
    texts = [place for place in graphs.spec.features if place.feature.stream == "text"]
    assert [place.unit for place in texts] == [0, 1, 2, 3, 4, 5]


def test_both_gates_of_a_single_block_are_one_layer(chain: tuple[Any, GraphChain]) -> None:
    _, graphs = chain
    given = {**conditions(graphs.spec), "timesteps": np.array([900.0, 3.0], np.float32)}
    table = graphs.run("conditioning", given)["table"]
    rows = graphs.spec.modulation.of_unit(4)
    assert rows["gate"] != rows["gate_text"]
    np.testing.assert_array_equal(table[:, rows["gate"]], table[:, rows["gate_text"]])
    (weight,) = [
        parameter
        for entry in graphs.entries
        for parameter in entry.parameters
        if parameter.name == "modulation.weight"
    ]
    # 12 rows of each double block, 3 of each single one, and 2 of the final layer.
    assert weight.shape[0] == (2 * 12 + 3 * 3 + 2) * graphs.spec.hidden


def authors_state(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of diffusers in the layout of the authors."""
    state: dict[str, torch.Tensor] = {}

    def join(prefix: str, block: str, layers: Mapping[str, tuple[str, ...]]) -> None:
        for layer, parts in layers.items():
            for kind in ("weight", "bias"):
                found = [tensors.get(f"{block}{part}.{kind}") for part in parts]
                if all(tensor is not None for tensor in found):
                    state[f"{prefix}{layer}.{kind}"] = torch.cat(found)

    join("", "", OUTER)
    for kind in ("weight", "bias"):
        scale, shift = state[f"{FINAL}.{kind}"].chunk(2)
        state[f"{FINAL}.{kind}"] = torch.cat([shift, scale])
    for i in range(3):
        join(f"double_blocks.{i}.", f"transformer_blocks.{i}.", DOUBLE)
        join(f"single_blocks.{i}.", f"single_transformer_blocks.{i}.", SINGLE)
    norms = [
        ("single_transformer_blocks.{}.attn.norm_", "single_blocks.{}.norm."),
        ("transformer_blocks.{}.attn.norm_added_", "double_blocks.{}.txt_attn.norm."),
        ("transformer_blocks.{}.attn.norm_", "double_blocks.{}.img_attn.norm."),
    ]
    for theirs, ours in norms:
        for i, part in product(range(3), ("query", "key")):
            name = f"{theirs.format(i)}{part[0]}.weight"
            if name in tensors:
                state[f"{ours.format(i)}{part}_norm.scale"] = tensors[name]
    assert sum(map(torch.numel, state.values())) == sum(map(torch.numel, tensors.values()))
    return state


BIG_HEADS = {
    "attention_head_dim": 128, "num_attention_heads": 1, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip


@pytest.mark.parametrize("guided", [True, False])
def test_a_file_of_the_authors_holds_the_same_model(guided: bool) -> None:
    judge = judge_of(**BIG_HEADS, guidance_embeds=guided)
    spec, tensors = spec_from_config(json.loads(judge.to_json_string()), "here"), judge.state_dict()
    file = authors_state(tensors)
    assert FLUX.other_layout is not None
    assert FLUX.other_layout.telling_tensors <= file.keys()
    state = FLUX.in_public_layout(file)
    assert FLUX.matches(list(state))
    assert FLUX.spec_from_tensors(state, None) == spec
    FLUX.check_tensors(state, spec)
    for name, tensor in tensors.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)
    joined = file["double_blocks.0.img_attn.qkv.weight"]
    assert state["transformer_blocks.0.attn.to_k.weight"].untyped_storage().data_ptr() == (
        joined.untyped_storage().data_ptr()
    )
    del file["double_blocks.1.img_mlp.0.bias"]
    file["double_blocks.1.colour"] = torch.ones(1)
    message = r"1 missing: transformer_blocks\.1\.ff\.net\.0\.proj\.bias; 1 unexpected: double_bl"
    with pytest.raises(ModelError, match=message):
        FLUX.check_tensors(FLUX.in_public_layout(file), spec)


def test_a_file_that_starts_from_a_picture_is_refused() -> None:
    state = judge_of(**BIG_HEADS, in_channels=24, out_channels=12).state_dict()
    with pytest.raises(ModelError, match="reads 24 values per token and predicts 12; models that"):
        FLUX.spec_from_tensors(state, None)
    state = judge_of().state_dict()
    with pytest.raises(ModelError, match="the width is 72, with heads of 24; heads of 128 are"):
        FLUX.spec_from_tensors(state, None)


def test_public_models_have_the_sizes_of_their_pages() -> None:
    dev = spec_of(FluxConfig(guidance_embeds=True))
    assert (dev.hidden, dev.depth, dev.units, dev.channels) == (3072, 57, 76, 16)
    assert (dev.tokens, dev.caption_tokens, dev.embedded_guidance) == (4096, 512, True)
    count = sum(np.prod(shape) for shape in FAMILY.shapes(dev).values())
    assert count == 11_901_408_320
    schnell = spec_of(FluxConfig())
    assert (schnell.caption_tokens, schnell.embedded_guidance) == (256, False)


def folder_of(judge: Any, path: Path) -> Path:
    """The folder of a pipeline."""
    judge.save_pretrained(path / "transformer")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def test_folders_are_recognised(tmp_path: Path) -> None:
    judge = judge_of()
    folder = folder_of(judge, tmp_path / "pipeline")
    whole, alone = (
        read_model_folder(path, {"flux": FLUX}) for path in (folder, folder / "transformer")
    )
    assert whole.spec == alone.spec == spec_from_config(json.loads(judge.to_json_string()), "here")
    FLUX.check_tensors(alone.checkpoint.tensors, alone.spec)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "starts from a picture": ({"out_channels": 8}, "in_channels is 12 and out_channels 8; models"),
    "another patch": ({"patch_size": 2}, "patch_size is 2, only 1 is supported"),
    "other axes": ({"axes_dims_rope": [4, 8, 10]}, r"axes_dims_rope is \[4, 8, 10\], attention_"),
    "odd channels": ({"in_channels": 14}, "in_channels is 14, expected a multiple of 4"),
    "too many blocks": ({"num_layers": 999}, "num_layers is 999 and num_single_layers is 3, at"),
    "an unknown setting": ({"colour": 1}, "a setting 'colour' that this version does not know"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_settings_that_do_not_fit_are_refused_by_name(change: str) -> None:
    values, message = CHANGES[change]
    config = {**CONFIG, "_class_name": "FluxTransformer2DModel", **values}
    with pytest.raises(ModelError, match=message):
        spec_from_config(config, "config.json")


def test_fp16_is_refused() -> None:
    with pytest.raises(UsageError, match="exceed the range of fp16; use bf16 or fp32"):
        FLUX.graph_kinds(spec_of(FluxConfig()), "fp16")
