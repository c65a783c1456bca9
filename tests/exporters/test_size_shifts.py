"""Schedulers that shift their noise levels by the size of an image, as FLUX.1 and Qwen-Image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from goc_deploy.errors import ModelError
from goc_deploy.exporters import schedulers
from goc_deploy.exporters.schedulers import table_from_sampler
from goc_deploy.samplers import SamplerTable
from goc_deploy.samplers.flows import SizeShift
from goc_deploy.samplers.process import EVEN_SIGMAS, Process

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", EVEN_SIGMAS: True}
SETTINGS: dict[str, dict[str, Any]] = {
    "FLUX.1-dev": {
        "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0,
        "base_image_seq_len": 256, "max_image_seq_len": 4096,
    },
    "Qwen-Image": {
        "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "shift": 1.0,
        "base_image_seq_len": 256, "max_image_seq_len": 8192, "shift_terminal": 0.02,
        "time_shift_type": "exponential",
    },
    "FLUX.1-schnell": {"use_dynamic_shifting": False, "shift": 1.0},
    "Z-Image": {"use_dynamic_shifting": False, "shift": 6.0},
    "a fixed shift": {"shift": 3.0, "shift_terminal": 0.1},
}  # fmt: skip
TOKENS = (4096, 1504)  # of images of 1024x1024 and 752x512 pixels


def table_of(settings: dict[str, Any], steps: int, tokens: int) -> SamplerTable:
    return table_from_sampler(
        "diffusers", steps, Process("flow_to_noise", {**FLOW, **settings}, tokens)
    )


def sigmas_of_pipeline(settings: dict[str, Any], steps: int, tokens: int) -> np.ndarray:
    """The noise levels that FluxPipeline, QwenImagePipeline and ZImagePipeline make, and 0."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers comes with the judges extra")
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(scheduler.config[name] for name in names))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    found: np.ndarray = scheduler.sigmas.numpy()
    return found


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("steps", [1, 4, 10, 28, 50])
@pytest.mark.parametrize("name", SETTINGS)
def test_steps_are_those_of_the_pipeline(
    name: str, steps: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if steps == 1 and SETTINGS[name].get("shift_terminal"):
        pytest.skip("diffusers divides zero by zero")
    expected = sigmas_of_pipeline(SETTINGS[name], steps, tokens)
    measured = table_of(SETTINGS[name], steps, tokens)
    # Made for the other size first, as for a request of another size.
    other = table_of(SETTINGS[name], steps, TOKENS[tokens == TOKENS[0]]).at(tokens)
    monkeypatch.setattr(schedulers, "find_spec", lambda _name: None)
    computed = table_of(SETTINGS[name], steps, tokens)  # without diffusers
    for table in (measured, computed, *([other] if measured.size_shift else [])):
        np.testing.assert_allclose(table.timesteps, 1000 * expected[:-1], rtol=0, atol=2e-4)
        np.testing.assert_allclose(table.model, np.diff(expected), rtol=0, atol=3e-7)
        np.testing.assert_allclose(table.latent, 1, rtol=1e-9)
        assert table.sampler == "diffusers"
        assert (table.size_shift is None) == (name not in ("FLUX.1-dev", "Qwen-Image"))


def test_a_table_without_a_shift_for_the_size_is_the_same_at_all_sizes() -> None:
    table = table_of(SETTINGS["FLUX.1-schnell"], 4, 4096)
    assert table.at(256) is table


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time_shift_type": "linear"}, "time_shift_type 'linear', only 'exponential' is supp"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas True, only False is supported"),
        ({"stochastic_sampling": True}, "stochastic_sampling True, only False is supported"),
        ({"num_train_timesteps": 100}, "num_train_timesteps 100, only 1000 is supported"),
        ({"base_image_seq_len": 4096}, "max_image_seq_len is 4096, expected more than base_im"),
        ({"shift_terminal": 1.5}, "FlowMatchEulerDiscreteScheduler"),
        ({"max_shift": "large"}, "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_other_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        table_of({**SETTINGS["FLUX.1-dev"], **settings}, 4, 4096)


def test_the_shift_is_linear_in_the_tokens() -> None:
    shift = SizeShift()
    assert shift.exponent(4096, 4) == pytest.approx(1.15)
    assert shift.exponent(1024, 4) == pytest.approx(0.63)
    with pytest.raises(ValueError, match="expected more than base_image_seq_len, 9"):
        SizeShift(base_image_seq_len=9, max_image_seq_len=9)
