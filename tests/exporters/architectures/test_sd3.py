"""Stable Diffusion 3: the features and latents of diffusers at several sizes, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from goc_deploy.exporters.architectures.sd3 import SD3
from goc_deploy.exporters.model_folder import read_model_folder
from goc_deploy.spec import ModelSpec
from tests.exporters.architectures.graph_chain import Arrays, GraphChain
from tests.reference import relative_l2

CONFIG: dict[str, Any] = {
    "sample_size": 12,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 9,
    "dual_attention_layers": (0, 1),
    "qk_norm": "rms_norm",
}
# As SD3 Medium, without norms; that the last block is dual is no public model.
WITHOUT_NORMS = {**CONFIG, "dual_attention_layers": (1,), "qk_norm": None, "num_layers": 2}
WEIGHTS = "diffusion_pytorch_model.safetensors"
WORDS = 7
SIZES = [(4, 6), (9, 3), (1, 1)]  # tokens per column and row
diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers about itself


def judge_of(config: dict[str, Any]) -> Any:
    """A random model of diffusers."""
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(**config).eval()
    for name, parameter in model.named_parameters():
        norm = "norm_" in name and parameter.ndim == 1 and "linear" not in name
        parameter.data.normal_(1.0 if norm else 0.0, 0.2)
    return model


@pytest.fixture(scope="module")
def judge() -> Any:
    return judge_of(CONFIG)


@pytest.fixture(scope="module")
def chain(judge: Any, tmp_path_factory: pytest.TempPathFactory) -> GraphChain:
    return chain_of(judge, tmp_path_factory.mktemp("chain"))


def chain_of(judge: Any, folder: Path) -> GraphChain:
    """The graphs of a model of diffusers, for captions of `WORDS` tokens."""
    judge.save_pretrained(folder / "transformer")
    model = read_model_folder(folder / "transformer", {"sd3": SD3})
    SD3.check_tensors(model.checkpoint.tensors, model.spec)
    spec = replace(model.spec, caption_tokens=WORDS)
    return GraphChain(SD3, spec, model.checkpoint.tensors, folder)


def arrays(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Two captions and their pooled embeddings."""
    draw = np.random.default_rng(1).standard_normal
    return {
        "captions": draw((2, WORDS, spec.caption_channels)).astype(np.float32),
        "pooled": draw((2, spec.pooled_channels)).astype(np.float32),
    }


def judged(
    judge: Any, latents: np.ndarray, timestep: float, given: dict[str, np.ndarray], rows: Any
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The prediction of diffusers, and its features as ``UNIT FEATURE``."""
    features: dict[str, np.ndarray] = {}

    def keep(*names: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            for name, tensor in zip(names, outputs, strict=False):
                features[name] = tensor.flatten(0, 1).numpy()

        return hook

    hooks = []
    for i, block in enumerate(judge.transformer_blocks):
        attn, mlp = f"block_{i:02d}_attn", f"block_{i:02d}_mlp"
        last = i == len(judge.transformer_blocks) - 1
        of_text = () if last else (f"{attn} feature_text",)
        hooks.append(block.attn.register_forward_hook(keep(f"{attn} feature", *of_text)))
        hooks.append(block.ff.register_forward_hook(keep(f"{mlp} feature")))
        if block.attn2 is not None:
            hooks.append(block.attn2.register_forward_hook(keep(f"{attn} feature_2")))
        if not last:
            hooks.append(block.ff_context.register_forward_hook(keep(f"{mlp} feature_text")))
    with torch.inference_mode():
        output = judge(
            torch.from_numpy(latents),
            torch.from_numpy(given["captions"])[rows],
            torch.from_numpy(given["pooled"])[rows],
            torch.full((len(latents),), timestep),
        ).sample.numpy()
    for handle in hooks:
        handle.remove()
    return output, features


def compared(judge: Any, chain: GraphChain, grid: tuple[int, int]) -> dict[str, Arrays]:
    """Run graphs and diffusers at a size and compare every feature and the prediction."""
    spec, rows, given = chain.spec.at(grid), np.array([1, 0, 1]), arrays(chain.spec)
    latents = np.random.default_rng(2).standard_normal((3, *spec.latents)).astype(np.float32)
    found = chain.step(latents, 417.5, given, rows)
    expected, features = judged(judge, latents, 417.5, given, rows)
    declared = zip(spec.unit_names, spec.declared_units, strict=True)
    assert features.keys() == {
        f"{name} {feature.output}" for name, unit in declared for feature in unit.features
    }
    for name, feature in features.items():
        unit, output = name.split()
        assert relative_l2(found[unit][output], feature) < 1e-4, name
    assert relative_l2(found["final"]["prediction"], expected) < 1e-4
    return found


@pytest.mark.parametrize("grid", SIZES)
def test_every_feature_is_that_of_diffusers(
    judge: Any, chain: GraphChain, grid: tuple[int, int]
) -> None:
    compared(judge, chain, grid)
    assert all((entry.relative_l2 or 0) < 1e-4 for entry in chain.entries)


def test_models_without_norms_are_those_of_diffusers(tmp_path: Path) -> None:
    judge = judge_of(WITHOUT_NORMS)
    compared(judge, chain_of(judge, tmp_path), (3, 5))


def test_the_output_is_the_final_layer_of_a_sum(judge: Any, chain: GraphChain) -> None:
    """The law of a collapsed step: tokens after the blocks = tokens + sum of gate * feature.

    Only features of the image are added, so a collapsed step does not need the text.
    """
    found = compared(judge, chain, (4, 6))
    assert relative_l2(chain.collapsed(found), found["final"]["prediction"]) < 1e-6
