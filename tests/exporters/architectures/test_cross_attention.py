"""Families with cross-attention: every unit is that of diffusers; the law of collapsed steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from goc_deploy.conditions.captions import MASKED
from goc_deploy.exporters.architectures.families import ARCHITECTURES
from goc_deploy.exporters.architectures.wan import WAN
from goc_deploy.exporters.architectures.wan_diffusers import spec_of
from goc_deploy.exporters.model_folder import read_model_folder
from tests.exporters.architectures.graph_chain import GraphChain
from tests.exporters.architectures.test_flux import with_outputs
from tests.exporters.architectures.test_pixart import CONFIG as ALPHA
from tests.exporters.architectures.test_pixart_sigma import CHANGES
from tests.exporters.architectures.test_wan import CONFIG as WAN_CONFIG
from tests.reference import relative_l2

TIME = 731.0
SIGMA: dict[str, Any] = {**ALPHA, **CHANGES}
diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself


@dataclass(frozen=True)
class Family:
    """A random model.

    Attributes:
        judge: the model of diffusers.
        graphs: its graphs.
        blocks: name of its list of blocks.
        branches: the layer of each unit of a block.
        shape: shape of the latents of a sample.
        predict: the output of the judge from latents, captions and their mask.
    """

    judge: Any
    graphs: GraphChain
    blocks: str
    branches: dict[str, str]
    shape: tuple[int, ...]
    predict: Callable[[Tensor, Tensor, Tensor], Tensor]


def randomized(judge: Any) -> Any:
    for name, parameter in judge.named_parameters():
        norm = "norm" in name and name.endswith("weight") and parameter.ndim == 1
        parameter.data.normal_(1.0 if norm else 0.0, 0.12)
    return judge.eval().requires_grad_(False)


def wan(folder: Path) -> Family:
    """Odd numbers of tokens of the text and of frames, and frames that are not square."""
    judge = randomized(diffusers.WanTransformer3DModel(**WAN_CONFIG))
    whole = spec_of(3, 3, 24, ffn=100, channels=16, text=32)
    graphs = GraphChain(WAN, replace(whole, caption_tokens=13), judge.state_dict(), folder)

    def predict(latents: Tensor, captions: Tensor, _mask: Tensor) -> Tensor:
        output: Tensor = judge(latents, torch.full((2,), TIME), captions).sample
        return output

    branches = {"attn": "attn1", "cross": "attn2", "mlp": "ffn"}
    return Family(judge, graphs, "blocks", branches, (16, 3, 8, 12), predict)


def pixart(folder: Path, config: dict[str, Any], pipeline: str) -> Family:
    """Captions whose padding is masked."""
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    judge = randomized(diffusers.PixArtTransformer2DModel(**settings))
    judge.save_pretrained(folder / "model" / "transformer")
    (folder / "model" / "model_index.json").write_text(f'{{"_class_name": "{pipeline}"}}')
    found = read_model_folder(folder / "model", ARCHITECTURES)
    family, side = ARCHITECTURES[found.spec.architecture], config["sample_size"]
    graphs = GraphChain(family, found.spec, found.checkpoint.tensors, folder)
    size = {"resolution": torch.full((2, 2), 8.0 * side), "aspect_ratio": torch.ones(2, 1)}

    def predict(latents: Tensor, captions: Tensor, mask: Tensor) -> Tensor:
        output: Tensor = judge(
            latents,
            encoder_hidden_states=captions,
            timestep=torch.full((2,), TIME),
            encoder_attention_mask=mask,
            added_cond_kwargs=size,
        ).sample
        return output

    branches = {"attn": "attn1", "cross": "attn2", "mlp": "ff"}
    return Family(judge, graphs, "transformer_blocks", branches, (4, side, side), predict)


FAMILIES: dict[str, Callable[[Path], Family]] = {
    "wan": wan,
    "pixart": lambda folder: pixart(folder, ALPHA, "PixArtAlphaPipeline"),
    "pixart-sigma": lambda folder: pixart(folder, SIGMA, "PixArtSigmaPipeline"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_unit_is_that_of_diffusers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    family = FAMILIES[name](tmp_path)
    spec, draw = family.graphs.spec, np.random.default_rng(2)
    latents = draw.standard_normal((2, *family.shape), np.float32)
    captions = draw.standard_normal((2, spec.caption_tokens, spec.caption_channels), np.float32)
    mask = np.arange(spec.caption_tokens) < np.array([[5], [spec.caption_tokens]])
    output, seen = with_outputs(
        family.judge, lambda: family.predict(*map(torch.from_numpy, (latents, captions, mask)))
    )
    bias = np.where(mask, 0, MASKED).astype(np.float32)
    found = family.graphs.step(latents, TIME, {"captions": captions, "bias": bias})
    for place, unit in zip(spec.unit_places, spec.unit_names, strict=True):
        block = f"{family.blocks}.{place.block}"
        expected = {"feature": seen[f"{block}.{family.branches[place.branch]}"]}
        if place.branch == "mlp":
            expected["x_out"] = seen[block]
        for result, tensor in expected.items():
            theirs = tensor.numpy().reshape(found[unit][result].shape)
            assert relative_l2(found[unit][result], theirs) < 1e-4, (unit, result)
    prediction = found["final"]["prediction"]
    assert relative_l2(prediction, output.numpy()) < 1e-4
    assert relative_l2(family.graphs.collapsed(found), prediction) < 1e-6
