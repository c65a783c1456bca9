"""Arrays from files: what safetensors writes, and headers that lie."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from goc_deploy.conditions.tensor_files import (
    array_from_npy,
    arrays_from_file,
    arrays_from_safetensors,
    latents_from_file,
)
from goc_deploy.errors import GocError, UsageError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "half": torch.tensor([0.5, -2.0], dtype=torch.float16),
    "brain": torch.tensor([[1.5, -3.0]], dtype=torch.bfloat16),
    "mask": torch.tensor([[1, 0]]),
    "flags": torch.tensor([True, False]),
}


def with_header(header: object, tensors: bytes = b"\0" * 24) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


ENTRY = '"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}'
TWICE = (lambda text: len(text).to_bytes(8, "little") + text + b"\0" * 24)(
    f"{{{ENTRY}, {ENTRY}}}".encode()
)


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(save(TENSORS, {"format": "pt"}))
    found = arrays_from_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        expected = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        np.testing.assert_array_equal(found[name], expected.numpy())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header too small"),
        (b"\xff" * 20, "header too large"),
        (with_header([1]), "not a sound safetensors file"),
        (
            with_header({"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 28]}}),
            "not a sound safetensors file",
        ),
        (
            with_header({"a": {"dtype": "F32", "shape": [7], "data_offsets": [0, 24]}}),
            "not a sound safetensors file",
        ),
        (
            with_header({"a": {"dtype": "F32", "shape": [-6], "data_offsets": [0, 24]}}),
            "not a sound safetensors file",
        ),
        (
            with_header({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
            "not a sound safetensors file",
        ),
        (
            with_header({"a": {"dtype": "U16", "shape": [12], "data_offsets": [0, 24]}}),
            "the dtype of 'a' is U16; use float32",
        ),
        (
            with_header({"a": {"dtype": "F32", "shape": 6, "data_offsets": [0]}}),
            "not a sound safetensors file",
        ),
        (with_header({"a": 3}), "not a sound safetensors file"),
        (TWICE, "the header of x is not valid JSON"),
    ],
)
def test_headers_that_lie_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        arrays_from_safetensors(content, "x")


@given(st.binary(max_size=60), st.integers(0, 200))
def test_damage_is_never_more_than_an_error_of_ours(noise: bytes, cut: int) -> None:
    content = save({"a": TENSORS["a"]})
    for damaged in (noise, content[:cut], content[:cut] + noise):
        try:
            arrays_from_safetensors(damaged, "x")
        except UsageError:
            continue


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in .npz or .safetensors"):
        arrays_from_file(tmp_path / "x.bin")
    with pytest.raises(UsageError, match=r"cannot be read: .*No such file"):
        arrays_from_file(tmp_path / "x.npz")
    np.savez(tmp_path / "o.npz", a=np.array([{}], dtype=object))
    with pytest.raises(UsageError, match="cannot be read: Object arrays cannot be loaded"):
        arrays_from_file(tmp_path / "o.npz")
    np.savez(tmp_path / "cut.npz", a=np.zeros(9))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-30])
    with pytest.raises(UsageError, match="cannot be read"):
        arrays_from_file(tmp_path / "cut.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(UsageError, match="cannot be read"):
        arrays_from_file(tmp_path / "one.npz")


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros(2**27, np.uint8))
    with pytest.raises(UsageError, match=r"bytes that unpack to 134217856; save it uncompressed"):
        arrays_from_file(tmp_path / "x.npz")


def test_randomly_damaged_archives_end_as_errors_of_ours(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.arange(50), b=np.ones((2, 3)))
    sound, generator = (tmp_path / "x.npz").read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(sound)
        for _ in range(3):
            content[generator.integers(len(content))] = generator.integers(256)
        (tmp_path / "x.npz").write_bytes(content)
        with contextlib.suppress(UsageError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arrays_from_file(tmp_path / "x.npz")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".npy"])
def test_devices_and_pipes_are_refused_and_do_not_hang(tmp_path: Path, suffix: str) -> None:
    read = array_from_npy if suffix == ".npy" else arrays_from_file
    zeros, pipe = tmp_path / f"zeros{suffix}", tmp_path / f"pipe{suffix}"
    zeros.symlink_to("/dev/zero")
    os.mkfifo(pipe)
    for path in (zeros, pipe):
        with pytest.raises(UsageError, match="cannot be read: it is not a regular file"):
            read(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 no archive",
        b"\x93NUMPY\x01\x00\x46\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000, 1000, 1000, 1000)}\n"[:70],
        b"\x93NUMPY\x01\x00\x10\x00{'descr': ((((  \n",
        b"\x93NUMPY\x01\x00\x10\x00" + b"\xff" * 16,
    ],
)
def test_damaged_latents_are_a_usage_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read"):
        latents_from_file(tmp_path / "x.npy")


def test_randomly_damaged_latents_end_as_errors_of_ours(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 4, 2, 2), np.float32))
    sound, generator = (tmp_path / "x.npy").read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        content = bytearray(sound)
        for _ in range(3):
            content[generator.integers(140)] = generator.integers(256)
        (tmp_path / "x.npy").write_bytes(content)
        with contextlib.suppress(GocError):
            latents_from_file(tmp_path / "x.npy")
