"""Z-Image: the graphs and the images of diffusers, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from goc_deploy.conditions.captions import MASKED
from goc_deploy.exporters.architectures.z_image import graph_kinds
from goc_deploy.exporters.architectures.z_image_diffusers import (
    shapes_from_spec,
    spec_from_config,
)
from goc_deploy.size_inputs import size_tensors
from goc_deploy.spec import ModelSpec
from tests.distances import relative_l2
from tests.exporters.architectures.test_qwen import graphs_in_order, rows_of

CONFIG: dict[str, Any] = {
    "dim": 288,
    "n_layers": 3,
    "n_refiner_layers": 2,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 40,
    "axes_dims": [24, 36, 36],
    "axes_lens": [1024, 64, 64],
}
LENGTHS = (37, 5)  # tokens of the two captions, which are padded to 64 and 32
GRIDS = [(4, 8), (16, 6)]
diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself


def tiny_judge() -> Any:
    """A random model of diffusers."""
    torch.manual_seed(0)
    model = diffusers.ZImageTransformer2DModel(**CONFIG).eval()
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and "weight" in name
        parameter.data.normal_(1.0 if norm else 0.0, 0.1)
    return model


@pytest.fixture(scope="module")
def judge() -> Any:
    return tiny_judge()


def tiny(judge: Any, grid: tuple[int, int] = GRIDS[0]) -> ModelSpec:
    spec = spec_from_config(json.loads(judge.to_json_string()), "config.json")
    return replace(spec, grid=grid, max_grid=grid, caption_tokens=70)


def hooked(judge: Any, kept: dict[str, list[Tensor]], tokens: int) -> list[Any]:
    """Hooks that keep the features of every unit, by its name: of the image, then of the text."""
    hooks = []
    blocks = [*judge.noise_refiner, *judge.layers]
    for i, block in enumerate(blocks):
        for branch, layer in (("attn", block.attention_norm2), ("mlp", block.ffn_norm2)):

            def keep(_m: Any, _a: Any, out: Tensor, name: str = f"block_{i:02d}_{branch}") -> None:
                kept[name] = [out[:, :tokens], out[:, tokens:]]

            hooks.append(layer.register_forward_hook(keep))
    return hooks


@pytest.mark.parametrize("grid", GRIDS)
def test_every_unit_computes_what_diffusers_computes(judge: Any, grid: tuple[int, int]) -> None:
    """The graphs in a chain, with captions of two lengths, and the law of a collapsed step."""
    spec, rng = tiny(judge, grid), torch.Generator().manual_seed(1)
    assert shapes_from_spec(spec) == {n: tuple(t.shape) for n, t in judge.state_dict().items()}
    latents = torch.randn((2, *spec.latents), generator=rng)
    captions = torch.randn((2, spec.caption_tokens, 40), generator=rng)
    mask = torch.arange(spec.caption_tokens) < torch.tensor(LENGTHS)[:, None]
    kept: dict[str, list[Tensor]] = {}
    hooks = hooked(judge, kept, spec.tokens)
    with torch.inference_mode():
        outputs = judge(
            list(latents[:, :, None]),
            torch.full((2,), 1 - 0.73125),
            [caption[:length] for caption, length in zip(captions, LENGTHS, strict=True)],
        ).sample
    expected = -torch.stack(outputs)[:, :, 0]
    for hook in hooks:
        hook.remove()
    rows = torch.arange(2)
    tensors = {name: torch.from_numpy(v) for name, v in size_tensors(spec).items()}
    tensors |= {"timesteps": torch.tensor([999.0, 731.25]), "captions": captions}
    tensors |= {"bias": MASKED * (~mask).float(), "caption_rows": rows, "rows": rows}
    tensors["latents"] = latents.reshape(spec.in_patches((2, *spec.latents)))
    total = torch.zeros(())
    for name, kind in graphs_in_order(graph_kinds(spec, "fp32"), spec, judge.state_dict()):
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
            image, text = kept[name]
            assert relative_l2(made["feature"].numpy(), image.flatten(0, 1).numpy()) < 1e-4
            if "feature_text" in made:
                ours = made["feature_text"].reshape(2, spec.caption_tokens, -1)
                for row, padded in enumerate((64, 32)):
                    error = relative_l2(ours[row, :padded].numpy(), text[row, :padded].numpy())
                    assert error < 1e-4
            gated = tensors["gate"].double()[:, None] * made["feature"].double().view_as(total)
            total = total + gated
    found = tensors["prediction"].reshape(expected.shape)
    assert relative_l2(found.numpy(), expected.numpy()) < 1e-4
