"""Resolve each extra, and all of them together, under constraints.txt.

The source is the metadata on PyPI; nothing is installed.

    python tests/packaging/resolve.py [--python 3.13] [--extra export]

A conflict is printed and ends with exit code 1. Nothing on this machine can hide one: installed
packages, wheels and indexes on disk, and the configuration of pip and uv take no part (see
``environment``). uv resolves, in seconds where pip takes minutes; ``make demo`` then installs by
pip.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uv import find_uv_bin

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13")
NONE, ALL = "(none)", "(all)"
UV = find_uv_bin()
WORKERS = 8  # they wait for the network

# From the caller's environment: how to reach the index, under uv's names. Everything else is left
# out.
KEPT = {
    "HOME": "HOME",
    "PATH": "PATH",
    "HTTPS_PROXY": "HTTPS_PROXY",
    "SSL_CERT_FILE": "SSL_CERT_FILE",
    "SSL_CERT_DIR": "SSL_CERT_DIR",
    "PIP_CERT": "SSL_CERT_FILE",
    "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
    "PIP_DEFAULT_TIMEOUT": "UV_HTTP_TIMEOUT",
}

# NVIDIA publishes these on PyPI as source only. They resolve from the metadata in the source. Those
# named "libs" download their libraries from NVIDIA's own index while pip builds them, so neither
# size nor requirements are on PyPI.
SOURCE_ONLY = {
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-cu13-libs",
    "tensorrt-rtx",
    "tensorrt-rtx-cu13",
}


class ResolutionError(Exception):
    """What conflicts, as uv prints it, or which package has no wheel."""


@dataclass(frozen=True, slots=True)
class Resolution:
    """What pip would download for one Python and extra; sizes in bytes."""

    versions: dict[str, str]
    nbytes: int
    cuda_nbytes: int
    source_only: tuple[str, ...]


def resolve(python: str, extra: str, constraints: Path) -> Resolution:
    """Resolve for Linux on x86-64.

    Raises:
        ResolutionError: the requirements conflict, or a package has no wheel for this Python.
    """
    chosen = {NONE: [], ALL: ["--all-extras"]}.get(extra, ["--extra", extra])
    done = subprocess.run(
        [
            *(
                UV,
                "pip",
                "compile",
                "--quiet",
                "--no-config",
                "--python",
                sys.executable,
                "--no-python-downloads",
            ),
            *(
                "--python-version",
                python,
                "--python-platform",
                "x86_64-manylinux_2_28",
                "--format",
                "pylock.toml",
            ),
            *("--constraints", str(constraints), *chosen, "pyproject.toml"),
        ],
        cwd=ROOT,
        env=environment(os.environ),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ResolutionError(done.stderr.strip())
    return resolution_from_lock(tomllib.loads(done.stdout), python)


def environment(caller: Mapping[str, str]) -> dict[str, str]:
    """The variables of ``KEPT`` that the caller has set, under uv's names."""
    return {name: caller[variable] for variable, name in KEPT.items() if variable in caller}


def resolution_from_lock(lock: dict[str, Any], python: str) -> Resolution:
    """Add up what a pylock.toml (PEP 751) lists.

    Raises:
        ResolutionError: a package has no wheel for this Python and is not in ``SOURCE_ONLY``.
    """
    packages = {package["name"]: package for package in lock["packages"]}
    source_only = tuple(name for name, package in packages.items() if not package.get("wheels"))
    if missing := [
        f"{name} {packages[name]['version']}" for name in source_only if name not in SOURCE_ONLY
    ]:
        raise ResolutionError(f"no wheel for Python {python} on Linux x86-64: {', '.join(missing)}")
    sizes = {
        name: (package.get("wheels") or [package["sdist"]])[0]["size"]
        for name, package in packages.items()
    }
    return Resolution(
        versions={name: package["version"] for name, package in packages.items()},
        nbytes=sum(sizes.values()),
        cuda_nbytes=sum(size for name, size in sizes.items() if name.startswith("nvidia-")),
        source_only=source_only,
    )


def main(argv: Sequence[str] | None = None) -> int:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", action="append", choices=PYTHONS, help="default: each")
    parser.add_argument(
        "--extra", action="append", choices=(NONE, *extras, ALL), help="default: each"
    )
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    options = parser.parse_args(argv)
    constraints = options.constraints.resolve()
    wanted = [
        (python, extra)
        for python in options.python or PYTHONS
        for extra in options.extra or (NONE, *extras, ALL)
    ]
    failed, source_only = 0, {}
    print(f"{'python':<8}{'extra':<10}{'packages':>8}{'MB':>8}{'of that CUDA libraries':>24}")
    with ThreadPoolExecutor(WORKERS) as pool:
        resolutions = [(*one, pool.submit(resolve, *one, constraints)) for one in wanted]
        for python, extra, resolution in resolutions:
            try:
                found = resolution.result()
            except ResolutionError as error:
                failed += 1
                print(f"{python:<8}{extra:<10}  fails\n{error}")
                continue
            source_only |= {name: found.versions[name] for name in found.source_only}
            sizes = (
                f"{len(found.versions):>8}{found.nbytes / 1e6:>8.0f}"
                f"{found.cuda_nbytes / 1e6:>24.0f}"
            )
            print(
                f"{python:<8}{extra:<10}{sizes}{' + source only' if found.source_only else ''}",
                flush=True,
            )
    if source_only:
        print(
            "source only on PyPI, resolved from the metadata in the source: "
            + ", ".join(f"{name} {version}" for name, version in sorted(source_only.items()))
        )
    if "tensorrt-cu13-libs" in source_only:
        print(
            "tensorrt-cu13-libs downloads TensorRT from NVIDIA's index when pip builds it: not "
            "counted above"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
