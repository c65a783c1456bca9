"""Changes of an engine directory that other processes may be reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from goc_deploy.disk import directory_lock, disk_errors, replacing
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import MANIFEST_NAME, FileEntry, Manifest
from goc_deploy.engine_dir.manifest_file import manifest_to_json
from goc_deploy.errors import GocError


@dataclass(frozen=True, slots=True)
class Amendment:
    """A change of an engine directory.

    Attributes:
        manifest: the new manifest; `amended` updates its list of files.
        files: path -> content of the files to write.
        removed: paths of listed files that are not needed any more.
    """

    manifest: Manifest
    files: Mapping[str, bytes]
    removed: Set[str] = field(default_factory=frozenset)


def amended(path: Path, doing: str, change: Callable[[EngineDir], Amendment | None]) -> EngineDir:
    """Lock an engine directory, read it again, and change it.

    The files are written first and the manifest that lists them last, each in one step. A process
    that reads the directory meanwhile sees a manifest and the files that it lists. That is also
    true after this process was killed. If an error is raised, new files that the manifest does not
    list are removed.

    Args:
        path: the engine directory.
        doing: name of the change in errors of the disk, such as ``adding a plan to DIR``.
        change: called with the directory as it is under the lock. It raises an error if the
            directory does not match what the caller read before, and returns None to change
            nothing.

    Returns:
        The directory after the change.

    Raises:
        ConflictError, ResourceError: the directory cannot be written.
        EngineDirError, SafetyError: the directory is corrupt.
    """
    with directory_lock(path), disk_errors(doing):
        current = EngineDir.open(path)
        amendment = change(current)
        if amendment is None:
            return current
        added = [
            FileEntry(name, len(content), sha256(content).hexdigest())
            for name, content in amendment.files.items()
        ]
        dropped = amendment.removed | amendment.files.keys()
        kept = [file for file in current.manifest.files if file.path not in dropped]
        files = tuple(sorted([*kept, *added], key=lambda file: file.path))
        after = EngineDir(path, replace(amendment.manifest, files=files))
        _write(current, after, amendment.files)
        for name in amendment.removed - amendment.files.keys():
            (path / name).unlink(missing_ok=True)
    return after


def _write(current: EngineDir, after: EngineDir, files: Mapping[str, bytes]) -> None:
    new: list[str] = []
    try:
        for name, content in files.items():
            target = after.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name not in current:
                new.append(name)
            with replacing(target) as temporary:
                temporary.write_bytes(content)
        with replacing(after.path / MANIFEST_NAME) as temporary:
            temporary.write_text(manifest_to_json(after.manifest), encoding="utf-8")
    except BaseException:
        for name in _unlisted(after.path, new):
            (after.path / name).unlink(missing_ok=True)
        raise


def _unlisted(path: Path, names: list[str]) -> list[str]:
    """Return files that the manifest does not list; a signal may arrive after its replacement."""
    try:
        current = EngineDir.open(path)
    except GocError:
        return []
    return [name for name in names if name not in current]
