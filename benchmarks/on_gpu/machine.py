"""The card, the driver, the packages, and the memory of a process on the card.

The source is nvidia-smi.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "goc_deploy",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
    "triton",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "numpy",
)
CPU = "CPU"


def machine(*, dry: bool) -> dict[str, Any]:
    """The first card that nvidia-smi lists, the driver, and versions of packages.

    Raises:
        RuntimeError: there is no card, and this is no dry run.
    """
    found: dict[str, Any] = {"card": CPU, "cores": os.cpu_count(), "system": platform.platform()}
    if not dry:
        found |= _card()
    return {**found, "versions": {"python": platform.python_version(), **_versions()}}


def _card() -> dict[str, Any]:
    fields = {
        "name": "card",
        "driver_version": "driver",
        "compute_cap": "compute_capability",
        "memory.total": "memory_mb",
    }
    line = smi(f"--query-gpu={','.join(fields)}").splitlines()[0]
    found: dict[str, Any] = dict(zip(fields.values(), map(str.strip, line.split(",")), strict=True))
    cuda = re.search(r"CUDA Version:\s*([\d.]+)", smi())
    return {**found, "memory_mb": int(found["memory_mb"]), "cuda": cuda[1] if cuda else "?"}


def smi(*query: str) -> str:
    """Output of nvidia-smi, as CSV where something is queried.

    Raises:
        RuntimeError: there is none, or it fails.
    """
    if shutil.which("nvidia-smi") is None:
        raise RuntimeError("there is no nvidia-smi, so no NVIDIA GPU here; --dry runs on the CPU")
    words = ["nvidia-smi", *query, *(["--format=csv,noheader,nounits"] if query else [])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(
            f"{' '.join(words)}: {(done.stderr or done.stdout).strip() or 'no output'}"
        )
    return done.stdout


def gpu_bytes_of(pid: int) -> int | None:
    """Memory of a process on the card, with its CUDA context; None if it is not listed."""
    try:
        lines = smi("--query-compute-apps=pid,used_memory").splitlines()
    except RuntimeError:
        return None
    found = [line.split(",") for line in lines if line.split(",")[0].strip() == str(pid)]
    return int(found[0][1]) * 2**20 if found and found[0][1].strip().isdigit() else None


def safe_name(name: str) -> str:
    """The name with only letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if "goc_deploy" not in found:  # a tree that is not installed
        from goc_deploy.version import __version__

        found["goc_deploy"] = __version__
    return found
