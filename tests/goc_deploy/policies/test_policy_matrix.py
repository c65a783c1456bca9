"""Every base and every correction runs on every architecture and sampler that fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import goc_deploy
from benchmarks.make_checkpoint import random_state
from goc_deploy.api import cpu_backend
from goc_deploy.api.laboratory import EngineLaboratory
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import UsageError
from goc_deploy.exporters.architectures.families import ARCHITECTURES
from goc_deploy.exporters.architectures.flux import FluxConfig
from goc_deploy.exporters.architectures.flux import spec_of as flux_spec
from goc_deploy.exporters.architectures.flux2 import Flux2Config
from goc_deploy.exporters.architectures.flux2 import spec_of as flux2_spec
from goc_deploy.exporters.architectures.qwen import spec_of as qwen_spec
from goc_deploy.exporters.architectures.sd3_spec import spec_of as sd3_spec
from goc_deploy.exporters.architectures.wan_diffusers import spec_of
from goc_deploy.exporters.architectures.z_image import ZImageConfig
from goc_deploy.exporters.architectures.z_image import spec_of as z_image_spec
from goc_deploy.exporters.router import router_probabilities
from goc_deploy.options import no_progress
from goc_deploy.policies.calibration import CalibrationOptions
from goc_deploy.policies.grammar import parse_policy
from goc_deploy.policies.resolve import schedule_from_policy
from goc_deploy.policies.tables import BASES, CORRECTIONS
from goc_deploy.samplers.flows import FLOW_SAMPLERS
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec
from tests.pixart_reference import SPEC as PIXART

STEPS = 4
SPECS = {
    "dit": ModelSpec(1, 24, 2, 48, 2, 2, 4, 10, True),
    "pixart": replace(PIXART, depth=1),
    "pixart-sigma": replace(PIXART, depth=1, architecture="pixart-sigma", told_size=0),
    "sd3": sd3_spec(
        2, 2, 24, dual=(0,), qk_norm=True, table=4, grid=2, channels=4, text=20, pooled=6
    ),
    "sit": ModelSpec(1, 24, 2, 48, 2, 2, 4, 10, True),
    "wan": spec_of(1, 2, 12, ffn=48, channels=4, text=20),
    "qwen-image": qwen_spec(2, 1, (4, 14, 14), channels=4, text=20),
    "flux": flux_spec(
        FluxConfig(
            in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=1,
            joint_attention_dim=20, pooled_projection_dim=6,
        )
    ),
    "flux2": flux2_spec(
        Flux2Config(
            in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=1,
            joint_attention_dim=20,
        )
    ),
    "z-image": z_image_spec(
        ZImageConfig(
            in_channels=4, dim=256, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
            cap_feat_dim=20, axes_dims=(32, 48, 48),
        ),
        "",
    ),
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "sd3": {"size": (32, 32)},
    "wan": {"size": (8, 8), "frames": 2},
    "qwen-image": {"size": (8, 8)},
    "flux": {"size": (32, 32)},
    "flux2": {"size": (32, 32)},
    "z-image": {"size": (16, 8)},
}
# Both solvers of flows run on SiT and Wan. The others have the same steps, and run the one of their
# pipelines: a cell of this matrix takes about 8 s.
SAMPLERS = {
    "dit": ("ddim", "dpm++", "ddpm"),
    "pixart": ("ddim", "dpm++", "ddpm"),
    "pixart-sigma": ("dpm++",),
    "sd3": ("euler",),
    "sit": ("euler", "unipc"),
    "wan": ("euler", "unipc@shift=3"),
    "qwen-image": ("euler",),
    "flux": ("euler",),
    "flux2": ("euler",),
    "z-image": ("euler",),
}
BASE_ARGUMENTS = {"none": "none", "fora": "fora:2", "smoothcache": "smoothcache:0.5"}
BASE_ARGUMENTS |= {
    "compute": "compute:0,2",
    "search": "search:2,steps=4,reference=8",
    "l2c": "l2c:{router}",
    "file": "file:{schedule}",
}
CORRECTION_ARGUMENTS = {name: name for name in ("taylor", "lagrange", "hermite", "goc", "fit")}
CORRECTION_ARGUMENTS |= {"gc": "gc:0.5", "steps": "steps:3:0.5"}
POLICIES = (*BASE_ARGUMENTS.values(), *(f"fora:2+{text}" for text in CORRECTION_ARGUMENTS.values()))
POLICIES += tuple(  # the policies above that treat all units alike
    f"{text},level=residual"
    for text in POLICIES
    if text.partition(":")[0] not in ("smoothcache", "l2c")
)

MakeEngine = Callable[[str], Path]


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> MakeEngine:
    """A tiny engine of an architecture, and beside it a router and a schedule file.

    It has stored captions if the architecture draws captions.
    """
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            folder, spec = tmp_path_factory.mktemp(architecture), SPECS[architecture]
            torch.save(random_state(spec, 0), folder / "model.pt")
            more: dict[str, Any] = dict(SMALL.get(architecture, {}))
            if spec.text_conditional:
                shape, rng = (
                    (2, spec.caption_tokens, spec.caption_channels),
                    np.random.default_rng(0),
                )
                embeds = {
                    f"{what}prompt_embeds": rng.standard_normal(shape, np.float32)
                    for what in ("", "negative_")
                }
                if spec.pooled_channels:
                    embeds |= {
                        f"{what}pooled_prompt_embeds": rng.standard_normal(
                            (2, spec.pooled_channels), np.float32
                        )
                        for what in ("", "negative_")
                    }
                np.savez(folder / "captions.npz", **embeds)
                more["captions"] = folder / "captions.npz"
            goc_deploy.export(
                folder / "model.pt",
                folder / "engine",
                model=architecture,
                num_heads=spec.heads,
                plans=("none",),
                steps=STEPS,
                max_batch=2,
                **more,
            )
            routers = {f"{i}.prob": torch.full((spec.units,), -9.0) for i in range(STEPS)}
            torch.save({"routers": routers}, folder / "router.pt")
            rows = tuple(((1.0,) if step % 2 else (),) * spec.units for step in range(STEPS))
            Schedule.of(spec, rows).save(folder / "schedule.json")
            made[architecture] = folder / "engine"
        return made[architecture]

    return make


def test_the_matrix_has_every_architecture_base_and_correction() -> None:
    assert SPECS.keys() == SAMPLERS.keys()
    # Models that edit images are not calibrated.
    assert ARCHITECTURES.keys() - SPECS.keys() == {"qwen-image-edit"}
    assert SPECS.keys() < ARCHITECTURES.keys()
    assert BASE_ARGUMENTS.keys() == BASES.keys()
    assert CORRECTION_ARGUMENTS.keys() == CORRECTIONS.keys()
    families = {name.partition("@")[0] for names in SAMPLERS.values() for name in names}
    assert families == {"ddim", "dpm++", "ddpm", *FLOW_SAMPLERS}


@pytest.mark.parametrize(
    ("architecture", "sampler"),
    [(name, sampler) for name, samplers in SAMPLERS.items() for sampler in samplers],
)
def test_every_policy_runs(engine_of: MakeEngine, architecture: str, sampler: str) -> None:
    engine = engine_of(architecture)
    directory, options = (
        EngineDir.open(engine),
        CalibrationOptions(2, 3, 2.0, SPECS[architecture].guided_channels),
    )
    manifest = directory.manifest
    laboratory = EngineLaboratory(directory, cpu_backend, sampler, options, no_progress)
    for policy in POLICIES:
        text = policy.format(
            router=engine.parent / "router.pt", schedule=engine.parent / "schedule.json"
        )
        if sampler == "ddpm" and policy.startswith("search"):
            with pytest.raises(
                UsageError, match="draws fresh noise, so there is no converged solution"
            ):
                schedule_from_policy(
                    parse_policy(text), manifest.model, STEPS, laboratory, router_probabilities
                )
            continue
        schedule = schedule_from_policy(
            parse_policy(text), manifest.model, STEPS, laboratory, router_probabilities
        )
        found = laboratory.trials().run(schedule, options)
        assert np.isfinite(found.latents).all(), text
