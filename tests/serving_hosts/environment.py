"""Make a virtual environment with the hosts that the tests of this folder start.

    python -m tests.serving_hosts.environment triton out/triton
    python -m tests.serving_hosts.environment others out/hosts

``triton`` has a real tritonserver, CPU only, of the wheel nvidia-pytriton. It needs NumPy 1.
``others`` has LitServe, BentoML and gunicorn, for ``tests/examples/test_serving.py``. goc_deploy is
not installed into either, only what it requires: tests put its folder on the path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

from tests.packaging.resolve import ROOT, UV, environment

HOSTS = {
    "triton": (
        *("nvidia-pytriton==0.7.0", "numpy<2", "tritonclient[grpc,http]"),
        *("pytest", "tokenizers"),
    ),
    "others": ("litserve>=0.2.19", "bentoml>=1.4.39", "gunicorn>=23", "fastapi", "uvicorn"),
}


def requirements() -> list[str]:
    """What goc_deploy requires, with the ONNX Runtime of the CPU, which is a tenth of the size."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [one for one in project["dependencies"] if not one.startswith("onnxruntime")]
    return [*names, "onnxruntime"]


def main(argv: list[str]) -> int:
    if len(argv) != 2 or argv[0] not in HOSTS:
        print(__doc__)
        return 2
    hosts, folder = HOSTS[argv[0]], Path(argv[1])
    if argv[0] == "triton" and not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        # Triton's stub is another program with this Python's library.
        print("this Python has no shared library (libpython), which tritonserver needs")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    python, base = folder / "bin" / "python", sys._base_executable  # not the tests' environment
    variables = environment(os.environ)
    words = [UV, "venv", "--quiet", "--no-config", "--python", base, folder]
    subprocess.run(words, env=variables, check=True)
    words = [UV, "pip", "install", "--quiet", "--no-config", "--python", python]
    subprocess.run([*words, *requirements(), *hosts], env=variables, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
