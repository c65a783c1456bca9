"""Writing an engine directory so that it is whole or absent, and reading it so that nothing unverified gets through.

Writing: everything goes to a temporary sibling, the manifest last, then one rename. Reading: every file is opened
once without following links, hashed, and handed on as the bytes that were hashed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import mmap
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import filelock

from goc_deploy.errors import ConflictError, EngineDirError, GocError, ResourceError, SafetyError
from goc_deploy.manifest import (
    MANIFEST_FORMAT,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    manifest_from_json,
)

LOCK_SECONDS = 10.0
LEFTOVER_SECONDS = 600.0
MAX_MANIFEST_BYTES = 8 * 2**20
NO_FILES = (errno.EMFILE, errno.ENFILE)
TOO_MANY_FILES = "this process has too many open files; raise the limit (ulimit -n)"
_FIRST_KEY = re.compile(rb'\s*\{\s*"format"\s*:\s*"' + re.escape(MANIFEST_FORMAT.encode()) + rb'"')
_OURS_BY_NAME = re.compile(
    r"(.*/)?\.[^/]*(\.tmp-|plan-)|(onnx|plans|schedules|engines|vae|text_encoder|kernels)/"
)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def directory_lock(directory: Path, seconds: float | None = None) -> Iterator[None]:
    """Hold the lock of an engine directory: a sibling file, released by the system if the holder dies.

    Args:
        directory: what is locked.
        seconds: how long to wait for another holder; by default ten.

    Raises:
        ConflictError: another process holds it for longer than that, or the parent cannot be written.
    """
    check_parent(directory)
    directory = directory.absolute()
    with made_parents(directory), _locked(directory, seconds):
        yield


@contextlib.contextmanager
def _locked(directory: Path, seconds: float | None) -> Iterator[None]:
    timeout = LOCK_SECONDS if seconds is None else seconds
    lock = filelock.FileLock(directory.parent / f".{directory.name}.lock", timeout=timeout)
    with disk_errors(f"locking {directory}"):
        try:
            lock.acquire()
        except filelock.Timeout as cause:
            raise ConflictError(
                f"another process is writing {directory}; wait for it, or choose another directory"
            ) from cause
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(
                lock.lock_file
            )  # still held: whoever waits sees that the file is gone, and retries
        lock.release()


@contextlib.contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn what the system says about disk and permissions into an error of ours."""
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
    """Check that ``directory`` may be made, with parents that are missing.

    Raises:
        ConflictError: the nearest parent that exists is not a directory, or not writable.
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
    """The nearest parent that exists."""
    return next(parent for parent in path.absolute().parents if os.path.lexists(parent))


@contextlib.contextmanager
def made_parents(path: Path) -> Iterator[None]:
    """Make missing parents of ``path``; they stay if the body ends well.

    Raises:
        ConflictError, ResourceError: the system refuses to.
    """
    made: list[Path] = []
    try:
        with disk_errors(f"making the folder of {path}"):
            for parent in reversed(path.absolute().parents):
                if not parent.exists():
                    parent.mkdir(exist_ok=True)  # somebody else may be making it
                    made.append(parent)
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # somebody else has put something there
            for parent in reversed(made):
                parent.rmdir()
        raise


def check_target(directory: Path, *, force: bool) -> None:
    """Check that nothing that must be kept stands at ``directory``.

    Raises:
        ConflictError: something that is not an engine directory is there, or one is and ``force`` is off.
    """
    if not os.path.lexists(directory):
        return
    if not directory.is_dir() or directory.is_symlink():
        raise ConflictError(f"{directory} exists and is not a directory; choose another output")
    if not any(directory.iterdir()):
        return
    if not _is_ours(directory):
        raise ConflictError(
            f"{directory} exists and is not an engine directory that can be replaced; choose another output"
        )
    if not force:
        raise ConflictError(
            f"{directory} already holds another engine; use --force to replace it, or choose another output"
        )
    foreign = foreign_files(directory)
    if foreign:
        raise ConflictError(
            f"{directory} holds {foreign[0]!r}{f' and {len(foreign) - 1} more files' if foreign[1:] else ''}, which no export wrote; move "
            "them away before you use --force, or choose another output"
        )


def _is_ours(directory: Path) -> bool:
    """Whether a directory has a manifest that begins as ours of any version do, however damaged it is behind that."""
    try:
        with _open_beneath(directory, MANIFEST_NAME) as (fd, _):
            return _FIRST_KEY.match(os.read(fd, 200)) is not None
    except (OSError, GocError):
        return False


def foreign_files(directory: Path) -> list[str]:
    """Files in an engine directory that its manifest does not list and no command of ours leaves there; none where the manifest
    cannot be read."""
    try:
        listed = {file.path for file in read_manifest(directory).files} | {MANIFEST_NAME}
    except GocError:
        return []
    paths = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    names = (path.relative_to(directory).as_posix() for path in paths)
    return sorted(name for name in names if name not in listed and not _OURS_BY_NAME.match(name))


def check_free_space(directory: Path, needed_bytes: int) -> None:
    """Raise ResourceError unless the disk has room for ``needed_bytes`` and a fifth more."""
    free = shutil.disk_usage(directory.absolute().parent).free
    if free < needed_bytes * 1.2:
        raise ResourceError(
            f"{directory.absolute().parent} has {free / 1e9:.2f} GB free but the engine needs {needed_bytes * 1.2 / 1e9:.2f} GB; free some space"
        )


def remove_leftovers(folder: Path, prefix: str, seconds: float = 0.0) -> None:
    """Remove what commands that were killed left in a folder: names ``PREFIX<process>-<8 digits>`` whose process is gone.

    Args:
        folder: where.
        prefix: of the names.
        seconds: keep what changed since then; 0 where a lock keeps other writers, of other machines too, away.
    """
    pattern = re.compile(re.escape(prefix) + r"(\d{1,9})-[0-9a-f]{8}(\.\w+)?")
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            made = pattern.fullmatch(path.name)
            if (
                not made
                or os.path.exists(f"/proc/{made[1]}")
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
    """A folder that vanishes with the body; those that killed commands left vanish first. For who holds the lock."""
    remove_leftovers(parent, prefix)
    folder = parent / _own_name(prefix)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``directory`` when the body ends well, and vanishes otherwise. For who holds the lock.

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
    """Swap two directories in one step; where the system cannot, replace with two renames."""
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
    """A temporary sibling that replaces ``path`` in one step when the body ends well, and vanishes otherwise.

    What is no regular file, such as a device, is written directly.
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
    """Read the manifest of an engine directory.

    Raises:
        EngineDirError: not an engine directory, or a corrupt one.
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
                    f"{where} has {size} bytes, more than {MAX_MANIFEST_BYTES} are not read"
                )
            text = os.read(fd, size)
    except FileNotFoundError as cause:
        raise EngineDirError(
            f"{directory} has no {MANIFEST_NAME}, so it is not a complete engine directory; export again"
        ) from cause
    return manifest_from_json(text, where)


def read_verified(directory: Path, entry: FileEntry) -> memoryview:
    """The bytes of a listed file, verified against the manifest.

    The file is opened once and mapped; the bytes that are hashed are the bytes that are returned.

    Raises:
        EngineDirError: missing, of another size or digest.
        SafetyError: a link, or not a regular file.
    """
    try:
        with _open_beneath(directory, entry.path) as (fd, size):
            if size != entry.size:
                raise EngineDirError(
                    f"{directory / entry.path} has {size} bytes but the manifest says {entry.size}; export again"
                )
            content = memoryview(mmap.mmap(fd, size, access=mmap.ACCESS_READ) if size else b"")
    except FileNotFoundError as cause:
        raise EngineDirError(f"{directory / entry.path} is missing; export again") from cause
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise EngineDirError(
            f"{directory / entry.path} was changed after the export (its SHA-256 differs); export again"
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
                    f"{where} is or lies behind a symbolic link; an engine directory holds plain files only"
                ) from cause
            if cause.errno in NO_FILES:
                raise ResourceError(f"{where} cannot be read: {TOO_MANY_FILES}") from cause
            raise EngineDirError(f"{where} cannot be read: {cause.strerror}") from cause
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise SafetyError(
                f"{where} is not a plain file with one name; an engine directory holds plain files only"
            )
        yield fd, status.st_size
