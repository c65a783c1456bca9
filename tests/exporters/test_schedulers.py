"""Schedulers of diffusers as tables.

They make the same steps, our own solvers can take their place, and refusals name the reason.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from goc_deploy.errors import EnvironmentUnsupportedError, ModelError, UsageError, VerificationError
from goc_deploy.exporters import schedulers
from goc_deploy.exporters.schedulers import check_scheduler, prediction_of, table_from_sampler
from goc_deploy.samplers import MAX_LAGS, SamplerTable, default_sampler, sampler_table
from goc_deploy.samplers.process import Process
from tests.reference import SIGNAL, relative_l2, table_step

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UNCLIPPED = {"clip_sample": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "ddim": {"_class_name": "DDIMScheduler", **UNCLIPPED},
    "ddim, trailing v": {
        "_class_name": "DDIMScheduler",
        **UNCLIPPED,
        **BETAS,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    },
    "ddim, linspace": {"_class_name": "DDIMScheduler", **UNCLIPPED, "timestep_spacing": "linspace"},
    "ddim, offset": {
        "_class_name": "DDIMScheduler",
        **UNCLIPPED,
        "steps_offset": 1,
        "set_alpha_to_one": False,
    },
    "pndm": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **BETAS},
    "pndm with Runge-Kutta": {"_class_name": "PNDMScheduler"},
    "dpm++ 2m": {"_class_name": "DPMSolverMultistepScheduler"},
    "dpm++ 3m, karras": {
        "_class_name": "DPMSolverMultistepScheduler",
        "solver_order": 3,
        "use_karras_sigmas": True,
    },
    "dpm++ heun": {
        "_class_name": "DPMSolverMultistepScheduler",
        "solver_type": "heun",
        "euler_at_final": True,
    },
    "dpm": {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver",
        "final_sigmas_type": "sigma_min",
    },
    "dpm++ of a flow": {
        "_class_name": "DPMSolverMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
    },
    "deis": {"_class_name": "DEISMultistepScheduler", "solver_order": 3},
    "unipc": {"_class_name": "UniPCMultistepScheduler"},
    "unipc of order 3, cosine": {
        "_class_name": "UniPCMultistepScheduler",
        "solver_order": 3,
        "beta_schedule": "squaredcos_cap_v2",
    },
    "unipc without corrector": {
        "_class_name": "UniPCMultistepScheduler",
        "disable_corrector": [0, 1, 2],
    },
    "euler": {"_class_name": "EulerDiscreteScheduler", **BETAS},
    "euler, karras": {
        "_class_name": "EulerDiscreteScheduler",
        "use_karras_sigmas": True,
        "timestep_spacing": "leading",
        "prediction_type": "v_prediction",
    },
    "unipc of Wan": {
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 5.0,
    },
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    "flow, terminal": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.02},
}
NOISY = {
    name: {"_class_name": "DDPMScheduler", **UNCLIPPED, "variance_type": name}
    for name in ("fixed_small", "fixed_large")
}
EXTRA = {"pndm": 1, "pndm with Runge-Kutta": 9}
OWN = {
    "ddim": CONFIGS["ddim"],
    "ddim, scaled betas": {**CONFIGS["ddim"], **BETAS},
    "ddim, trailing v": {**CONFIGS["ddim, trailing v"], "rescale_betas_zero_snr": False},
    "ddpm": NOISY["fixed_small"],
    "dpm++ 2m": CONFIGS["dpm++ 2m"],
    "dpm++ 3m, cosine": {
        "_class_name": "DPMSolverMultistepScheduler",
        "solver_order": 3,
        "beta_schedule": "squaredcos_cap_v2",
        "timestep_spacing": "leading",
    },
    "dpm++, trained betas": {
        **CONFIGS["dpm++ 2m"],
        "trained_betas": [0.001 + 1e-5 * k for k in range(1000)],
    },
    "flow": CONFIGS["flow"],
    "unipc of Wan": CONFIGS["unipc of Wan"],
}


def process_of(config: dict[str, Any]) -> Process:
    return Process(prediction_of(config, "here"), config)


def probed(config: dict[str, Any], steps: int) -> SamplerTable:
    pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    return table_from_sampler("diffusers", steps, process_of(config))


def toy_model(x: torch.Tensor, t: float) -> torch.Tensor:
    return torch.tanh(0.7 * x) + 0.1 * torch.cos(x + t / 300)


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
@pytest.mark.parametrize("steps", [2, 7, 20, 50])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_probed_table_takes_the_steps_of_the_scheduler(name: str, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    steps += 3 * EXTRA.get(name, 0)
    table = probed(CONFIGS[name], steps)
    config = {key: value for key, value in CONFIGS[name].items() if key != "_class_name"}
    scheduler = getattr(diffusers, CONFIGS[name]["_class_name"])(**config)
    scheduler.set_timesteps(steps - EXTRA.get(name, 0))
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs, ours, step_of = (
        noise * float(getattr(scheduler, "init_noise_sigma", 1.0)),
        table.start * noise,
        table_step(table),
    )
    assert table.steps == len(scheduler.timesteps) == steps
    for k, t in enumerate(scheduler.timesteps):
        shown = (
            scheduler.scale_model_input(theirs, t)
            if hasattr(scheduler, "scale_model_input")
            else theirs
        )
        assert relative_l2(ours.numpy(), shown.double().numpy()) < 1e-5
        assert table.timesteps[k] == t.item()
        theirs = scheduler.step(toy_model(shown, t.item()).double(), t, theirs).prev_sample.double()
        ours = step_of(k, ours, toy_model(ours, t.item()), ours, ours)
    assert relative_l2(ours.numpy(), theirs.numpy()) < 1e-5
    assert all(sum(map(bool, row)) <= MAX_LAGS for row in table.lag_coefficients)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOISY)
def test_fresh_noise_of_ddpm_has_its_weight(name: str) -> None:
    table = probed(NOISY[name], 20)
    signal = [*(SIGNAL[t] for t in table.timesteps), 1.0]  # type: ignore[index]
    betas = [1 - now / after for now, after in pairwise(signal)]
    least = [
        beta * (1 - after) / (1 - now)
        for beta, now, after in zip(betas, signal, signal[1:], strict=False)
    ]
    expected = [*np.sqrt(least if name == "fixed_small" else betas)[:-1], 0.0]
    np.testing.assert_allclose(table.noise, expected, rtol=1e-4, atol=1e-9)
    assert table.stochastic


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [1, 5, 20, 50])
@pytest.mark.parametrize("name", OWN)
def test_our_own_solvers_stand_in_where_diffusers_is_missing(
    name: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = probed(OWN[name], steps)  # and is checked against our own
    monkeypatch.setattr(schedulers, "find_spec", lambda _name: None)
    found = table_from_sampler("diffusers", steps, process_of(OWN[name]))
    assert found.sampler == "diffusers"
    np.testing.assert_allclose(found.timesteps, expected.timesteps, rtol=1e-6)
    np.testing.assert_allclose(found.latent, expected.latent, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.model, expected.model, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.noise, expected.noise, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - OWN.keys() | {"ddim, trailing v"}))
def test_without_diffusers_what_we_cannot_follow_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedulers, "find_spec", lambda _name: None)
    with pytest.raises(
        EnvironmentUnsupportedError,
        match=r"install 'goc_deploy\[export,diffusers\]', or name another",
    ):
        table_from_sampler("diffusers", 20, process_of(CONFIGS[name]))


@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_that_is_not_what_it_was_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = probed(CONFIGS["ddim"], 5)
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    set_timesteps = diffusers.DDIMScheduler.set_timesteps

    def one_later(scheduler: Any, *args: Any, **more: Any) -> None:
        set_timesteps(scheduler, *args, **more)
        scheduler.timesteps = scheduler.timesteps + 1

    monkeypatch.setattr(diffusers.DDIMScheduler, "set_timesteps", one_later)
    with pytest.raises(VerificationError, match="takes other steps than sampler 'ddim@leading'"):
        table_from_sampler("diffusers", real.steps, process_of(CONFIGS["ddim"]))


DDIM, DPM = CONFIGS["ddim"], CONFIGS["dpm++ 2m"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "HeunDiscreteScheduler"},
            "scheduler is 'HeunDiscreteScheduler', which is not one of DDIM",
        ),
        (
            {"_class_name": "EulerAncestralDiscreteScheduler"},
            "'EulerAncestralDiscreteScheduler', which is not",
        ),
        ({}, "scheduler is None"),
        ({"_class_name": ["DDIMScheduler"]}, r"scheduler is \['DDIMScheduler'\]"),
        (
            {"_class_name": "DDIMScheduler"},
            "DDIMScheduler has clip_sample True, only False is supported",
        ),
        (
            {"_class_name": "DDPMScheduler", "clip_sample": True},
            "DDPMScheduler has clip_sample True",
        ),
        ({**DDIM, "thresholding": True}, "has thresholding True"),
        ({**DDIM, "thresholding": 0}, "has thresholding 0, only False"),
        (
            {**DPM, "algorithm_type": "sde-dpmsolver++"},
            r"algorithm_type 'sde-dpmsolver\+\+', only 'dpmsolver\+\+' or",
        ),
        ({**DPM, "variance_type": "learned_range"}, "variance_type 'learned_range', only None"),
        ({**DPM, "use_dynamic_shifting": True}, "use_dynamic_shifting True"),
        ({**CONFIGS["flow"], "use_dynamic_shifting": True}, "use_dynamic_shifting True"),
        ({**CONFIGS["flow"], "stochastic_sampling": True}, "stochastic_sampling True"),
        ({**CONFIGS["unipc"], "solver_p": "DDIM"}, "solver_p 'DDIM', only None"),
        (
            {**NOISY["fixed_small"], "variance_type": "learned"},
            "variance_type 'learned', only 'fixed_small' or",
        ),
        (
            {**DDIM, "beta_start": {"a": 1}},
            r"the folder's DDIMScheduler: \$\.beta_start: expected .*, got \{'a': 1\}",
        ),
        (
            {**DDIM, "trained_betas": [[1]]},
            r"\$\.trained_betas\[0\]: expected int \| float \| str, got \[1\]",
        ),
        (
            {**DDIM, "num_train_timesteps": 10**9},
            r"\$\.num_train_timesteps: expected int <= 100000, got 1000000000",
        ),
        ({**DPM, "solver_order": 9}, r"\$\.solver_order: expected int <= 3, got 9"),
    ],
)
def test_what_is_no_table_is_refused_by_name_with_the_option_that_helps(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=f"{message}.*`sampler`"):
        check_scheduler(config)
    with pytest.raises(ModelError, match=message):
        table_from_sampler("diffusers", 5, Process("eps", config))


@pytest.mark.filterwarnings("ignore")
def test_what_diffusers_refuses_is_refused_with_its_reason() -> None:
    with pytest.raises(
        ModelError,
        match=r"diffusers refuses the folder's DDIMScheduler for 5 steps: .*not implemented",
    ):
        probed({**DDIM, "beta_schedule": "none"}, 5)
    with pytest.raises(UsageError, match=r"steps must be within 1..1000, got 1001"):
        probed(DDIM, 1001)
    with pytest.raises(UsageError, match="did not come with this model; name another `sampler`"):
        table_from_sampler("diffusers", 5, Process("eps"))
    with pytest.raises(
        ModelError, match=r"prediction_type is 'score', only epsilon, .*give `prediction`"
    ):
        prediction_of({"prediction_type": "score"}, "here")
    with pytest.raises(ModelError, match=r"prediction_type is \[\], only"):
        prediction_of({"prediction_type": []}, "here")
    with pytest.raises(ModelError, match="diffusers refuses the folder's FlowMatch"):
        probed({**CONFIGS["flow"], "shift": "3"}, 5)


def test_own_samplers_follow_the_betas_of_the_folder() -> None:
    other = sampler_table("ddim", 5, Process("eps", {**DDIM, **BETAS}))
    betas = (
        torch.linspace(
            BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000, dtype=torch.float64
        )
        ** 2
    )
    signal = torch.cumprod(1 - betas, 0)[list(other.timesteps)]  # type: ignore[arg-type]
    np.testing.assert_allclose([of_x for of_x, _ in other.estimate], signal**-0.5, rtol=1e-9)
    assert sampler_table("ddim", 5, Process("eps", DDIM)) == sampler_table(
        "ddim", 5, Process("eps")
    )
    for setting, value in {
        "rescale_betas_zero_snr": True,
        "num_train_timesteps": 500,
        "beta_schedule": "sigmoid",
        "beta_start": "small",
    }.items():
        with pytest.raises(
            UsageError, match=f"has .*{value}.*use the folder's own: `sampler=diffusers`"
        ):
            sampler_table("ddim", 5, Process("eps", {**DDIM, setting: value}))
    for betas_given in ([0.1], [2.0] * 1000, "abc"):
        with pytest.raises(UsageError, match="has trained_betas"):
            sampler_table("ddim", 5, Process("eps", {**DDIM, "trained_betas": betas_given}))


def test_the_scheduler_of_the_folder_is_the_default() -> None:
    with pytest.raises(UsageError, match="goc-plan and goc-export know it, here give a table"):
        sampler_table("diffusers", 5, process_of(DDIM))
    assert default_sampler(Process("eps")) == "ddim"
    assert default_sampler(Process("flow")) == default_sampler(Process("flow_to_noise")) == "euler"
    assert default_sampler(process_of(DDIM)) == "diffusers"


def test_both_directions_of_a_flow_lead_to_the_clean_sample() -> None:
    noise, clean = np.random.default_rng(0).standard_normal((2, 5))
    for prediction, velocity in (("flow", clean - noise), ("flow_to_noise", noise - clean)):
        table, x = sampler_table("euler", 7, Process(prediction)), noise
        for k in range(7):
            of_x, of_m = table.estimate[k]
            np.testing.assert_allclose(of_x * x + of_m * velocity, clean)
            x = table.latent[k] * x + table.model[k] * velocity
        np.testing.assert_allclose(x, clean, atol=1e-12)
    assert sampler_table("euler", 4, Process("flow_to_noise")).timesteps == (1000, 750, 500, 250)
