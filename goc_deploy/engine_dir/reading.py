"""Writing of complete engine directories, and verified reading of their files.

Writing: all files go to a temporary sibling, the manifest last, then one rename follows. Reading:
every file is opened once without following links and hashed. The bytes that were hashed are the
bytes that are returned.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from goc_deploy.disk import NO_FILES, TOO_MANY_FILES
from goc_deploy.engine_dir.manifest import MANIFEST_NAME, FileEntry, Manifest
from goc_deploy.engine_dir.manifest_file import MANIFEST_FORMAT, manifest_from_json
from goc_deploy.errors import ConflictError, EngineDirError, GocError, ResourceError, SafetyError

MAX_MANIFEST_BYTES = 8 * 2**20
_FIRST_KEY = re.compile(rb'\s*\{\s*"format"\s*:\s*"' + re.escape(MANIFEST_FORMAT.encode()) + rb'"')
_OURS_BY_NAME = re.compile(
    r"(.*/)?\.[^/]*(\.tmp-|plan-)|(onnx|plans|schedules|engines|vae|text_encoder|kernels)/"
)


def check_target(directory: Path, *, force: bool) -> None:
    """Check that an export to ``directory`` would replace nothing that must be kept.

    Raises:
        ConflictError: ``directory`` exists and is not an engine directory, or it is one and
            ``force`` is off.
    """
    if not holds_engine(directory):
        return
    if not force:
        raise ConflictError(
            f"{directory} already holds another engine; use `force=True` to replace it, "
            "or choose another output"
        )
    foreign = foreign_files(directory)
    if foreign:
        others = f" and {len(foreign) - 1} more files" if foreign[1:] else ""
        raise ConflictError(
            f"{directory} holds {foreign[0]!r}{others}, which no export wrote; move them "
            "away before you use `force=True`, or choose another output"
        )


def holds_engine(directory: Path) -> bool:
    """Whether an engine directory is there; False if nothing or an empty folder is.

    Raises:
        ConflictError: something else is there.
    """
    if not os.path.lexists(directory):
        return False
    if not directory.is_dir() or directory.is_symlink():
        raise ConflictError(f"{directory} exists and is not a directory; choose another output")
    if not any(directory.iterdir()):
        return False
    if not _is_ours(directory):
        raise ConflictError(
            f"{directory} exists and is not an engine directory that can be replaced; choose "
            "another output"
        )
    return True


def _is_ours(directory: Path) -> bool:
    """Whether the manifest begins like ours of any version, even if the rest is damaged."""
    try:
        with _open_beneath(directory, MANIFEST_NAME) as (fd, _):
            return _FIRST_KEY.match(os.read(fd, 200)) is not None
    except (OSError, GocError):
        return False


def foreign_files(directory: Path) -> list[str]:
    """Return files that the manifest does not list and that no command of ours leaves behind.

    The list is empty if the manifest cannot be read.
    """
    try:
        listed = {file.path for file in read_manifest(directory).files} | {MANIFEST_NAME}
    except GocError:
        return []
    paths = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(directory).as_posix() for path in paths)
    return sorted(name for name in names if name not in listed and not _OURS_BY_NAME.match(name))


def file_entry(root: Path, relative: str) -> FileEntry:
    """Hash a file that was just written."""
    with open(root / relative, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(relative, file.tell(), digest)


def files_below(root: Path) -> tuple[FileEntry, ...]:
    """Every file of a directory that was just written, hashed."""
    paths = sorted(
        str(path.relative_to(root).as_posix()) for path in root.rglob("*") if path.is_file()
    )
    return tuple(file_entry(root, path) for path in paths)


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of an engine directory.

    Raises:
        EngineDirError: the directory is not an engine directory, or is corrupt.
        SafetyError: the manifest names files outside the directory.
    """
    where = f"{directory / MANIFEST_NAME}"
    if not os.path.isdir(directory):  # unlike Path.is_dir, False for names that are too long
        raise EngineDirError(
            f"{directory} is not a directory; give the engine directory that goc-export wrote"
        )
    try:
        with _open_beneath(directory, MANIFEST_NAME) as (fd, size):
            if size > MAX_MANIFEST_BYTES:
                raise EngineDirError(
                    f"{where} has {size} bytes; at most {MAX_MANIFEST_BYTES} are accepted"
                )
            text = os.read(fd, size)
    except FileNotFoundError as cause:
        raise EngineDirError(
            f"{directory} has no {MANIFEST_NAME}, so it is not a complete engine directory; "
            "export again"
        ) from cause
    return manifest_from_json(text, where)


def read_verified(directory: Path, entry: FileEntry) -> memoryview:
    """Read a listed file and verify it against the manifest.

    The file is opened once and mapped. The bytes that are hashed are the bytes that are returned.

    Raises:
        EngineDirError: the file is missing, or has another size or digest.
        SafetyError: the file is a link, or not a regular file.
    """
    try:
        with _open_beneath(directory, entry.path) as (fd, size):
            if size != entry.size:
                raise EngineDirError(
                    f"{directory / entry.path} has {size} bytes but the manifest says "
                    f"{entry.size}; export again"
                )
            content = memoryview(mmap.mmap(fd, size, access=mmap.ACCESS_READ) if size else b"")
    except FileNotFoundError as cause:
        raise EngineDirError(f"{directory / entry.path} is missing; export again") from cause
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise EngineDirError(
            f"{directory / entry.path} was changed after the export (its SHA-256 differs); "
            "export again"
        )
    return content


@contextlib.contextmanager
def _open_beneath(directory: Path, relative: str) -> Iterator[tuple[int, int]]:
    """Open a regular file below a directory without following links; yields (descriptor, size)."""
    *folders, name = relative.split("/")
    where = directory / relative
    with contextlib.ExitStack() as stack:
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, fd)
            for folder in folders:
                fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                stack.callback(os.close, fd)
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=fd)
            stack.callback(os.close, fd)
        except FileNotFoundError:
            raise
        except OSError as cause:
            if cause.errno in (errno.ELOOP, errno.ENOTDIR):
                raise SafetyError(
                    f"{where} is or lies behind a symbolic link; an engine directory holds plain "
                    "files only"
                ) from cause
            if cause.errno in NO_FILES:
                raise ResourceError(f"{where} cannot be read: {TOO_MANY_FILES}") from cause
            raise EngineDirError(f"{where} cannot be read: {cause.strerror}") from cause
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise SafetyError(
                f"{where} is not a plain file with one name; an engine directory holds plain "
                "files only"
            )
        yield fd, status.st_size
