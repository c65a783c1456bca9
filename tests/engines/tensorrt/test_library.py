from __future__ import annotations

import ctypes
import importlib.util
from types import SimpleNamespace

import pytest

from goc_deploy.engines import driver
from goc_deploy.engines.tensorrt.library import (
    Library,
    check_target,
    library_from_backend,
    target_from_options,
    this_platform,
)
from goc_deploy.errors import EnvironmentUnsupportedError, UsageError
from tests.gpus import library_here


@pytest.fixture
def rtx() -> Library:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")
    return library_from_backend("tensorrt-rtx")


def test_the_default_is_every_gpu_from_ampere_on(rtx: Library) -> None:
    target = target_from_options(rtx, (), "bf16")
    assert target.capabilities[:3] == ("8.0", "8.6", "8.9")
    assert "12.0" in target.capabilities
    assert (target.version, target.platform) == (rtx.version, this_platform())


def test_capabilities_are_sorted_and_taken_once(rtx: Library) -> None:
    assert target_from_options(rtx, ("12.0", "7.5", "8.6", "8.6"), "fp16").capabilities == (
        "7.5",
        "8.6",
        "12.0",
    )


@pytest.mark.parametrize(
    ("capability", "precision", "message"),
    [
        (
            "9.0",
            "fp16",
            r"`EngineOptions.capabilities=9.0`: tensorrt-rtx [\d.]+ can build for 7.5, 8.0",
        ),
        ("7.5", "bf16", r"that GPU has no bf16; leave it out, or export with `precision=fp16`"),
        ("sm86", "fp16", r"sm86` must look like 8.6"),
        ("8.6.1", "fp16", r"must look like 8.6"),
    ],
)
def test_what_cannot_be_built_for_is_refused(
    rtx: Library, capability: str, precision: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        target_from_options(rtx, (capability,), precision)


@pytest.mark.parametrize(
    ("capability", "precision"), [("9.0", "fp16"), ("10.0", "fp16"), ("7.5", "bf16")]
)
def test_a_gpu_that_the_library_has_no_target_for_is_no_wrong_option(
    rtx: Library, capability: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        EnvironmentUnsupportedError, match=r"has no (target|bf16).*; (use|export with)"
    ):
        check_target(rtx, capability, precision)
    check_target(rtx, "8.9", precision)
    monkeypatch.setattr(driver, "device_capability", lambda *_: capability)
    with pytest.raises(pytest.skip.Exception, match=r"has no (target|bf16)"):
        library_here("tensorrt-rtx", precision)


def test_the_gpu_of_the_machine_without_the_precision_is_no_wrong_option(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "device_capability", lambda *_: "7.5")
    library = Library("tensorrt", SimpleNamespace(__version__="11.4"))
    assert target_from_options(library, (), "fp16").capabilities == ("7.5",)
    with pytest.raises(EnvironmentUnsupportedError, match=r"compute capability 7.5 has no bf16"):
        target_from_options(library, (), "bf16")
    with pytest.raises(UsageError, match=r"`EngineOptions.capabilities=7.5`: that GPU has no bf16"):
        target_from_options(library, ("7.5",), "bf16")


def test_backends_that_are_unknown_or_not_installed_say_what_to_do() -> None:
    with pytest.raises(UsageError, match="use tensorrt-rtx or tensorrt"):
        library_from_backend("onnxruntime")
    if importlib.util.find_spec("tensorrt") is None:
        with pytest.raises(
            EnvironmentUnsupportedError, match=r"pip install 'goc_deploy\[tensorrt\]'"
        ):
            library_from_backend("tensorrt")


def test_without_a_driver_the_error_says_where_to_build() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(
            EnvironmentUnsupportedError, match=r"no NVIDIA driver here .* use a GPU machine"
        ):
            driver.device_capability()
    else:
        pytest.skip("this machine has an NVIDIA driver")
