"""Checks of the files that commands write besides engine directories."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from goc_deploy.disk import check_parent, disk_errors, nearest_parent
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.errors import ConflictError, UsageError
from goc_deploy.options import VIDEO_SUFFIXES, RunOptions

OTHER_OUTPUTS = ("latents_output", "trajectory_output", "report")  # of goc-run, besides --output


def dated_output(suffix: str) -> Path:
    """A name in the current folder that no file has."""
    base = datetime.now().strftime("goc-%Y%m%d-%H%M%S")
    names = (Path(f"{base}{end}{suffix}") for end in ("", *(f"-{i}" for i in range(2, 1000))))
    return next(path for path in names if not path.exists())


def check_outputs(engine_dir: Path, options: RunOptions) -> RunOptions:
    """Check the outputs of goc-run before any work is done.

    Returns:
        The options, with a dated picture or video as output if there is no other.

    Raises:
        UsageError: a suffix that no output has, or two outputs of one name.
        ConflictError: an output that cannot be written.
        EngineDirError, SafetyError: there is no other output, and ``engine_dir`` is corrupt.
    """
    what = (
        "--output ends in .png or .npz, in .mp4 or .webp for a video, or has no suffix and is a "
        "directory"
    )
    check_suffix(options.output, "", ".png", ".npz", *VIDEO_SUFFIXES, what=what)
    others = {name: getattr(options, name) for name in OTHER_OUTPUTS}
    if not options.output and not any(others.values()):
        manifest = EngineDir.open(engine_dir).manifest
        videos = manifest.model.video and manifest.image_size is not None
        options = replace(options, output=dated_output(".webp" if videos else ".png"))
    check_writable(options.output, may_be_folder=True)
    for path in others.values():
        check_writable(path)
    check_distinct(output=options.output, **others)
    return options


def check_suffix(path: Path | None, *suffixes: str, what: str) -> None:
    """Check the suffix of a path; the empty suffix stands for a name without one.

    Raises:
        UsageError: another suffix; ``what`` names those that are possible.
    """
    if path is not None and path.suffix.lower() not in suffixes:
        raise UsageError(f"{path.name}: {what}")


def check_writable(path: Path | None, *, may_be_folder: bool = False) -> None:
    """Refuse an output path before any work is done.

    With ``may_be_folder`` a name without a suffix is a folder.

    Raises:
        ConflictError: no such file can be made, or a folder stands in its place.
    """
    if path is None:
        return
    with disk_errors(f"checking {path}"):
        is_folder = may_be_folder and path.suffix == ""
        if path.is_dir() and not is_folder:
            raise ConflictError(f"{path} is a directory; choose another output file")
        if path.exists() and is_folder and not path.is_dir():
            raise ConflictError(
                f"{path} is a file; for single images give a directory, "
                "or a name that ends in .png or .npz"
            )
        target = path if path.is_dir() else nearest_parent(path)
        if not target.is_dir():
            raise ConflictError(
                f"{target} is not a directory, so {path} cannot be written; choose another output"
            )
        if not os.access(target, os.W_OK):
            raise ConflictError(f"{target} is not writable; choose another output")


def check_distinct(**paths: Path | None) -> None:
    """Refuse two outputs of one name, of which the second would replace the first.

    Raises:
        UsageError: naming the two options.
    """
    seen: dict[Path, str] = {}
    for option, path in paths.items():
        if path is None or (path.exists() and not path.is_file()):
            continue
        option, target = f"--{option.replace('_', '-')}", path.resolve()
        if target in seen:
            raise UsageError(
                f"{seen[target]} and {option} name the same file {path}; give each its own"
            )
        seen[target] = option


def check_folder(path: Path | None) -> None:
    """Check before any work is done that a folder for outputs exists or can be made by `written`.

    Raises:
        ConflictError: it cannot be made or written to, or a file stands in its place.
    """
    if path is None:
        return
    if path.is_dir() and not os.access(path, os.W_OK):
        raise ConflictError(f"{path} is not writable; choose another folder")
    if os.path.lexists(path) and not path.is_dir():
        raise ConflictError(f"{path} is a file, and a folder is needed; choose another name")
    check_parent(path)
