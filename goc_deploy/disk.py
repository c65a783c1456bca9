"""Writing that leaves a whole file or directory or none: locks, staging, atomic replacement."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import filelock
import numpy as np

from goc_deploy.errors import ConflictError, ResourceError


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which becomes ``path`` when it is whole.

    Missing parent folders are created.

    Raises:
        ConflictError, ResourceError: the system refuses to write.
    """
    with made_parents(path), disk_errors(f"writing {path}"), replacing(path) as temporary:
        yield temporary


def save_array(values: np.ndarray, path: Path) -> None:
    """Write a ``.npy`` file, whatever the suffix of its name is."""
    with written(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
        # NumPy could write the array itself, but does not report why a write fails.
        file.write(np.ascontiguousarray(values).data)


def save_text(text: str, path: Path) -> None:
    """Write a text file."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


LOCK_SECONDS = 10.0
LEFTOVER_SECONDS = 600.0
NO_FILES = (errno.EMFILE, errno.ENFILE)
TOO_MANY_FILES = "this process has too many open files; raise the limit (ulimit -n)"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def directory_lock(directory: Path, seconds: float | None = None) -> Iterator[None]:
    """Hold the lock of an engine directory, a file beside it.

    The system releases the lock if the holder dies.

    Args:
        directory: the directory to lock.
        seconds: how long to wait for another holder; None is ten seconds.

    Raises:
        ConflictError: another process holds the lock for longer, or the parent is not writable.
    """
    check_parent(directory)
    directory = directory.absolute()
    with made_parents(directory), _locked(directory, seconds):
        yield


@contextlib.contextmanager
def _locked(directory: Path, seconds: float | None) -> Iterator[None]:
    timeout = LOCK_SECONDS if seconds is None else seconds
    lock = filelock.FileLock(directory.parent / f".{directory.name}.lock", timeout=timeout)
    try:
        with disk_errors(f"locking {directory}"):
            try:
                lock.acquire()
            except filelock.Timeout as cause:
                raise ConflictError(
                    f"another process is writing {directory}; wait for it, or choose another "
                    "directory"
                ) from cause
        yield
    finally:
        with contextlib.suppress(filelock.Timeout, OSError):
            lock.acquire(timeout=0)  # a signal may have interrupted the first call halfway
            os.unlink(lock.lock_file)  # a waiting process notices this and tries again
        lock.release(force=True)


@contextlib.contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn errors of the system about disk and permissions into errors of goc_deploy."""
    try:
        yield
    except OSError as cause:
        reason = cause.strerror or str(cause)
        if cause.errno in NO_FILES:
            raise ResourceError(f"{doing}: {TOO_MANY_FILES}") from cause
        if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"{doing}: the disk is full ({reason}); free some space and run again"
            ) from cause
        raise ConflictError(
            f"{doing}: {reason}{f' ({cause.filename})' if cause.filename else ''}"
        ) from cause


def check_parent(directory: Path) -> None:
    """Check that ``directory`` can be created, with its missing parents.

    Raises:
        ConflictError: the nearest existing parent is not a directory, or not writable.
    """
    with disk_errors(f"checking {directory}"):
        parent = nearest_parent(directory)
    if not parent.is_dir():
        raise ConflictError(
            f"{parent} is not a directory, so {directory} cannot be made; choose another output"
        )
    if not os.access(parent, os.W_OK):
        raise ConflictError(f"{parent} is not writable; choose another output")


def nearest_parent(path: Path) -> Path:
    """Return the nearest parent that exists."""
    return next(parent for parent in path.absolute().parents if os.path.lexists(parent))


@contextlib.contextmanager
def made_parents(path: Path) -> Iterator[None]:
    """Create missing parents of ``path``; they are removed if the body raises.

    Raises:
        ConflictError, ResourceError: the system refuses to create one.
    """
    created: list[Path] = []
    try:
        with disk_errors(f"making the folder of {path}"):
            for parent in reversed(path.absolute().parents):
                if not parent.exists():
                    parent.mkdir(exist_ok=True)  # another process may be creating it
                    created.append(parent)
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # another process has put something into it
            for parent in reversed(created):
                parent.rmdir()
        raise


def check_free_space(directory: Path, needed_bytes: int) -> None:
    """Raise ResourceError unless the disk has room for 120 percent of ``needed_bytes``."""
    free = shutil.disk_usage(directory.absolute().parent).free
    if free < needed_bytes * 1.2:
        raise ResourceError(
            f"{directory.absolute().parent} has {free / 1e9:.2f} GB free but the engine needs "
            f"{needed_bytes * 1.2 / 1e9:.2f} GB; free some space"
        )


def remove_leftovers(folder: Path, prefix: str, seconds: float = 0.0) -> None:
    """Remove temporary files of commands that were killed.

    Their names are ``PREFIX<process>-<8 digits>``, with a process that has ended.

    Args:
        folder: the folder to clean up.
        prefix: prefix of the names.
        seconds: keep what changed within this time; 0 if a lock excludes other writers, also those
            on other machines.
    """
    pattern = re.compile(re.escape(prefix) + r"(\d{1,9})-[0-9a-f]{8}(\.\w+)?")
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            temporary = pattern.fullmatch(path.name)
            if (
                not temporary
                or os.path.exists(f"/proc/{temporary[1]}")
                or time.time() - path.lstat().st_mtime < seconds
            ):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _own_name(prefix: str) -> str:
    return f"{prefix}{os.getpid()}-{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a folder that is removed after the body. The caller must hold the lock.

    Folders that killed commands left are removed first.
    """
    remove_leftovers(parent, prefix)
    folder = parent / _own_name(prefix)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Yield a temporary sibling that becomes ``directory`` if the body does not raise.

    Otherwise it is removed. The caller must hold the lock.

    An existing directory is swapped out atomically and removed afterwards.

    Raises:
        ConflictError, ResourceError: the system refuses to write.
    """
    directory = directory.absolute()
    remove_leftovers(directory.parent, f".{directory.name}.tmp-")
    stage = directory.parent / _own_name(f".{directory.name}.tmp-")
    try:
        with disk_errors(f"writing {directory}"):
            stage.mkdir()
            yield stage
            _sync_tree(stage)
            if directory.exists() and any(directory.iterdir()):
                _exchange(stage, directory)
            else:
                os.rename(stage, directory)
            _sync(directory.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _exchange(left: Path, right: Path) -> None:
    """Swap two directories in one step; if the system cannot, replace with two renames."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if (
        renameat2
        and renameat2(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE)
        == 0
    ):
        return
    aside = right.parent / f".{right.name}.old-{uuid.uuid4().hex[:8]}"
    os.rename(right, aside)
    os.rename(left, right)
    os.rename(aside, left)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling that replaces ``path`` in one step if the body does not raise.

    Otherwise it is removed.

    A path that is not a regular file, such as a device, is written directly.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    prefix = f".{path.stem}.tmp-"
    remove_leftovers(path.parent, prefix, LEFTOVER_SECONDS)
    temporary = path.with_name(_own_name(prefix) + path.suffix)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
