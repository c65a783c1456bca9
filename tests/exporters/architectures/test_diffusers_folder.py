"""Folders that diffusers saves: the same numbers as diffusers, and refusals by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import goc_deploy
from benchmarks.diffusers_state import diffusers_state
from benchmarks.make_checkpoint import random_state
from goc_deploy.errors import GocError, ModelError, SafetyError, UsageError
from goc_deploy.exporters.architectures.dit import DIT
from goc_deploy.exporters.architectures.dit_model import DiT
from goc_deploy.exporters.architectures.families import ARCHITECTURES
from goc_deploy.exporters.model_folder import FolderModel, read_model_folder
from goc_deploy.spec import ModelSpec
from tests.conftest import Command
from tests.reference import relative_l2

SPEC = ModelSpec(
    2, 48, 3, 192, 2, 4, 4, 1000, True, frequency_shift=1, mlp_norm_eps=1e-5, guided_channels=4
)
CONFIG = {
    "_class_name": "DiTTransformer2DModel",
    "_diffusers_version": "0.42.1",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 16,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 3,
    "num_embeds_ada_norm": 1000,
    "num_layers": 2,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 8,
    "upcast_attention": False,
}
NAMES = {str(i): f"thing {i}, item {i}" for i in range(1000)}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def state() -> dict[str, torch.Tensor]:
    return diffusers_state(random_state(SPEC, 0), SPEC)


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def save_weights(folder: Path, tensors: dict[str, torch.Tensor], name: str = WEIGHTS) -> None:
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, folder / name)


def save_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Two files and their index, in place of the one file."""
    (folder / WEIGHTS).unlink(missing_ok=True)
    names = sorted(tensors)
    files = {
        "model-00001-of-00002.safetensors": names[:20],
        "model-00002-of-00002.safetensors": names[20:],
    }
    for file, part in files.items():
        save_weights(folder, {name: tensors[name] for name in part}, file)
    places = {name: file for file, part in files.items() for name in part}
    (folder / f"{WEIGHTS}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    return places


def read_folder(path: Path) -> FolderModel:
    return read_model_folder(path, {"dit": DIT})


@pytest.fixture
def pipeline_folder(tmp_path: Path) -> Path:
    """A DiTPipeline folder as diffusers writes it."""
    folder = tmp_path / "pipeline"
    (folder / "transformer").mkdir(parents=True)
    write_config(folder / "transformer")
    save_weights(folder / "transformer", state())
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "DiTPipeline", "id2label": NAMES})
    )
    return folder


def test_a_pipeline_folder_its_transformer_and_shards_hold_the_same_model(
    pipeline_folder: Path,
) -> None:
    whole = read_folder(pipeline_folder)
    assert whole.spec == SPEC
    assert whole.class_names[207] == "thing 207, item 207"
    alone = read_folder(pipeline_folder / "transformer")
    assert (alone.spec, alone.class_names) == (SPEC, ())
    save_shards(pipeline_folder / "transformer", state())
    shards = read_folder(pipeline_folder)
    assert len(shards.checkpoint.files) == 5
    expected = random_state(SPEC, 0)
    for found in (whole, alone, shards):
        DIT.check_tensors(found.checkpoint.tensors, SPEC)
        for name, tensor in found.checkpoint.tensors.items():
            if name != "pos_embed":  # which diffusers computes and does not save
                assert torch.equal(tensor, expected[name]), name


def test_settings_that_old_files_leave_out_are_those_of_diffusers(pipeline_folder: Path) -> None:
    folder = pipeline_folder / "transformer"
    old = {
        k: v
        for k, v in CONFIG.items()
        if k not in ("norm_eps", "upcast_attention", "num_embeds_ada_norm")
    }
    old |= {
        "_class_name": "Transformer2DModel",
        "cross_attention_dim": None,
        "num_vector_embeds": None,
    }
    (folder / "config.json").write_text(json.dumps(old))
    assert read_folder(folder).spec == SPEC


def read_and_check(folder: Path) -> None:
    found = read_folder(folder)
    DIT.check_tensors(found.checkpoint.tensors, found.spec)


def refused(folder: Path, error: type[GocError], message: str) -> None:
    with pytest.raises(error, match=message):
        read_and_check(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 1e4}, "setting 'rope_theta' that this version does not know"),
        (
            {"norm_type": "ada_norm_single"},
            "norm_type is 'ada_norm_single', only 'ada_norm_zero' is supported",
        ),
        ({"activation_fn": "geglu"}, "activation_fn is 'geglu'"),
        ({"attention_bias": False}, "attention_bias is False, only True"),
        ({"upcast_attention": True}, "upcast_attention is True, only False"),
        (
            {"_class_name": "PixArtTransformer2DModel"},
            "is of a PixArtTransformer2DModel with norm_type 'ada_norm_zero'",
        ),
        ({"num_layers": 0}, r"config.json: \$\.num_layers: expected int >= 1, got 0"),
        ({"num_layers": "2"}, r"\$\.num_layers: expected int, got '2'"),
        ({"num_layers": 10**4}, "num_layers is 10000, at most"),
        ({"out_channels": 5}, r"out_channels is 5, expected 4 or 8 \(with sigma\)"),
        ({"sample_size": 9}, "sample_size must be a multiple of patch_size, got 9 and 2"),
        ({"sample_size": 8000}, "sample_size is 8000, at most 512 is supported"),
        ({"attention_head_dim": 1}, "3 heads of 1 .* must be a multiple of 4, a sine and a cosine"),
        ({"attention_head_dim": 10**5}, "at most 32768"),
        ({"norm_eps": 0}, r"\$\.norm_eps: expected float > 0.0, got 0"),
        ({"num_layers": 3}, "tensors missing: transformer_blocks.2"),
        ({"num_layers": 1}, "tensors unexpected: transformer_blocks.1"),
        ({"attention_head_dim": 32}, "of another shape: pos_embed|of another shape: x_embedder"),
        (
            {"num_embeds_ada_norm": 10},
            r"id2label must name each of the model's 10 classes by its number, it has 1000",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(
    pipeline_folder: Path, changes: dict[str, Any], message: str
) -> None:
    write_config(pipeline_folder / "transformer", **changes)
    refused(pipeline_folder, ModelError, message)


def test_class_counts_that_differ_are_refused(pipeline_folder: Path) -> None:
    write_config(pipeline_folder / "transformer", num_embeds_ada_norm=10)
    refused(
        pipeline_folder / "transformer",
        ModelError,
        "y_embedder.embedding_table.weight .1001, 48., expected .11, 48.",
    )
    write_config(pipeline_folder / "transformer")
    (pipeline_folder / "model_index.json").write_text(
        '{"_class_name": "DiTPipeline", "id2label": {"0": "tench"}}'
    )
    refused(
        pipeline_folder,
        ModelError,
        "each of the model's 1000 classes by its number, it has 1 entries",
    )


def _lie(folder: Path) -> None:
    """A header that claims more than the file holds."""
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], object], type[GocError], str]] = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        ModelError,
        "has no config.json; give a .pt",
    ),
    "config is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        ModelError,
        "config.json is not valid JSON",
    ),
    "no weights": (
        lambda f: (f / WEIGHTS).unlink(),
        ModelError,
        "neither diffusion_pytorch_model.safetensors, its index",
    ),
    "header lies": (_lie, ModelError, "not a sound safetensors file"),
    "own embedders in part": (
        lambda f: save_weights(
            f,
            {
                k: t + ("1.norm1.emb.class" in k)
                for k, t in state().items()
                if k != "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
            },
        ),
        ModelError,
        "1 tensors missing: transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias",
    ),
    "index without map": (
        lambda f: (f / f"{WEIGHTS}.index.json").write_text("{}"),
        ModelError,
        r"\$\.weight_map: required field is missing",
    ),
    "index leaves": (
        lambda f: (f / f"{WEIGHTS}.index.json").write_text(
            '{"weight_map": {"a": "../x.safetensors"}}'
        ),
        SafetyError,
        r"names a file outside its folder: '../x.safetensors'",
    ),
    "shard lost": (
        lambda f: (save_shards(f, state()), (f / "model-00002-of-00002.safetensors").unlink()),
        ModelError,
        "model-00002-of-00002.safetensors' cannot be read",
    ),
    "index lies": (
        lambda f: (
            places := save_shards(f, state()),
            (f / f"{WEIGHTS}.index.json").write_text(
                json.dumps({"weight_map": {**places, "more": "model-00001-of-00002.safetensors"}})
            ),
        ),
        ModelError,
        "does not hold the tensors that .* lists for it, see more",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused(pipeline_folder: Path, damage: str) -> None:
    change, error, message = DAMAGE[damage]
    change(pipeline_folder / "transformer")
    refused(pipeline_folder, error, message)


def test_other_pipelines_are_refused(pipeline_folder: Path) -> None:
    (pipeline_folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    refused(
        pipeline_folder,
        ModelError,
        "holds a StableDiffusionPipeline; this version exports DiTPipeline",
    )


def test_a_transformer_of_another_class_is_refused_and_the_others_are_named(tmp_path: Path) -> None:
    write_config(tmp_path, _class_name="SanaTransformer2DModel", norm_type=None)
    message = (
        "is of a SanaTransformer2DModel; this version exports DiTTransformer2DModel, "
        "PixArtTransformer2DModel, .*WanTransformer3DModel, "
    )
    with pytest.raises(ModelError, match=message):
        read_model_folder(tmp_path, ARCHITECTURES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 4}, "`num_heads=4`: the configuration in .* says 3"),
        ({"weights": "ema"}, "`weights=ema` is for training checkpoints"),
    ],
)
def test_options_that_contradict_the_folder_are_refused(
    pipeline_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        goc_deploy.export(pipeline_folder, pipeline_folder.parent / "engine", **options)


def test_class_names_are_labels_of_the_command_line(
    pipeline_folder: Path, command: Command, tmp_path: Path
) -> None:
    engine, out = tmp_path / "engine", tmp_path / "x.npy"
    command("goc-export", pipeline_folder, "-o", engine, "--plan", "none", "--steps", 2)
    command("goc-run", engine, "--labels", "Thing 3,207", "--latents-output", out)
    named = np.load(out)
    command("goc-run", engine, "--labels", "3,207", "--latents-output", out)
    np.testing.assert_array_equal(np.load(out), named)
    done = command("goc-run", engine, "--labels", "thing", code=2)
    assert "label 'thing' is not the name of a class" in done.stderr


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
def test_an_exported_folder_draws_what_the_pipeline_of_diffusers_draws(tmp_path: Path) -> None:
    """A random model, saved by diffusers: units against its blocks, then the whole loop.

    The loop has diffusers' own DDIM.
    """
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    from benchmarks.diffusers_dit import KeepLatents

    config = {k: v for k, v in CONFIG.items() if not k.startswith("_")}
    transformer = diffusers.DiTTransformer2DModel(**config).eval()
    transformer.load_state_dict(state(), strict=False)  # with embedders that the blocks share
    transformer.save_pretrained(tmp_path / "model" / "transformer", max_shard_size="100KB")
    index = {"_class_name": "DiTPipeline", "id2label": NAMES}
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    manifest = goc_deploy.export(
        tmp_path / "model",
        tmp_path / "engine",
        plans=("none",),
        sampler="ddim@leading",
        steps=5,
        max_batch=2,
    )
    assert max(unit.relative_l2 or 0 for unit in manifest.graphs) < 1e-4

    model = DiT(SPEC).eval()
    model.load_state_dict(read_folder(tmp_path / "model").checkpoint.tensors)
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([999.0, 7.0]), torch.tensor([3, 1000])
    features: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for blocks in (transformer.transformer_blocks, model.blocks):
        mine = blocks is model.blocks
        for block in blocks:
            for unit in (block.attn, block.mlp) if mine else (block.attn1, block.ff):
                unit.register_forward_hook(
                    lambda _m, _i, out, kept=features[mine]: kept.append(out)
                )
    with torch.inference_mode():
        theirs = transformer(x, timestep=t, class_labels=labels).sample
        assert relative_l2(model(x, t, labels).numpy(), theirs.numpy()) < 1e-5
    for found, expected in zip(features[True], features[False], strict=True):
        assert relative_l2(found.numpy(), expected.numpy()) < 1e-4

    scheduler = diffusers.DDIMScheduler(clip_sample=False, beta_start=1e-4, beta_end=0.02)
    vae = KeepLatents()
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    pipe(
        [3, 207],
        guidance_scale=4.0,
        num_inference_steps=5,
        generator=torch.Generator().manual_seed(4),
    )
    with goc_deploy.load(tmp_path / "engine") as ours:
        found = ours.generate([3, 207], cfg_scale=4.0, latents=noise.numpy())
    assert relative_l2(found.latents, vae.latents.numpy()) < 1e-3
    assert manifest.class_names == tuple(NAMES.values())
    assert np.isfinite(found.latents).all()


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_may_own_their_embedders_as_models_trained_in_diffusers_do(
    tmp_path: Path, precision: str
) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    torch.manual_seed(1)
    transformer = diffusers.DiTTransformer2DModel(
        **{k: v for k, v in CONFIG.items() if not k.startswith("_")}
    ).eval()
    for name, parameter in transformer.named_parameters():
        parameter.data = (
            0.3 * torch.randn_like(parameter) if ".emb." in name else parameter.data + 0.05
        )
    transformer.save_pretrained(tmp_path / "model")
    manifest = goc_deploy.export(
        tmp_path / "model",
        tmp_path / "engine",
        plans=("none", "fora:2"),
        steps=4,
        precision=precision,
    )
    assert manifest.model == replace(SPEC, block_embedders=True)
    if precision == "bf16":  # for which ONNX Runtime has no kernels on a CPU
        return
    model = DiT(manifest.model).eval()
    model.load_state_dict(read_folder(tmp_path / "model").checkpoint.tensors)
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([999.0, 7.0]), torch.tensor([3, 1000])
    with torch.inference_mode():
        expected = transformer(x, timestep=t, class_labels=labels).sample.numpy()
        assert relative_l2(model(x, t, labels).numpy(), expected) < 1e-5
    with goc_deploy.load(tmp_path / "engine", plan="none") as pipe:
        found = pipe.generate([3, 207], cfg_scale=3.0, latents=x.numpy(), trajectory=True).latents
        table, now = pipe.plan.sampler, x
    with torch.inference_mode():
        for k, told in enumerate(table.timesteps):
            rows, both = torch.tensor([3, 207, 1000, 1000]), torch.cat([now, now])
            cond, uncond = (
                transformer(both, timestep=torch.full((4,), told), class_labels=rows)
                .sample[:, :4]
                .chunk(2)
            )
            now = table.latent[k] * now + table.model[k] * (uncond + 3.0 * (cond - uncond))
    assert relative_l2(found, now.numpy()) < 1e-4


def test_variants_in_half_precision_are_read_where_there_is_nothing_else(
    pipeline_folder: Path,
) -> None:
    folder = pipeline_folder / "transformer"
    half = {name: tensor.half() for name, tensor in state().items()}
    save_weights(folder, half, "diffusion_pytorch_model.fp16.safetensors")
    assert read_folder(folder).checkpoint.dtypes == {
        "float32": len(read_folder(folder).checkpoint.tensors)
    }
    (folder / WEIGHTS).unlink()
    found = read_folder(folder).checkpoint
    assert found.files[-1].name == "diffusion_pytorch_model.fp16.safetensors"
    assert torch.equal(found.tensors["x_embedder.proj.weight"], half["pos_embed.proj.weight"])
    (folder / "diffusion_pytorch_model.fp16.safetensors").unlink()
    save_weights(folder, half, "part.safetensors")
    places = dict.fromkeys(half, "part.safetensors")
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(
        json.dumps({"weight_map": places})
    )
    assert read_folder(folder).checkpoint.tensors.keys() == found.tensors.keys()
