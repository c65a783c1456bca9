from __future__ import annotations

import argparse
import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from goc_deploy.errors import GocError, ModelError, SafetyError
from goc_deploy.exporters.architectures.dit import check_tensors, spec_from_tensors
from goc_deploy.exporters.checkpoint import check_values, load_checkpoint
from tests.conftest import GOLDEN

STATE = torch.load(GOLDEN / "model.pt", weights_only=True)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


def saved(folder: Path, value: Any, name: str = "model.pt", **more: Any) -> Path:
    torch.save(value, folder / name, **more)
    return folder / name


def assert_same(found: Path, weight_set: str = "plain", **more: Any) -> None:
    checkpoint = load_checkpoint(found, **more)
    assert checkpoint.weight_set == weight_set
    assert checkpoint.tensors.keys() == STATE.keys()
    assert all(torch.equal(checkpoint.tensors[name], STATE[name]) for name in STATE)


def test_a_plain_state_dict_loads() -> None:
    assert_same(GOLDEN / "model.pt")


def test_a_legacy_file_that_is_no_zip_loads(tmp_path: Path) -> None:
    assert_same(saved(tmp_path, STATE, _use_new_zipfile_serialization=False))


def test_safetensors_load_whatever_the_name(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.bin"):
        save_file(STATE, tmp_path / name)
        assert_same(tmp_path / name)


def test_a_training_checkpoint_gives_its_ema_unless_told_otherwise(tmp_path: Path) -> None:
    zeros = {name: torch.zeros_like(value) for name, value in STATE.items()}
    path = saved(
        tmp_path,
        {
            "model": zeros,
            "ema": STATE,
            "opt": {"step": 3},
            "args": argparse.Namespace(model="DiT-XL/2"),
        },
    )
    assert_same(path, "ema")
    assert not load_checkpoint(path, "model").tensors["pos_embed"].any()
    with pytest.raises(ModelError, match="no 'ema' weights; it has a plain state dict"):
        load_checkpoint(GOLDEN / "model.pt", "ema")


def test_wrapper_prefixes_are_removed(tmp_path: Path) -> None:
    assert_same(
        saved(tmp_path, {f"module._orig_mod.{name}": value for name, value in STATE.items()})
    )


def test_a_link_to_a_checkpoint_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link.pt").symlink_to(GOLDEN / "model.pt")
    assert_same(tmp_path / "link.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_asks_to_run_code_is_refused_and_does_not_run(
    tmp_path: Path, legacy: bool
) -> None:
    path = saved(
        tmp_path, {"x": Malicious(tmp_path / "pwned")}, _use_new_zipfile_serialization=not legacy
    )
    with pytest.raises(SafetyError, match=r"asks to run code: it names (posix|nt)\.system"):
        load_checkpoint(path)
    assert not (tmp_path / "pwned").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "pwned").exists(), (
        "the file must really be dangerous, or this test shows nothing"
    )


def test_a_bare_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Malicious(tmp_path / "pwned")))
    with pytest.raises(GocError):
        load_checkpoint(path)
    assert not (tmp_path / "pwned").exists()


def test_a_whole_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError,
        match=r"whole module, not its weights; save it with torch.save\(model.state_dict",
    ):
        load_checkpoint(saved(tmp_path, torch.nn.Linear(2, 2)))


def _zip_of_something_else(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "hello")


def _compressed(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "cannot be read: No such file"),
        (lambda p: p.mkdir(), "is a directory"),
        (os.mkfifo, "not a regular file"),
        (lambda p: p.touch(), "is empty"),
        (
            lambda p: p.write_text("hello, I am a text file"),
            "neither a torch checkpoint nor safetensors",
        ),
        (
            lambda p: p.write_bytes((GOLDEN / "model.pt").read_bytes()[:-5000]),
            "cut short or damaged",
        ),
        (
            lambda p: p.write_bytes((GOLDEN / "model.pt").read_bytes()[:300_000]),
            "cut short or damaged",
        ),
        (_zip_of_something_else, "zip archive but not a torch checkpoint"),
        (_compressed, "compressed members"),
        (
            lambda p: p.write_bytes(b"\x80\x02garbage"),
            "not a sound torch checkpoint|asks to run code",
        ),
        (lambda p: p.write_bytes(b"\xff" * 8 + b"{" + b"x" * 100), "not a sound safetensors file"),
        (
            lambda p: torch.save({"a": torch.ones(1).expand(10**12)}, p),
            "claims 4000000000000 bytes of tensors",
        ),
        (lambda p: torch.save([1, 2], p), "holds a list, not a state dict"),
        (lambda p: torch.save({}, p), "holds no tensors"),
        (lambda p: torch.save({"a": 3}, p), "entry 'a' is a int, not a tensor"),
        (lambda p: torch.save({"a": torch.ones(1), "module.a": torch.ones(1)}, p), "same name"),
    ],
)
def test_files_that_are_no_checkpoint_get_one_sentence(
    tmp_path: Path, make: Any, message: str
) -> None:
    path = tmp_path / "model.pt"
    make(path)
    with pytest.raises(GocError, match=message) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [1, 9, 100, 4000, -1, -1000])
def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, keep: int) -> None:
    save_file(STATE, tmp_path / "whole.safetensors")
    path = tmp_path / "cut.safetensors"
    path.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:keep])
    with pytest.raises(ModelError, match="not a sound safetensors file"):
        load_checkpoint(path)


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    bad = {**STATE, "pos_embed": STATE["pos_embed"] * float("nan")}
    checkpoint = load_checkpoint(saved(tmp_path, bad))
    with pytest.raises(
        ModelError,
        match="NaN or infinite values in pos_embed; use a sound checkpoint",
    ):
        check_values(checkpoint)


def test_dtypes_that_are_no_weights_are_named(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(
        saved(tmp_path, {**STATE, "pos_embed": STATE["pos_embed"].to(torch.int8)})
    )
    with pytest.raises(ModelError, match=r"dtype not supported: pos_embed \(int8\)"):
        check_values(checkpoint)


def test_the_spec_is_read_off_the_tensors() -> None:
    spec = spec_from_tensors(STATE, 4)
    assert (spec.depth, spec.hidden, spec.heads, spec.mlp_hidden, spec.patch, spec.grid) == (
        4,
        64,
        4,
        256,
        2,
        4,
    )
    assert (spec.channels, spec.choices, spec.learn_sigma) == (4, 10, True)


@pytest.mark.parametrize(("hidden", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_heads_of_the_known_sizes_need_no_option(hidden: int, heads: int) -> None:
    with torch.device("meta"):
        grown = {**STATE, "x_embedder.proj.weight": torch.empty(hidden, 4, 2, 2)}
    assert spec_from_tensors(grown, None).heads == heads


def test_unknown_heads_are_asked_for() -> None:
    with pytest.raises(
        ModelError, match="heads cannot be read off a width of 64; give `num_heads`"
    ):
        spec_from_tensors(STATE, None)
    with pytest.raises(ModelError, match="5 heads do not divide the width 64"):
        spec_from_tensors(STATE, 5)


def test_a_depth_that_no_model_has_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ModelError, match="1000000001 blocks, at most 1000"):
        spec_from_tensors({**STATE, "blocks.1000000000.attn.qkv.weight": torch.ones(1)}, 4)


def test_tensors_that_do_not_fit_are_listed() -> None:
    bad = {**STATE, "extra.weight": torch.ones(1), "blocks.0.attn.proj.bias": torch.ones(3)}
    del bad["blocks.1.mlp.fc1.bias"]
    with pytest.raises(ModelError) as caught:
        check_tensors(bad, spec_from_tensors(bad, 4))
    for part in (
        "1 missing: blocks.1.mlp.fc1.bias",
        "1 unexpected: extra.weight",
        "blocks.0.attn.proj.bias (3,), expected (64,)",
    ):
        assert part in str(caught.value)


def raw_pickle(folder: Path, code: bytes) -> Path:
    (folder / "raw.pt").write_bytes(b"\x80\x02" + code + b".")
    return folder / "raw.pt"


def zipped(folder: Path, code: bytes) -> Path:
    """A torch checkpoint whose pickle is that code."""
    source, target = saved(folder, {"a": torch.ones(2)}), folder / "zipped.pt"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(
                name, b"\x80\x02" + code + b"." if name.endswith("/data.pkl") else old.read(name)
            )
    return target


@pytest.mark.parametrize("make", [raw_pickle, zipped])
@pytest.mark.parametrize(
    "code",
    [
        b"cbuiltins\nbytearray\nI1000000000000\n\x85R",
        b"\x8c\x08builtins\x8c\x09bytearray\x93I9\n\x85R",
    ],
)
def test_a_pickle_does_not_allocate_by_a_number(
    make: Callable[[Path, bytes], Path], code: bytes, tmp_path: Path
) -> None:
    with pytest.raises(SafetyError, match="asks for memory by a number: it names bytearray"):
        load_checkpoint(make(tmp_path, code))


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("kind", ["meta", "sparse", "csr", "nested", "empty"])
def test_tensors_without_plain_values_are_named(kind: str, tmp_path: Path) -> None:
    odd = {
        "meta": lambda: torch.empty(2, 2, device="meta"),
        "sparse": lambda: torch.eye(2).to_sparse(),
        "csr": lambda: torch.eye(2).to_sparse_csr(),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        "empty": lambda: torch.ones(0, 3),
    }[kind]()
    with pytest.raises(ModelError, match="x"):
        load_checkpoint(saved(tmp_path, {**STATE, "x": odd}))


@pytest.mark.parametrize("legacy", [False, True])
def test_damage_is_damage_and_no_malice(legacy: bool, tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.ones(64)}, _use_new_zipfile_serialization=not legacy)
    sound, kinds = path.read_bytes(), []
    generator = random.Random(0)
    for _ in range(150):
        content = bytearray(sound)
        for _ in range(generator.choice((1, 4))):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(content)
        try:
            load_checkpoint(path)
        except SafetyError as error:
            kinds.append("it names" in str(error) or "Trying" in str(error.__cause__))
        except GocError:
            pass
    assert all(kinds)


def test_a_label_table_without_a_class_is_refused() -> None:
    one = {
        **STATE,
        "y_embedder.embedding_table.weight": STATE["y_embedder.embedding_table.weight"][:1],
    }
    with pytest.raises(ModelError, match="no class besides the null label"):
        spec_from_tensors(one, 4)
