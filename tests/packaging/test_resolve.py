from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.packaging import resolve
from tests.packaging.test_pyproject import ROOT


def test_nothing_but_the_way_to_the_index_is_taken_from_the_caller() -> None:
    hostile = {
        "PIP_FIND_LINKS": "/wheels",
        "PIP_EXTRA_INDEX_URL": "file:///simple",
        "PIP_CONSTRAINT": "other.txt",
        "UV_FIND_LINKS": "/wheels",
        "UV_CONSTRAINT": "other.txt",
        "PYTHONPATH": "/elsewhere",
    }
    index = {
        "PIP_INDEX_URL": "https://index/simple",
        "PIP_CERT": "/cert.pem",
        "PIP_DEFAULT_TIMEOUT": "180",
    }
    assert resolve.environment(hostile | index) == {
        "UV_DEFAULT_INDEX": "https://index/simple",
        "SSL_CERT_FILE": "/cert.pem",
        "UV_HTTP_TIMEOUT": "180",
    }


@pytest.mark.slow
def test_a_constraint_that_torch_refuses_is_a_conflict_that_names_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constraints = tmp_path / "constraints.txt"
    pins = (ROOT / "constraints.txt").read_text()
    constraints.write_text(re.sub(r"nvidia-cuda-nvrtc==\S+", "nvidia-cuda-nvrtc==13.5.37", pins))
    words = ("--python", "3.12", "--extra", "export", "--constraints", str(constraints))
    assert resolve.main(words) == 1
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("nvidia-cuda-nvrtc", "==13.5.37", "torch=="))


def test_a_package_without_a_wheel_is_refused_unless_nvidia_publishes_it_so() -> None:
    source = {"name": "tensorrt", "version": "11", "sdist": {"size": 5}}
    wheel = {"name": "nvidia-cufft", "version": "12", "wheels": [{"size": 70}]}
    found = resolve.resolution_from_lock({"packages": [source, wheel]}, "3.13")
    assert (found.nbytes, found.cuda_nbytes, found.source_only) == (75, 70, ("tensorrt",))
    with pytest.raises(
        resolve.ResolutionError, match=r"no wheel for Python 3\.13 on Linux x86-64: sdist-only 11"
    ):
        resolve.resolution_from_lock({"packages": [source | {"name": "sdist-only"}]}, "3.13")
