"""Reading checkpoints without running any code in them.

Accepted files are plain state dicts (``.pt``, ``.pth``), training checkpoints with ``ema`` or
``model`` weights, and ``.safetensors``. Tensors stay memory-mapped until they are read.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import mmap
import os
import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from goc_deploy.errors import ModelError, SafetyError
from goc_deploy.exporters.quantized_files import (
    FLOAT8,
    check_not_quantized,
    is_marker,
    refusal,
    with_scales,
)
from goc_deploy.options import CheckpointWeights

PREFIXES = ("module.", "_orig_mod.")
DIFFUSION_MODEL = "model.diffusion_model."  # prefix in files that may hold other models too
HEAD_BYTES = 9  # the first bytes of a file, which show its format
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_CALL = "Trying to call"  # in torch's message about a function that it does not allow
_ALLOCATOR = b"bytearray"  # no name in a state dict contains this word
_ALLOCATOR_GLOBAL = re.compile(
    rb"c(builtins|__builtin__)\nbytearray\n|bytearray.{0,4}\x93", re.DOTALL
)
_SAVE_HINT = "save it with torch.save(model.state_dict(), ...) or as .safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a checkpoint.

    Attributes:
        path: file or folder of the checkpoint.
        tensors: name -> tensor, without wrapper prefixes.
        weight_set: the set of weights that was selected: ``ema``, ``model`` or ``plain``.
        files: the files that were read, in a fixed order.
        scales: scales of all tensors, if some of them are float8: what 1 of their values stands
            for.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    weight_set: str
    files: tuple[Path, ...]
    scales: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """SHA-256 of the file; of several files, SHA-256 of their names and digests."""
        if len(self.files) == 1:
            return sha256_of(self.files[0])
        lines = [
            f"{sha256_of(file)} {file.relative_to(self.path).as_posix()}" for file in self.files
        ]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def dtypes(self) -> dict[str, int]:
        """Dtype name -> number of tensors, for the report."""
        names = [str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()]
        return {name: names.count(name) for name in sorted(set(names))}

    @property
    def nbytes_fp32(self) -> int:
        """Size in bytes of all tensors in float32."""
        return 4 * sum(tensor.numel() for tensor in self.tensors.values())


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_checkpoint(path: Path, weight_set: CheckpointWeights = "auto") -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: the file.
        weight_set: ``ema`` or ``model`` selects that part of a training checkpoint; ``auto``
            prefers ``ema``.

    Raises:
        ModelError: the file is missing, unreadable, truncated, or not a state dict.
        SafetyError: the file asks to import or call something that is not a tensor.
    """
    state, weight_set_name = _choose_weights(load_file(path), weight_set, path)
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ModelError(
                f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor; {_SAVE_HINT}"
            )
        tensors[_without_prefix(name)] = value
    if not tensors:
        raise ModelError(f"{path} holds no tensors; {_SAVE_HINT}")
    check_not_quantized(tensors, str(path))
    odd = [
        name
        for name, tensor in tensors.items()
        if not _is_plain(tensor) and not (is_marker(name) and tensor.numel() == 0)
    ]
    if odd:
        raise ModelError(
            f"{path}: no plain tensor with values in memory: {_some(odd)}; {_SAVE_HINT}"
        )
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > path.stat().st_size:
        raise ModelError(
            f"{path} claims {claimed} bytes of tensors but has {path.stat().st_size}; {_SAVE_HINT}"
        )
    if len(tensors) != len(state):
        raise ModelError(
            f"{path}: two tensors have the same name once {' and '.join(PREFIXES)} are removed; "
            f"{_SAVE_HINT}"
        )
    return Checkpoint(path, tensors, weight_set_name, (path,))


def of_diffusion_model(checkpoint: Checkpoint) -> Checkpoint:
    """The tensors of the diffusion model, of a file that may hold its VAE and encoders too.

    Other files are returned as they are.
    """
    tensors = {
        name.removeprefix(DIFFUSION_MODEL): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(DIFFUSION_MODEL)
    }
    return replace(checkpoint, tensors=tensors) if tensors else checkpoint


def of_float8(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose float8 weights have their scales apart, see `with_scales`.

    Raises:
        ModelError: scales and weights do not fit together.
    """
    tensors, scales = with_scales(checkpoint.tensors, str(checkpoint.path))
    return replace(checkpoint, tensors=tensors, scales=scales)


def load_file(path: Path) -> Any:
    """Read the content of a torch or safetensors file; tensors are memory-mapped if possible.

    Raises:
        ModelError: the file is missing, unreadable or truncated.
        SafetyError: the file asks to import or call something that is not a tensor.
    """
    _check_file(path)
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    return (
        _load_safetensors(path) if looks_like_safetensors(path, head) else _load_torch(path, head)
    )


def check_values(checkpoint: Checkpoint) -> None:
    """Check that every dtype is supported and every number is finite.

    Raises:
        ModelError: a tensor fails a check; the message names up to ten of them.
    """
    odd = [
        f"{n} ({str(t.dtype).removeprefix('torch.')})"
        for n, t in checkpoint.tensors.items()
        if t.dtype not in FLOATING and not (t.dtype in FLOAT8 and n in checkpoint.scales)
    ]
    if odd:
        raise ModelError(
            f"{checkpoint.path}: dtype not supported: {_some(odd)}; save weights as float32, "
            "float16 or bfloat16"
        )
    bad = [name for name, tensor in checkpoint.tensors.items() if not _all_finite(tensor)]
    if bad:
        raise ModelError(
            f"{checkpoint.path}: NaN or infinite values in {_some(bad)}; use a sound checkpoint"
        )


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a dense, non-empty CPU tensor: not meta, sparse, nested or quantized."""
    dense = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
    return dense and tensor.device.type == "cpu" and tensor.numel() > 0


def _all_finite(tensor: Tensor) -> bool:
    """Check a tensor in pieces, so that a memory-mapped tensor is never copied as a whole."""
    return all(
        bool(torch.isfinite(piece.float() if piece.dtype in FLOAT8 else piece).all())
        for piece in torch.split(tensor.reshape(-1), 2**22)
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _check_file(path: Path) -> None:
    try:
        status = path.stat()
    except (OSError, ValueError) as cause:  # ValueError: a name that no file can have
        reason = getattr(cause, "strerror", None) or cause
        raise ModelError(f"checkpoint {str(path)[:300]!r} cannot be read: {reason}") from cause
    if stat.S_ISDIR(status.st_mode):
        raise ModelError(f"checkpoint {path} is a directory; give a .pt, .pth or .safetensors file")
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(
            f"checkpoint {path} is not a regular file; give a .pt, .pth or .safetensors file"
        )
    if status.st_size == 0:
        raise ModelError(f"checkpoint {path} is empty; download or save it again")
    if not os.access(path, os.R_OK):
        raise ModelError(f"checkpoint {path} is not readable; check its permissions")


def looks_like_safetensors(path: Path, head: bytes) -> bool:
    """Whether a file is read as safetensors, by its name or its first `HEAD_BYTES` bytes."""
    return path.suffix == ".safetensors" or (
        len(head) == HEAD_BYTES and head[8:9] == b"{" and not head.startswith(b"PK")
    )


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError) as cause:
        raise ModelError(
            f"{path} is not a sound safetensors file: {cause}; download or save it again"
        ) from cause


def _load_torch(path: Path, head: bytes) -> Any:
    is_zip = head.startswith(b"PK")
    if is_zip:
        _check_zip(path)
    elif head.startswith(b"GGUF"):
        raise refusal(str(path), "GGUF", "by its first bytes")
    elif not head.startswith(b"\x80"):
        raise ModelError(f"{path} is neither a torch checkpoint nor safetensors; {_SAVE_HINT}")
    try:
        _refuse_allocation(path, is_zip=is_zip)
        if is_zip:
            _refuse_globals(path, torch.serialization.get_unsafe_globals_in_checkpoint(path))
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # torch warns about old pickle protocols; only success or failure of loading matters.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as cause:  # torch raises exceptions of many types for a damaged file
        named = re.search(r"GLOBAL ([\w.]+)", str(cause))
        if isinstance(cause, SafetyError | ModelError):
            raise
        if isinstance(cause, pickle.UnpicklingError) and (named or _CALL in str(cause)):
            asked = f": it names {named[1]}" if named else ""
            raise SafetyError(
                f"{path} is refused, it asks to run code{asked}; {_SAVE_HINT}"
            ) from cause
        reason = str(cause).splitlines()[0][:200] if str(cause) else type(cause).__name__
        raise ModelError(
            f"{path} is not a sound torch checkpoint, it may end early: {reason}; download or save "
            "it again"
        ) from cause


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as cause:
        raise ModelError(
            f"{path} is cut short or damaged ({cause}); download or save it again"
        ) from cause
    if not any(member.filename.endswith("/data.pkl") for member in members):
        raise ModelError(f"{path} is a zip archive but not a torch checkpoint; {_SAVE_HINT}")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ModelError(f"{path} has compressed members, which torch never writes; {_SAVE_HINT}")


def _refuse_allocation(path: Path, *, is_zip: bool) -> None:
    """Refuse ``bytearray``, which torch accepts although a small file can allocate any size.

    A legacy file begins with its pickles, so the whole file is searched.
    """
    with contextlib.ExitStack() as stack:
        if is_zip:
            archive = stack.enter_context(zipfile.ZipFile(path))
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            allocates = any(_ALLOCATOR in archive.read(name) for name in names)
        else:
            content = stack.enter_context(open(path, "rb"))
            view = stack.enter_context(mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ))
            allocates = _ALLOCATOR_GLOBAL.search(view) is not None
    if allocates:
        raise SafetyError(
            f"{path} is refused, it asks for memory by a number: it names bytearray; {_SAVE_HINT}"
        )


def _refuse_globals(path: Path, names: list[str]) -> None:
    names = [name for name in names if name != "argparse.Namespace"]
    if any(name.startswith("torch.nn.modules.") for name in names):
        raise ModelError(f"{path} holds a whole module, not its weights; {_SAVE_HINT}")
    if names:
        raise SafetyError(
            f"{path} is refused, it asks to run code: it names {_some(sorted(names))}; {_SAVE_HINT}"
        )


def _choose_weights(
    content: Any, weight_set: CheckpointWeights, path: Path
) -> tuple[dict[Any, Any], str]:
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not a state dict; {_SAVE_HINT}")
    sets = {
        name: content[name]
        for name in ("ema", "model", "state_dict")
        if isinstance(content.get(name), dict)
    }
    if weight_set != "auto":
        if weight_set not in sets:
            raise ModelError(
                f"{path} has no {weight_set!r} weights; it has "
                f"{', '.join(sets) or 'a plain state dict'}"
            )
        return dict(sets[weight_set]), weight_set
    for name, state in sets.items():
        return dict(state), name
    return content, "plain"


def _without_prefix(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name
