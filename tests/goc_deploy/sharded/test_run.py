"""goc-run --shards on one machine: the same bytes, whatever ends it in between."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from goc_deploy.disk import directory_lock
from goc_deploy.errors import ConflictError, UsageError
from goc_deploy.options import RunOptions, ShardOptions
from goc_deploy.sharded.run import run_sharded
from tests.conftest import Command, command_words
from tests.goc_deploy.sharded.series import SERIES, sha256

SMALL = ("--plan", "none", "--steps", 1, "--cfg-scale", 1, "--threads", 1, "--num-images", 10)


def wait_for_shards(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run has published some shards."""
    deadline = time.monotonic() + 240
    while len(list(folder.glob("images-*"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_run_continues_and_ends_with_the_bytes_of_a_run_without_shards(
    demo_engine: Path, command: Command, single_process_sha256: str, tmp_path: Path
) -> None:
    output = tmp_path / "samples.npz"
    folder = tmp_path / "samples.npz.shards"
    words = ("goc-run", demo_engine, *SERIES, "--output", output, "--shards")
    arguments = [*command_words("goc-run"), *map(str, words[1:])]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    wait_for_shards(folder, 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("images-*")}
    assert 3 <= len(kept) < 20
    assert not output.exists()
    damaged = min(kept)
    content = bytearray(damaged.read_bytes())
    content[1000] ^= 4
    damaged.write_bytes(content)
    del kept[damaged]
    done = command(*words)
    assert "is damaged" in done.stderr
    assert f"{100 * len(kept)} of 2000 images were there before" in done.stderr
    assert sha256(output) == single_process_sha256
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    other = command("goc-run", demo_engine, *SERIES, "--seed", 6, *words[-3:], code=8)
    assert "made with seed 5, not 6" in other.stderr
    assert sha256(output) == single_process_sha256


def test_shards_of_any_size_make_the_same_file_with_the_same_threads(
    demo_engine: Path, command: Command, tmp_path: Path
) -> None:
    series = ("goc-run", demo_engine, *SMALL, "--batch-size", 2)
    command(*series, "--output", tmp_path / "a.npz")
    sharded = (*series, "--output", tmp_path / "b.npz", "--shards", tmp_path / "b")
    command(*sharded, "--shard-images", 4)
    assert sha256(tmp_path / "b.npz") == sha256(tmp_path / "a.npz")
    assert len(list((tmp_path / "b").glob("images-*"))) == 3
    refused = command(*sharded, "--shard-images", 4, "--threads", 2, code=8)
    assert "made with threads 1, not 2" in refused.stderr


def test_a_second_process_on_one_output_is_refused_at_once(
    demo_engine: Path, tmp_path: Path
) -> None:
    options = RunOptions(output=tmp_path / "a.npz", num_images=2)
    held = (options.output, tmp_path / "shards")
    for path in held:
        assert path is not None
        with (
            directory_lock(path),
            pytest.raises(ConflictError, match=f"another process is writing {path}"),
        ):
            run_sharded(demo_engine, options, ShardOptions(tmp_path / "shards"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (RunOptions(), "ends in .npz"),
        (RunOptions(output=Path("x.png")), "ends in .npz"),
        (RunOptions(output=Path("x.npz"), resume=True), "leave out"),
        (RunOptions(output=Path("x.npz"), report=Path("r.json")), "leave out"),
        (RunOptions(output=Path("x.npz"), latents_output=Path("x.npy")), "leave out"),
    ],
)
def test_options_that_do_not_go_with_shards_are_refused(options: RunOptions, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        run_sharded("nowhere", options, ShardOptions(Path("shards")))


def test_a_shard_has_whole_batches_and_images(
    demo_engine: Path, golden_engine: Path, tmp_path: Path
) -> None:
    options = RunOptions(output=tmp_path / "x.npz", batch_size=4, backend="onnxruntime")
    shards = ShardOptions(tmp_path / "shards", shard_images=6)
    with pytest.raises(UsageError, match="choose a multiple of 4"):
        run_sharded(demo_engine, options, shards)
    with pytest.raises(UsageError, match="the model makes latents"):
        run_sharded(golden_engine, options, shards)


def test_options_of_shards_alone_are_refused(command: Command, tmp_path: Path) -> None:
    done = command("goc-run", tmp_path, "--shard-images", 4, code=2)
    assert "--shard-images goes with --shards" in done.stderr
    done = command("goc-run", tmp_path, "--shards", code=2)
    assert "needs an --output" in done.stderr
