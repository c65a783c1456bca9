"""Bad input gets one sentence and its exit code, and nothing on disk changes."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from goc_deploy.engine_dir.manifest_file import MANIFEST_VERSION
from tests.conftest import BIN, GOLDEN, Command
from tests.exporters.test_checkpoint import Malicious

LONG = "x" * 300
STATE = torch.load(GOLDEN / "model.pt", weights_only=True)


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a folder, to see that nothing changed."""
    return {
        str(p.relative_to(folder)): (
            p.lstat().st_mode,
            p.read_bytes() if p.is_file() and not p.is_symlink() else b"",
        )
        for p in sorted(folder.rglob("*"))
    }


def assert_one_sentence(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error:", "Error:"))]
    assert len(lines) == 1, done.stderr
    for part in parts:
        assert part in lines[0]


def bad_state(path: Path, **changed: torch.Tensor) -> None:
    torch.save(
        {**STATE, **{name.replace("__", "."): value for name, value in changed.items()}}, path
    )


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "missing": (lambda _: None, 3, "No such file"),
    "empty": (lambda p: p.touch(), 3, "is empty"),
    "text": (lambda p: p.write_text("hello"), 3, "neither a torch checkpoint nor safetensors"),
    "truncated": (
        lambda p: p.write_bytes((GOLDEN / "model.pt").read_bytes()[:700_000]),
        3,
        "cut short",
    ),
    "module": (lambda p: torch.save(torch.nn.Linear(2, 2), p), 3, "state_dict()"),
    "malicious": (lambda p: torch.save({"x": Malicious(p.parent / "pwned")}, p), 9, "posix.system"),
    "nan": (lambda p: bad_state(p, pos_embed=STATE["pos_embed"] * float("nan")), 3, "pos_embed"),
    "int8": (lambda p: bad_state(p, pos_embed=STATE["pos_embed"].to(torch.int8)), 3, "int8"),
    "shape": (
        lambda p: bad_state(p, blocks__0__attn__proj__bias=torch.ones(3)),
        3,
        "blocks.0.attn.proj.bias",
    ),
    "extra": (lambda p: bad_state(p, unknown=torch.ones(3)), 3, "1 unexpected: unknown"),
    "other model": (
        lambda p: torch.save({"conv.weight": torch.ones(3)}, p),
        3,
        "not a model that this version knows",
    ),
    "router": (
        lambda p: torch.save({"routers": {}, "args": argparse.Namespace()}, p),
        3,
        "not a tensor",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoints(name: str, command: Command, tmp_path: Path) -> None:
    make, code, message = CHECKPOINTS[name]
    make(tmp_path / "model.pt")
    before = tree(tmp_path)
    done = command(
        "goc-export", tmp_path / "model.pt", "-o", tmp_path / "a" / "b", "--num-heads", 4, code=code
    )
    assert_one_sentence(done, message)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", [LONG, f"{LONG}.pt", f"{LONG}/model.pt", f"{LONG}/model"])
def test_a_checkpoint_with_a_name_that_is_too_long(
    name: str, command: Command, tmp_path: Path
) -> None:
    done = command("goc-export", name, "-o", tmp_path / "a", code=3)
    assert_one_sentence(done, "File name too long")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 3, "give --num-heads"),
        (("--num-heads", 5), 3, "do not divide"),
        (("--num-heads", 4, "--steps", 0), 2, "steps must be within 1..1000, got 0"),
        (("--num-heads", 4, "--plan", "fora:two"), 2, "SPEC 'fora:two'"),
        (("--num-heads", 4, "--plan", "file:/nowhere.json"), 2, "cannot be read"),
        (("--num-heads", 4, "--sampler", "heun"), 2, "unknown sampler"),
        (("--num-heads", 4, "--precision", "fp8"), 2, "fp8"),
        (("--num-heads", 4, "--max-batch", 0), 2, "max-batch"),
        (("--num-heads", 4, "--weights", "ema"), 3, "no 'ema' weights"),
        (("--num-heads", 4, "--vae", LONG), 3, LONG),
        (("--num-heads", 4, "--text-encoder", LONG), 3, LONG),
        (("--num-heads", 4, "--captions", LONG), 2, LONG),
        (("--num-heads", 4, "--captions", f"{LONG}.npz"), 2, "File name too long"),
        (("--num-heads", 4, "--plan", f"file:{LONG}"), 2, "File name too long"),
        (("--unknown",), 2, "--unknown"),
    ],
)
def test_bad_export_options(
    options: tuple, code: int, message: str, command: Command, tmp_path: Path
) -> None:
    done = command(
        "goc-export", GOLDEN / "model.pt", "-o", tmp_path / "new" / "engine", *options, code=code
    )
    assert_one_sentence(done, message)
    assert tree(tmp_path) == {}


def test_an_equal_engine_is_up_to_date_and_another_needs_force(
    command: Command, tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    base = ("goc-export", GOLDEN / "model.pt", "-o", engine, "--num-heads", 4, "--plan", "none")
    command(*base)
    before = tree(tmp_path)
    assert "up to date" in command(*base).stderr
    done = command(*base, "--steps", 10, code=8)
    assert_one_sentence(done, "use --force to replace it")
    assert tree(tmp_path) == before
    command(*base, "--steps", 10, "--force")
    assert "10" in command("goc-plan", engine, "--list").stdout
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]


def test_a_directory_that_is_not_ours_is_never_replaced(command: Command, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years of work")
    before = tree(tmp_path)
    done = command(
        "goc-export",
        GOLDEN / "model.pt",
        "-o",
        tmp_path / "precious",
        "--num-heads",
        4,
        "--force",
        code=8,
    )
    assert_one_sentence(done, "not an engine directory that can be replaced")
    assert tree(tmp_path) == before


def test_an_output_below_a_file_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in ("file", "file/engine", "file/missing/engine"):
        done = command(
            "goc-export", GOLDEN / "model.pt", "-o", tmp_path / target, "--num-heads", 4, code=8
        )
        assert_one_sentence(done, target.split("/")[0])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_nothing_and_keeps_the_old_engine(
    golden_engine: Path, tmp_path: Path
) -> None:
    shutil.copytree(golden_engine, tmp_path / "engine")
    before = tree(tmp_path)
    arguments = (
        f"{BIN / 'goc-export'} {GOLDEN / 'model.pt'} -o {tmp_path / 'engine'} --num-heads 4 "
        "--plan none --force"
    )
    done = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; ulimit -f 200; exec {arguments}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 7, done.stderr
    assert_one_sentence(done, "the disk is full")
    assert tree(tmp_path) == before


def start_export(folder: Path, until: str) -> subprocess.Popen[str]:
    """Start an export and come back once a file that matches the pattern is there."""
    words = [
        "goc-export",
        GOLDEN / "model.pt",
        "-o",
        folder / "engine",
        "--num-heads",
        "4",
        "--plan",
        "none",
    ]
    process = subprocess.Popen(
        [BIN / words[0], *words[1:]],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background jobs have it ignored
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob(until)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


FIRST_GRAPH = ".engine.tmp-*/onnx/block_00_attn.onnx"


@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [
        (".engine.lock", signal.SIGINT, 130),
        (".engine.lock", signal.SIGTERM, 143),
        (".engine.tmp-*", signal.SIGTERM, 143),
        (FIRST_GRAPH, signal.SIGINT, 130),
        (".engine.tmp-*/onnx/final.onnx", signal.SIGTERM, 143),
    ],
)
def test_an_interrupted_export_leaves_nothing(
    moment: str, number: int, code: int, tmp_path: Path
) -> None:
    process = start_export(tmp_path, moment)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert tree(tmp_path) == {}


def test_a_killed_export_leaves_no_engine_and_does_not_block_the_next(
    command: Command, tmp_path: Path
) -> None:
    process = start_export(tmp_path, FIRST_GRAPH)
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "engine").exists()
    command(
        "goc-export",
        GOLDEN / "model.pt",
        "-o",
        tmp_path / "engine",
        "--num-heads",
        4,
        "--plan",
        "none",
    )
    command("goc-run", tmp_path / "engine", "--labels", "1", cwd=tmp_path)


def test_two_exports_to_one_directory_do_not_mix(tmp_path: Path) -> None:
    base = [
        BIN / "goc-export",
        GOLDEN / "model.pt",
        "-o",
        tmp_path / "engine",
        "--num-heads",
        "4",
        "--plan",
        "none",
    ]
    both = [
        subprocess.Popen([*base, "--steps", steps], stderr=subprocess.PIPE, text=True)
        for steps in ("10", "20")
    ]
    errors = [process.communicate(timeout=200)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 8], errors
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]


def edit_manifest(engine: Path, change: Callable[[dict], object]) -> None:
    path = engine / "manifest.json"
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_with_link(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to("real")


def link_folder(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to("elsewhere")


def set_first_path(value: str) -> Callable[[Path], None]:
    return lambda e: edit_manifest(e, lambda m: m["files"][0].update(path=value))


ENGINES: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "no manifest": (lambda e: (e / "manifest.json").unlink(), 4, "no manifest.json"),
    "empty manifest": (lambda e: (e / "manifest.json").write_text(""), 4, "not valid JSON"),
    "truncated manifest": (
        lambda e: (e / "manifest.json").write_bytes((e / "manifest.json").read_bytes()[:500]),
        4,
        "not valid JSON",
    ),
    "manifest is a list": (
        lambda e: (e / "manifest.json").write_text("[]"),
        4,
        "must hold a JSON object",
    ),
    "nested manifest": (
        lambda e: (e / "manifest.json").write_text("[" * 100_000),
        4,
        "not valid JSON",
    ),
    "huge manifest": (
        lambda e: (e / "manifest.json").write_bytes(b" " * 9_000_000),
        4,
        "has 9000000 bytes; at most",
    ),
    "newer manifest": (
        lambda e: edit_manifest(e, lambda m: m.update(version=MANIFEST_VERSION + 1)),
        4,
        "update goc_deploy",
    ),
    "other format": (
        lambda e: edit_manifest(e, lambda m: m.update(format="x")),
        4,
        "not a goc_deploy.engine_dir",
    ),
    "missing field": (
        lambda e: edit_manifest(e, lambda m: m.pop("model")),
        4,
        "$.model: required field is missing",
    ),
    "wrong field": (
        lambda e: edit_manifest(e, lambda m: m["model"].update(depth="4")),
        4,
        "$.model.depth: expected int, got '4'",
    ),
    "other sizes": (
        lambda e: edit_manifest(e, lambda m: m["model"].update(hidden=32)),
        4,
        "manifest implies",
    ),
    "missing unit": (lambda e: edit_manifest(e, lambda m: m["graphs"].pop(0)), 4, "lists no unit"),
    "missing unit of a block": (
        lambda e: edit_manifest(e, lambda m: m["graphs"].pop(3)),
        4,
        "$.segments: made of unit block_",
    ),
    "missing file": (
        lambda e: (e / "onnx" / "block_02_attn.weights").unlink(),
        4,
        "block_02_attn.weights is missing",
    ),
    "truncated file": (
        lambda e: (e / "onnx" / "embed.weights").write_bytes(b"x"),
        4,
        "embed.weights has 1 bytes",
    ),
    "changed weights": (
        lambda e: flip_byte(e / "onnx" / "block_01_mlp.weights"),
        4,
        "block_01_mlp.weights was changed",
    ),
    "changed graph": (lambda e: flip_byte(e / "onnx" / "final.onnx"), 4, "final.onnx was changed"),
    "changed plan": (
        lambda e: flip_byte(e / "plans" / "fora-2.json"),
        4,
        "fora-2.json was changed",
    ),
    "linked file": (lambda e: replace_with_link(e / "onnx" / "embed.onnx"), 9, "symbolic link"),
    "linked folder": (lambda e: link_folder(e / "onnx"), 9, "symbolic link"),
    "hard link": (lambda e: os.link(e / "onnx" / "embed.onnx", e / "other"), 9, "not a plain file"),
    "path above": (set_first_path("../x"), 9, "outside the directory"),
    "absolute path": (set_first_path("/etc/passwd"), 9, "outside the directory"),
    "path with NUL": (set_first_path("onnx/a\0b"), 9, "outside the directory"),
    "Windows path": (set_first_path("C:\\x"), 9, "outside the directory"),
    "case collision": (
        lambda e: edit_manifest(
            e, lambda m: m["files"].append({**m["files"][0], "path": m["files"][0]["path"].upper()})
        ),
        9,
        "is listed as $.files[0] already",
    ),
}


@pytest.mark.parametrize("name", ENGINES)
def test_bad_engine_directories(
    name: str, golden_engine: Path, command: Command, tmp_path: Path
) -> None:
    break_it, code, message = ENGINES[name]
    engine = Path(shutil.copytree(golden_engine, tmp_path / "engine"))
    break_it(engine)
    before = tree(tmp_path)
    done = command(
        "goc-run",
        engine,
        "--plan",
        "fora:2",
        "--labels",
        "1",
        "--latents-output",
        tmp_path / "x.npy",
        code=code,
    )
    assert_one_sentence(done)
    assert any(part in done.stderr for part in message.split("|")), done.stderr
    assert tree(tmp_path) == before


def test_a_name_that_no_file_can_have_is_no_engine(command: Command) -> None:
    assert_one_sentence(
        command("goc-run", "x" * 300, "--labels", "1", code=4), "is not a directory"
    )


def test_files_that_are_not_listed_are_ignored(
    golden_engine: Path, command: Command, tmp_path: Path
) -> None:
    engine = Path(shutil.copytree(golden_engine, tmp_path / "engine"))
    for name in ("evil.so", "__init__.py", "sitecustomize.py", "onnx/numpy.py"):
        (engine / name).write_text("raise SystemExit('imported')")
    command("goc-run", engine, "--labels", "1", cwd=engine)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--labels", "10"), 2, "label 10 (image 0) must be a whole number within 0..9"),
        (("--labels", "-1"), 2, "label -1"),
        (("--labels", "1,x"), 2, "label 'x' must be a whole number, the model has no class names"),
        (("--labels", "1", "--plan", "other"), 2, "there is no plan 'other'"),
        (("--labels", "1", "--cfg-scale", "nan"), 2, "cfg_scale"),
        (("--labels", "1", "--seed", "-1"), 2, "seed"),
        (("--labels", "1", "--seed", str(2**64)), 2, "seed"),
        (("--labels", "1", "--batch-size", "0"), 2, "batch size 0"),
        (("--labels", "1", "--batch-size", "17"), 2, "batch size 17"),
        (("--labels", "1", "--latents", "{tmp}/wrong.npy"), 2, "expected [1, 4, 8, 8]"),
        (("--labels", "1", "--latents", "{tmp}/flat.npy"), 2, "expected [N,C,H,W]"),
        (("--labels", "1", "--latents", "{tmp}/objects.npy"), 2, "cannot be read"),
        (("--labels", "1", "--latents", "{tmp}/missing.npy"), 2, "cannot be read"),
        (("--labels", "1", "--backend", "tensorflow"), 2, "there is no backend 'tensorflow'"),
        (("--labels", "10", "--output", "{tmp}/missing/x.png"), 2, "label 10"),
        (("--labels", "1", "--output", "{tmp}/flat.npy/x.png"), 8, "is not a directory"),
        (("--labels", "1", "--resume"), 2, "--resume goes with a directory as --output"),
        (
            ("--labels", "1", "--resume", "--output", "{tmp}/x.png"),
            2,
            "--resume goes with a directory as --output",
        ),
        (("--labels", "1", "--resume", "--output", "{tmp}/x"), 2, "the model makes latents"),
        (
            ("--labels", ",".join(["1"] * 40 + ["10"]), "--output", "{tmp}/x"),
            2,
            "label 10 (image 40)",
        ),
        (
            ("--num-images", "2", "--latents", "{tmp}/wrong.npy"),
            2,
            "expected [2, 4, 8, 8] for 2 labels",
        ),
        (("--labels", "1", "--output", "{tmp}/x.jpg"), 2, "--output ends in .png or .npz"),
        (("--labels", "1", "--output", "{tmp}/" + "x" * 300 + ".png"), 8, "File name too long"),
        (("--labels", "1", "--latents", LONG), 2, "File name too long"),
        (("--labels", "1", "--prompt-embeds", LONG), 2, "must end in .npz"),
        (("--labels", "1", "--threads", "100000"), 2, "threads must be"),
        (("--labels", "1", "--report", "{tmp}/flat.npy/missing/x.json"), 8, "is not a directory"),
        (("--labels", "1", "--plan", "fora-2+gc-1.3"), 2, "engine fora:2+gc:1.3"),
        (("--labels", "1", "--plan", "fora-2+gc-12"), 2, "add it with: goc plan"),
        (("--labels", "1", "--plan", "frra-2"), 2, "did you mean fora-2?"),
        (("--labels", "1", "--latents-output", "/dev/full"), 7, "disk is full"),
    ],
)
def test_bad_run_options(
    options: tuple[str, ...],
    code: int,
    message: str,
    golden_engine: Path,
    command: Command,
    tmp_path: Path,
) -> None:
    np.save(tmp_path / "wrong.npy", np.zeros((1, 4, 4, 4), np.float32))
    np.save(tmp_path / "flat.npy", np.zeros(3, np.float32))
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}]), allow_pickle=True)
    before = tree(tmp_path)
    done = command(
        "goc-run",
        golden_engine,
        *(option.replace("{tmp}", str(tmp_path)) for option in options),
        code=code,
    )
    assert "Traceback" not in done.stderr
    assert message in done.stderr
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "give a SPEC to add, --list, --show NAME, --inspect, or a --backend"),
        (
            ("fora:2", "--list"),
            2,
            "give a SPEC to add, --list, --show NAME, --inspect, or a --backend",
        ),
        (("--list", "--plot", "x.png"), 2, "--plot and --smoothcache go with --show"),
        (("--show", "other"), 2, "there is no plan"),
        (("--show", "none", "--plot", "x.jpg"), 2, "--plot ends in .png, .svg or .pdf"),
        (("fora:x",), 2, "interval must be a whole number within 1..1000, got 'x'"),
        (("fora:2", "--name", "../x", "--steps", "5"), 2, "plan name '../x'"),
        (("fora:2", "--steps", "0"), 2, "steps must be within"),
    ],
)
def test_bad_plan_options(
    options: tuple[str, ...], code: int, message: str, golden_engine: Path, command: Command
) -> None:
    before = tree(golden_engine)
    done = command("goc-plan", golden_engine, *options, code=code)
    assert "Traceback" not in done.stderr
    assert message in done.stderr
    assert tree(golden_engine) == before
