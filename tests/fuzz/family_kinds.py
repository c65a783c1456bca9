"""Kinds of mutants of what the families of models differ in.

They are settings, LoRAs, captions, tokenizers of CLIP, and plans and manifests of models with two
token streams or two sets of weights.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as save_arrays
from safetensors.torch import save as save_tensors

from goc_deploy.blocks import IMAGE_FEATURE, STREAMS, TEXT_FEATURE, Blocks, Unit
from goc_deploy.compiler import check_plan, compile_for_host
from goc_deploy.compiler.agreement import check_agreement
from goc_deploy.compiler.plan_file import plan_from_json, plan_to_json
from goc_deploy.conditions.captions import prompt_embeds_from_arrays
from goc_deploy.conditions.tensor_files import arrays_from_file
from goc_deploy.engine_dir.manifest import FileEntry, LoraEntry
from goc_deploy.engine_dir.manifest_file import manifest_from_json, manifest_to_json
from goc_deploy.errors import EngineDirError, ModelError
from goc_deploy.exporters.architectures.families import ARCHITECTURES
from goc_deploy.exporters.companions.clip import clip_config
from goc_deploy.exporters.companions.clip_tokenizer import read_clip_tokenizer
from goc_deploy.exporters.companions.wan_vae_config import (
    QWEN_VAE_CLASS,
    WAN_VAE_CLASS,
    wan_vae_config,
)
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.runtime.picture_files import PictureFiles, finished_pictures
from goc_deploy.samplers import SamplerTable, sampler_table
from goc_deploy.samplers.process import Process
from goc_deploy.schedule.schedule import schedule_from_json, schedule_to_json
from goc_deploy.sharded.job import Job, job_from_json, job_to_json
from goc_deploy.spec import ClipSpec, ModelSpec
from goc_deploy.strict_json import parse_json
from tests import clip_folder
from tests.exporters.lora.files import STATE, merged_with, random_lora
from tests.fuzz.mutations import (
    Mutation,
    mutated_archive,
    mutated_bytes,
    mutated_json,
    mutated_safetensors,
)
from tests.goc_deploy.engine_dir.test_manifest_file import MANIFEST

Trial = Callable[[random.Random], object]
STEPS = 6
FLOW = "flow_to_noise"
CONFIGS: dict[str, dict[str, Any]] = {
    "pixart": {
        "_class_name": "PixArtTransformer2DModel", "norm_type": "ada_norm_single",
        "num_attention_heads": 3, "attention_head_dim": 16, "cross_attention_dim": 48,
        "caption_channels": 20, "in_channels": 4, "out_channels": 8, "num_layers": 2,
        "sample_size": 8, "patch_size": 2,
    },
    "wan": {
        "_class_name": "WanTransformer3DModel", "num_attention_heads": 3,
        "attention_head_dim": 24, "text_dim": 32, "ffn_dim": 100, "num_layers": 3,
    },
    "sd3": {
        "_class_name": "SD3Transformer2DModel", "sample_size": 12, "num_layers": 3,
        "attention_head_dim": 8, "num_attention_heads": 3, "joint_attention_dim": 20,
        "caption_projection_dim": 24, "pooled_projection_dim": 10, "pos_embed_max_size": 9,
        "dual_attention_layers": [0, 1], "qk_norm": "rms_norm",
    },
    "flux": {
        "_class_name": "FluxTransformer2DModel", "in_channels": 12, "num_layers": 2,
        "num_single_layers": 3, "attention_head_dim": 24, "num_attention_heads": 3,
        "joint_attention_dim": 20, "pooled_projection_dim": 28, "guidance_embeds": True,
        "axes_dims_rope": [4, 8, 12],
    },
    "flux2": {
        "_class_name": "Flux2Transformer2DModel", "in_channels": 12, "num_layers": 2,
        "num_single_layers": 3, "attention_head_dim": 24, "num_attention_heads": 3,
        "joint_attention_dim": 20, "guidance_embeds": False, "axes_dims_rope": [4, 8, 6, 6],
    },
    "qwen-image": {
        "_class_name": "QwenImageTransformer2DModel", "num_attention_heads": 3,
        "attention_head_dim": 32, "axes_dims_rope": [4, 14, 14], "joint_attention_dim": 40,
        "num_layers": 3,
    },
    "z-image": {
        "_class_name": "ZImageTransformer2DModel", "dim": 288, "n_layers": 3,
        "n_refiner_layers": 2, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 40,
        "axes_dims": [24, 36, 36], "axes_lens": [1024, 64, 64],
    },
}  # fmt: skip
VIDEO_VAE: dict[str, Any] = {
    "attn_scales": [], "base_dim": 4, "decoder_base_dim": 6, "dim_mult": [1, 2, 4, 4],
    "in_channels": 12, "is_residual": True, "latents_mean": [0.1, -0.2], "out_channels": 12,
    "latents_std": [1.5, 0.5], "num_res_blocks": 1, "patch_size": 2,
    "temperal_downsample": [False, True, True], "z_dim": 2,
}  # fmt: skip
CLIP = {
    "model_type": "clip_text_model", "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3,
    "num_hidden_layers": 3, "vocab_size": 600, "projection_dim": 10, "eos_token_id": 2,
    "max_position_embeddings": 77, "hidden_act": "gelu",
}  # fmt: skip
BOTH = (IMAGE_FEATURE, TEXT_FEATURE)
JOINT = tuple(Unit(branch, features=BOTH, reads=STREAMS) for branch in ("attn", "mlp"))
TWO_STREAMS = (
    Blocks(2, JOINT),
    Blocks(1, (Unit("attn", features=(IMAGE_FEATURE,), reads=STREAMS), Unit("mlp"))),
)
POOLED = ModelSpec(
    3, 8, 2, 16, 2, (3, 2), 4, 1, False, branches=("attn", "mlp"), caption_channels=3,
    caption_tokens=5, pooled_channels=6, blocks=TWO_STREAMS, prediction_type=FLOW,
)  # fmt: skip
TABLE = sampler_table("euler", STEPS, Process(FLOW))
# Its second set of weights begins at step 3.
TWO_SETS = ModelSpec(
    2, 8, 2, 16, 2, 2, 4, 10, False, prediction_type=FLOW, boundary=TABLE.timesteps[3] / 1000 + 0.05
)
EMBEDS = {
    "prompt_embeds": np.ones((2, 4, 3), np.float32),
    "prompt_attention_mask": np.array([[1, 1, 1, 0], [1, 1, 0, 0]]),
    "pooled_prompt_embeds": np.ones((2, 6), np.float32),
    "negative_prompt_embeds": np.zeros((1, 5, 3), np.float32),
    "negative_pooled_prompt_embeds": np.zeros((1, 6), np.float32),
}
RECORD = {"seed": 1, "label": 3}
OF_FAMILIES = replace(
    MANIFEST,
    model=replace(
        MANIFEST.model,
        choices=1,
        branches=("attn", "cross", "mlp"),
        caption_channels=24,
        caption_tokens=80,
        pooled_channels=10,
    ),
    segments={},
    class_names=(),
    loras=(LoraEntry("a.safetensors", "0f" * 32, 0.5, "tensors", (4, 8), 3),),
    clip=(ClipSpec("clip_1/tokenizer.json", 600, 599, 599, 77, 10, 24),),
    files=(*MANIFEST.files, FileEntry("clip_1/tokenizer.json", 9, "0f" * 32)),
)


def _written(write: Callable[[io.BytesIO], object]) -> bytes:
    memory = io.BytesIO()
    write(memory)
    return memory.getvalue()


def _file(path: Path, content: bytes, mutation: Mutation, read: Callable[[Path], object]) -> Trial:
    path.parent.mkdir(parents=True, exist_ok=True)

    def trial(generator: random.Random) -> None:
        path.write_bytes(mutation(content, generator))
        read(path)

    return trial


def _one_of(*trials: Trial) -> Trial:
    return lambda generator: generator.choice(trials)(generator)


def family_trials(folder: Path) -> dict[str, Trial]:
    """Kind of file -> a function that makes a mutant in a folder and reads it as commands do."""
    return {**_setting_trials(folder), **_tensor_trials(folder), **_record_trials(folder)}


def _setting_trials(folder: Path) -> dict[str, Trial]:
    def family(generator: random.Random) -> None:
        name = generator.choice(sorted(CONFIGS))
        content = mutated_json(json.dumps(CONFIGS[name]).encode(), generator)
        found = ARCHITECTURES[name].folder
        assert found is not None
        spec = found.spec_from_config(parse_json(content, name, ModelError), name)
        compile_for_host(schedule_from_policy(parse_policy("fora:2"), spec, 2), spec, "euler")

    def video_vae(generator: random.Random) -> None:
        kind = generator.choice((WAN_VAE_CLASS, QWEN_VAE_CLASS))
        content = mutated_json(json.dumps({"_class_name": kind, **VIDEO_VAE}).encode(), generator)
        wan_vae_config(parse_json(content, "vae", ModelError), "vae", kind)

    def clip(generator: random.Random) -> None:
        content = mutated_json(json.dumps(CLIP).encode(), generator)
        clip_config(parse_json(content, "clip", ModelError), "clip")

    def clip_tokenizer(generator: random.Random) -> None:
        path = clip_folder.save_tokenizer(folder / "clip")
        name = generator.choice(("vocab.json", "merges.txt", "tokenizer_config.json"))
        mutation = mutated_bytes if name == "merges.txt" else mutated_json
        (path / name).write_bytes(mutation((path / name).read_bytes(), generator))
        read_clip_tokenizer(path, CLIP["vocab_size"], CLIP["max_position_embeddings"])  # type: ignore[arg-type]

    def smoothcache(path: Path) -> None:
        schedule_from_policy(parse_policy(f"smoothcache:{path}"), TWO_SETS, STEPS)

    actions = json.dumps({"attn": [1, 0] * 3, "mlp": [1, 1, 0] * 2}).encode()
    return {
        "family config": family,
        "video vae config": video_vae,
        "clip config": clip,
        "clip tokenizer": clip_tokenizer,
        "smoothcache file": _file(folder / "smooth.json", actions, mutated_json, smoothcache),
    }


def _tensor_trials(folder: Path) -> dict[str, Trial]:
    def merge(path: Path) -> None:
        merged = merged_with(path)
        for name in STATE:
            merged[name]

    def embeds(path: Path) -> None:
        prompt_embeds_from_arrays(arrays_from_file(path), POOLED, str(path))

    file, _ = random_lora("kohya", rank=2)
    ups = [name for name in file if name.endswith("lora_up.weight")]
    file |= {name.replace("lora_up.weight", "alpha"): torch.tensor(1.0) for name in ups}
    safe, torchs = save_tensors(file, {"a": "b"}), _written(lambda f: torch.save(file, f))
    packed = _written(lambda f: np.savez_compressed(f, **EMBEDS))
    return {
        "lora": _one_of(
            _file(folder / "lora.safetensors", safe, mutated_safetensors, merge),
            _file(folder / "lora.bin", torchs, mutated_archive, merge),
        ),
        "prompt embeds": _one_of(
            _file(folder / "e.safetensors", save_arrays(EMBEDS), mutated_safetensors, embeds),
            _file(folder / "e.npz", packed, mutated_archive, embeds),
        ),
    }


def _record_trials(folder: Path) -> dict[str, Trial]:
    with PictureFiles(folder / "pictures", [3], [RECORD]) as files:
        files.add(0, np.zeros((1, 4, 4, 1), np.uint8))
    picture = next((folder / "pictures").glob("*.png"))
    manifest = manifest_to_json(OF_FAMILIES).encode()
    job = job_to_json(Job(10, 4, {"seed": 1, "plan": {"steps": [1, 2]}}))
    return {
        "plan of two streams": _plan(POOLED, "fora:2+gc:0.8", TABLE),
        "plan of two sets": _plan(TWO_SETS, "fora:2+lagrange:1,history=computed", TABLE),
        "manifest of families": lambda g: manifest_from_json(mutated_json(manifest, g), "m"),
        "picture": _file(
            picture,
            picture.read_bytes(),
            mutated_bytes,
            lambda _: finished_pictures(folder / "pictures", [RECORD]),
        ),
        "shard job": lambda g: job_from_json(mutated_json(job, g), "job"),
    }


def _plan(spec: ModelSpec, policy: str, table: SamplerTable) -> Trial:
    """A mutant of a plan, or of its schedule, read as `EngineDir.plan` does."""
    schedule = schedule_from_policy(parse_policy(policy), spec, STEPS)
    plan = compile_for_host(schedule, spec, table)
    texts = schedule_to_json(plan.schedule).encode(), plan_to_json(plan).encode()
    assert plan_from_json(texts[1], schedule_from_json(texts[0], "schedule"), "plan") == plan

    def trial(generator: random.Random) -> None:
        of_schedule, of_plan = texts
        if generator.random() < 0.5:
            of_schedule = mutated_json(of_schedule, generator)
        else:
            of_plan = mutated_json(of_plan, generator)
        found = plan_from_json(of_plan, schedule_from_json(of_schedule, "schedule"), "plan")
        if found.schedule.steps != found.steps or found.schedule.units != spec.units:
            raise EngineDirError("the plan and its schedule do not fit together")
        check_plan(found, spec)
        check_agreement(found, spec)

    return trial
