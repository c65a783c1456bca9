"""Kinds of mutants among what commands read from users.

They are checkpoints, model folders, tokenizers, arrays, schedules and texts.
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
from safetensors.torch import save

from goc_deploy.api import cpu_backend
from goc_deploy.compiler import check_plan, compile_schedule
from goc_deploy.compiler.head_file import head_to_safetensors, weights_from_safetensors
from goc_deploy.compiler.plan_file import plan_from_json, plan_to_json
from goc_deploy.conditions.captions import blank_captions
from goc_deploy.conditions.stored_captions import captions_from_bytes, captions_to_bytes
from goc_deploy.conditions.tensor_files import array_from_npy, arrays_from_file
from goc_deploy.conditions.text import TextEncoder, prompts_from_file
from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures.dit import DIT
from goc_deploy.exporters.checkpoint import check_values, load_checkpoint
from goc_deploy.exporters.companions.t5 import position_buckets, t5_config
from goc_deploy.exporters.companions.tokenizer_files import json_from_sentencepiece, read_tokenizer
from goc_deploy.exporters.companions.vae import vae_config
from goc_deploy.exporters.folders import read_scheduler
from goc_deploy.exporters.model_folder import read_model_folder
from goc_deploy.exporters.router import router_probabilities
from goc_deploy.exporters.schedulers import prediction_of, table_from_sampler
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.samplers import sampler_table
from goc_deploy.samplers.process import Process
from goc_deploy.schedule import Schedule
from goc_deploy.schedule.schedule import schedule_from_file, schedule_to_json
from goc_deploy.spec import ModelSpec, TextSpec
from goc_deploy.strict_json import parse_json
from tests import pixart_reference, t5_folder
from tests.exporters.architectures import test_diffusers_folder
from tests.exporters.companions import test_vae
from tests.fuzz.mutations import (
    Mutation,
    mutated_archive,
    mutated_bytes,
    mutated_json,
    mutated_safetensors,
    mutated_text,
)
from tests.heads import FORMS, plan_with_head
from tests.stand_ins.silent import SilentEngine

Trial = Callable[[random.Random], object]
STEPS = 6
SPEC = ModelSpec(2, 48, 3, 192, 2, 4, 4, 10, learn_sigma=True)
TENSORS = {"a": torch.arange(6.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}
ARRAYS = {"a": np.arange(6.0), "b": np.ones((2, 3), np.float16)}
SPECS = (
    "none",
    "fora:2@0.5+gc:1.2",
    "fora:3+steps:1,4:0.8,both_branches",
    "fora:2+taylor:2,history=computed",
    "fora:2+hermite:2:0.5",
    "fora:2+lagrange:1",
    "file:x.json+gc",
)
SAMPLERS = ("ddim", "ddim:1@trailing", "dpm++:2@leading", "euler", "ddpm", "ddim@leading")
SCHEDULERS = (
    {"_class_name": "DDIMScheduler", "clip_sample": False, "beta_start": 1e-4, "beta_end": 0.02},
    {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 2, "use_karras_sigmas": True},
    {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
)


def _written(write: Callable[[io.BytesIO], object]) -> bytes:
    memory = io.BytesIO()
    write(memory)
    return memory.getvalue()


def _saved(value: Any, *, legacy: bool = False) -> bytes:
    return _written(lambda f: torch.save(value, f, _use_new_zipfile_serialization=not legacy))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def input_trials(folder: Path) -> dict[str, Trial]:
    """Kind of file -> a function that makes a mutant in a folder and reads it as commands do."""
    return {**_tensor_trials(folder), **_model_trials(folder), **_policy_trials(folder)}


def _file(path: Path, content: bytes, mutation: Mutation, read: Callable[[Path], object]) -> Trial:
    def trial(generator: random.Random) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(mutation(content, generator))
        read(path)

    return trial


def _tensor_trials(folder: Path) -> dict[str, Trial]:
    def checkpoint(path: Path) -> None:
        check_values(load_checkpoint(path))

    spec = replace(pixart_reference.SPEC, choices=1)
    captions = captions_to_bytes(blank_captions(spec))
    packed = _written(lambda f: np.savez_compressed(f, **ARRAYS))
    routers = {f"{i}.prob": torch.zeros(4) for i in range(STEPS)}
    router = _saved({"routers": routers})
    return {
        "npz": _file(folder / "x.npz", packed, mutated_archive, arrays_from_file),
        "npy": _file(
            folder / "x.npy",
            _written(lambda f: np.save(f, ARRAYS["a"])),
            mutated_bytes,
            array_from_npy,
        ),
        "safetensors": _file(
            folder / "x.safetensors", save(TENSORS), mutated_safetensors, arrays_from_file
        ),
        "captions": lambda g: captions_from_bytes(
            memoryview(mutated_archive(captions, g)), spec, "captions"
        ),
        "checkpoint": _file(folder / "x.pt", _saved(TENSORS), mutated_archive, checkpoint),
        "legacy checkpoint": _file(
            folder / "y.pt", _saved(TENSORS, legacy=True), mutated_bytes, checkpoint
        ),
        "safetensors checkpoint": _file(
            folder / "z.safetensors", save(TENSORS), mutated_safetensors, checkpoint
        ),
        "router": _file(folder / "r.pt", router, mutated_archive, router_probabilities),
        "legacy router": _file(
            folder / "s.pt",
            _saved({"routers": routers}, legacy=True),
            mutated_bytes,
            router_probabilities,
        ),
    }


def _model_trials(folder: Path) -> dict[str, Trial]:
    model, settings = folder / "model", folder / "scheduler_config.json"
    tokenizer = json_from_sentencepiece(t5_folder.sentencepiece_model(), "")
    vocabulary = t5_folder.CONFIG["vocab_size"]
    backend = cpu_backend()
    model.mkdir()
    test_diffusers_folder.save_weights(model, test_diffusers_folder.state())

    def encode(content: bytes) -> None:
        text = TextSpec("tokenizer.json", vocabulary, 1, 0)
        engines, contents = {"text_encoder": SilentEngine(backend)}, {"text_encoder": content}
        encoders = {"text_encoder": text}
        encoder = TextEncoder(engines, contents, backend, pixart_reference.SPEC, encoders, 2)  # type: ignore[arg-type]
        encoder.prompt_embeds(["a red three", "\u00e9" * 40], ["", ""])

    def read_and_encode(path: Path) -> None:
        encode(read_tokenizer((path.parent,), vocabulary)[1])

    def table(path: Path) -> None:
        scheduler = read_scheduler(path)
        process = Process(prediction_of(scheduler, str(path)), scheduler)
        table_from_sampler("diffusers", STEPS, process)

    def read_folder(_: Path) -> None:
        found = read_model_folder(model, {"dit": DIT})
        DIT.check_tensors(found.checkpoint.tensors, found.spec)

    def text_encoder(generator: random.Random) -> None:
        found = parse_json(mutated_json(_json(t5_folder.CONFIG), generator), "t5", ModelError)
        config = t5_config(found, "t5")
        position_buckets(SPEC.tokens, config.buckets, config.furthest)

    def scheduler(generator: random.Random) -> None:
        _file(settings, _json(generator.choice(SCHEDULERS)), mutated_json, table)(generator)

    return {
        "model config": _file(
            model / "config.json", _json(test_diffusers_folder.CONFIG), mutated_json, read_folder
        ),
        "scheduler config": scheduler,
        "vae config": lambda g: vae_config(
            parse_json(mutated_json(_json(test_vae.CONFIG), g), "vae", ModelError), "vae"
        ),
        "text encoder config": text_encoder,
        "tokenizer": lambda g: encode(mutated_json(tokenizer, g)),
        "tokenizer of a folder": _file(
            folder / "json" / "tokenizer.json", tokenizer, mutated_json, read_and_encode
        ),
        "sentencepiece": _file(
            folder / "pieces" / "spiece.model",
            t5_folder.sentencepiece_model(),
            mutated_bytes,
            read_and_encode,
        ),
    }


def _policy_trials(folder: Path) -> dict[str, Trial]:
    def of_spec(text: str) -> Schedule:
        return schedule_from_policy(parse_policy(text), SPEC, STEPS)

    def compiled(found: Schedule) -> None:
        compile_schedule(found, SPEC, steps=STEPS)

    def spec(generator: random.Random) -> None:
        text = mutated_text(generator.choice(SPECS).encode(), generator).decode()
        compiled(of_spec(text))

    def sampler(generator: random.Random) -> None:
        text = mutated_text(generator.choice(SAMPLERS).encode(), generator).decode()
        sampler_table(text, STEPS, Process("eps"))

    uncached = of_spec("none")
    with_head = plan_with_head(compile_schedule(uncached, SPEC), FORMS["hidden3-2"], SPEC)
    assert with_head.sampler.head is not None
    weights = head_to_safetensors(with_head.sampler.head)
    text = plan_to_json(with_head).encode()

    def head(path: Path) -> None:
        found = weights_from_safetensors(path.read_bytes(), str(path))
        check_plan(plan_from_json(text, uncached, "plan", found), SPEC)

    def plan_of_head(path: Path) -> None:
        found = weights_from_safetensors(weights, "weights")
        check_plan(plan_from_json(path.read_bytes(), uncached, str(path), found), SPEC)

    return {
        "head": _file(folder / "head.safetensors", weights, mutated_safetensors, head),
        "plan with a head": _file(folder / "plan.json", text, mutated_json, plan_of_head),
        "schedule file": _file(
            folder / "schedule.json",
            schedule_to_json(of_spec("fora:2+gc:1.2")).encode(),
            mutated_json,
            lambda path: compiled(schedule_from_file(path)),
        ),
        "prompts": _file(
            folder / "prompts.txt",
            b"a red three\n\na blue seven\n",
            mutated_bytes,
            prompts_from_file,
        ),
        "spec": spec,
        "sampler": sampler,
    }
