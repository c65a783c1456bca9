"""The text encoders of Stable Diffusion 3 and FLUX: the embeddings of diffusers, and refusals."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from goc_deploy.api import cpu_backend
from goc_deploy.conditions.text import TextEncoder
from goc_deploy.engine_dir.manifest import Manifest
from goc_deploy.engine_dir.manifest_file import manifest_from_json, manifest_to_json
from goc_deploy.errors import EngineDirError, GocError, ModelError
from goc_deploy.exporters.companions.text_encoders import read_text_encoders, write_text_encoders
from goc_deploy.exporters.unit_files import UnitWriter
from goc_deploy.options import no_progress
from goc_deploy.spec import ModelSpec
from tests.clip_folder import clip, save_tokenizer
from tests.pixart_reference import SPEC
from tests.reference import relative_l2
from tests.t5_folder import save_encoder

diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
transformers = pytest.importorskip(
    "transformers", reason="transformers comes with the judges extra"
)
pytest.importorskip("tokenizers", reason="tokenizers comes with the text extra")

WIDTH, T5_TOKENS = 64, 9
SD3 = replace(SPEC, caption_channels=WIDTH, caption_tokens=77 + T5_TOKENS, pooled_channels=22)
FLUX = replace(SPEC, caption_channels=WIDTH, caption_tokens=T5_TOKENS, pooled_channels=24)
LONG = "the red cat! " * 40
PROMPTS = ("The red cat, 42  dogs' d\u00e9j\u00e0 vu!", "", LONG, "a <|endoftext|> cat")
NEGATIVES = ("seven", "", "the blue three", "a")


def random_weights(encoder: Any, seed: int) -> Any:
    """Weights that are large enough for a wrong layer to matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in encoder.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return encoder


def t5(folder: Path) -> tuple[Any, Any]:
    encoder = save_encoder(folder, vocab_size=160, d_model=WIDTH)
    return (
        transformers.T5EncoderModel.from_pretrained(encoder).eval(),
        transformers.T5Tokenizer.from_pretrained(encoder),
    )


def sd3_pipeline(folder: Path, *, has_t5: bool = True) -> Any:
    """A tiny StableDiffusion3Pipeline; its second CLIP is padded with ``!``."""
    encoder, tokenizer = t5(folder / "t5") if has_t5 else (None, None)
    first = clip("CLIPTextModelWithProjection")
    second = clip(
        "CLIPTextModelWithProjection", hidden_size=32, num_attention_heads=2, hidden_act="gelu",
        projection_dim=12,
    )  # fmt: skip
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=22,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer,
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.AutoencoderKL(latent_channels=16, block_out_channels=(32,)),
        random_weights(first, 1),
        transformers.CLIPTokenizer.from_pretrained(save_tokenizer(folder / "clip")),
        random_weights(second, 2),
        transformers.CLIPTokenizer.from_pretrained(save_tokenizer(folder / "clip_2", pad="!")),
        encoder,
        tokenizer,
    )


def flux_pipeline(folder: Path) -> Any:
    """A tiny FluxPipeline, whose CLIP does not project."""
    encoder, tokenizer = t5(folder / "t5")
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=24,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.AutoencoderKL(latent_channels=16, block_out_channels=(32,)),
        random_weights(clip("CLIPTextModel"), 1),
        transformers.CLIPTokenizer.from_pretrained(save_tokenizer(folder / "clip")),
        encoder,
        tokenizer,
        transformer,
    )


def written(folder: Path, spec: ModelSpec, stage: Path) -> tuple[Manifest, TextEncoder]:
    """The encoders of a pipeline's folder as graphs."""
    stage.mkdir()
    bare = Manifest(spec, "fp32", 2, (), {}, (), (), {})
    writer = UnitWriter(stage, cpu_backend(), no_progress)
    return write_text_encoders(read_text_encoders(folder, spec), bare, writer)


def as_on_the_hub(folder: Path, originals: Path) -> None:
    """Replace the tokenizers that transformers saved by their original files."""
    for name, original in (("tokenizer", "clip"), ("tokenizer_2", "clip_2")):
        if (originals / original).is_dir():
            shutil.rmtree(folder / name)
            shutil.copytree(originals / original, folder / name)


@pytest.mark.parametrize(("has_t5", "original_tokenizers"), [(True, True), (False, False)])
def test_captions_of_stable_diffusion_3_are_those_of_diffusers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, has_t5: bool, original_tokenizers: bool
) -> None:
    judge = sd3_pipeline(tmp_path, has_t5=has_t5)
    judge.save_pretrained(tmp_path / "model")
    if original_tokenizers:
        as_on_the_hub(tmp_path / "model", tmp_path)
    manifest, encoder = written(tmp_path / "model", SD3, tmp_path / "stage")
    assert max(unit.relative_l2 or 0 for unit in manifest.graphs) < 1e-4
    assert (manifest.text is not None) == has_t5
    assert [(of.tokens, of.pooled, of.width) for of in manifest.clip] == [
        (77, 10, 24),
        (77, 12, 32),
    ]
    with torch.inference_mode():
        expected = judge.encode_prompt(
            list(PROMPTS), None, None, device="cpu", negative_prompt=list(NEGATIVES),
            max_sequence_length=T5_TOKENS,
        )  # fmt: skip
    embeds, negative, pooled, negative_pooled = (tensor.numpy() for tensor in expected)
    with caplog.at_level(logging.WARNING):
        found = encoder.prompt_embeds(PROMPTS, NEGATIVES)
    assert found.negatives is not None
    for captions, of_tokens, of_text in (
        (found.prompts, embeds, pooled),
        (found.negatives, negative, negative_pooled),
    ):
        assert relative_l2(captions.embeds, of_tokens) < 1e-4
        assert relative_l2(captions.pooled, of_text) < 1e-4
        assert captions.mask.all()
    assert captions.pooled.dtype == captions.embeds.dtype == np.float32
    assert "clip_1 takes 77; left out:" in caplog.text
    assert ("the model takes 9; left out:" in caplog.text) == has_t5


def test_captions_of_flux_are_those_of_diffusers(tmp_path: Path) -> None:
    judge = flux_pipeline(tmp_path)
    judge.save_pretrained(tmp_path / "model")
    as_on_the_hub(tmp_path / "model", tmp_path)
    manifest, encoder = written(tmp_path / "model", FLUX, tmp_path / "stage")
    assert [(of.pooled, of.width) for of in manifest.clip] == [(24, 0)]
    with torch.inference_mode():
        embeds, pooled, _ = judge.encode_prompt(
            list(PROMPTS), None, device="cpu", max_sequence_length=T5_TOKENS
        )
    found = encoder.prompt_embeds(PROMPTS)
    assert relative_l2(found.prompts.embeds, embeds.numpy()) < 1e-4
    assert relative_l2(found.prompts.pooled, pooled.numpy()) < 1e-4
    alone = encoder.prompt_embeds(PROMPTS[:1]).prompts
    np.testing.assert_allclose(alone.embeds[0], found.prompts.embeds[0], atol=1e-5)


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    flux_pipeline(folder).save_pretrained(folder / "model")
    as_on_the_hub(folder / "model", folder)
    return folder / "model"


def changed_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def without_a_tensor(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if name.endswith("final_layer_norm.bias")))
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("damage", "spec", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), FLUX, "has no model_index.json; the model"),
        (lambda f: shutil.rmtree(f / "text_encoder"), FLUX, r"width 0 \(there is no CLIP\)"),
        (lambda f: shutil.rmtree(f / "text_encoder_2"), FLUX, "and there is no T5, but the model"),
        (lambda _: None, replace(FLUX, pooled_channels=25), r"width 24 \(clip_1 24\), but .* 25"),
        (
            lambda _: None,
            replace(FLUX, caption_channels=63),
            "embeddings of width 64 but the model",
        ),
        (without_a_tensor, FLUX, "final_layer_norm.bias"),
        (lambda f: (f / "tokenizer" / "merges.txt").unlink(), FLUX, "vocab.json and merges.txt"),
        (
            lambda f: (f / "tokenizer" / "merges.txt").write_text("a b c\n"),
            FLUX,
            "two parts of a word in each line",
        ),
        (
            lambda f: changed_json(f / "tokenizer" / "tokenizer_config.json", model_max_length=8),
            FLUX,
            "model_max_length is 8, but the text encoder reads 77",
        ),
        (
            lambda f: changed_json(f / "tokenizer" / "tokenizer_config.json", pad_token="<pad>"),
            FLUX,
            "special token '<pad>' is not in vocab.json",
        ),
        (
            lambda f: shutil.copy(f / "tokenizer_2" / "tokenizer.json", f / "tokenizer"),
            FLUX,
            "tokenizer.json is not the tokenizer of a CLIP",
        ),
        (
            lambda f: changed_json(f / "text_encoder" / "config.json", hidden_act="relu"),
            FLUX,
            "hidden_act is 'relu'",
        ),
        (
            lambda f: changed_json(f / "text_encoder" / "config.json", eos_token_id=7),
            FLUX,
            "eos_token_id is 7, but .* ends a text with token",
        ),
        (
            lambda f: changed_json(f / "text_encoder" / "config.json", num_attention_heads=5),
            FLUX,
            "hidden_size must be a multiple of num_attention_heads",
        ),
    ],
)
def test_encoders_that_do_not_fit_are_refused(
    flux_folder: Path,
    tmp_path: Path,
    damage: Callable[[Path], Any],
    spec: ModelSpec,
    message: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(flux_folder, folder)
    damage(folder)
    with pytest.raises(ModelError, match=message):
        read_text_encoders(folder, spec)


def test_a_manifest_whose_clips_do_not_fit_is_refused(flux_folder: Path) -> None:
    clips = read_text_encoders(flux_folder, FLUX).clip_specs
    for wrong, message in (
        (replace(clips[0], pooled=23), "expected pooled embeddings of width 24, got 23"),
        (replace(clips[0], width=65), "expected embeddings of width <= 64, got 65"),
        (replace(clips[0], width=24), "expected at most 9 tokens, got 77"),
    ):
        manifest = Manifest(FLUX, "fp32", 2, (), {}, (), (), {}, clip=(wrong,))
        with pytest.raises(GocError, match=message) as error:
            manifest_from_json(manifest_to_json(manifest).encode(), "m")
        assert error.type is EngineDirError
