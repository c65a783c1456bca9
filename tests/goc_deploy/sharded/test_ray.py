"""goc-run --ray: the bytes of one process, whatever dies meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from goc_deploy.errors import EnvironmentUnsupportedError, UsageError
from goc_deploy.options import RunOptions, ShardOptions
from goc_deploy.sharded.ray_cluster import connected, number_of_workers
from goc_deploy.sharded.ray_pool import ray_pool
from goc_deploy.sharded.run import run_sharded
from tests.conftest import Command, command_words
from tests.goc_deploy.sharded.series import SERIES, sha256

ray = pytest.importorskip("ray", reason="ray is not installed (extra ray)")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
SMALL = RunOptions(
    plan="none", steps=1, cfg_scale=1.0, num_images=10, batch_size=2, backend="onnxruntime"
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of four logical CPUs, whatever this machine has."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


class Driver:
    """``goc-run --ray`` in a process of its own."""

    def __init__(self, *words: object) -> None:
        arguments = [*command_words("goc-run"), *map(str, words)]
        self.process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)

    def workers(self) -> list[psutil.Process]:
        """Processes of actors of Ray that this driver started."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in below if "ray::Actor" in " ".join(one.cmdline())]

    def wait_for_shards(self, folder: Path, count: int) -> None:
        """Wait until the workers have published some shards."""
        deadline = time.monotonic() + 240
        while len(list(folder.glob("images-*"))) < count:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)


def listening(process: psutil.Process) -> set[str]:
    """The addresses at which a process and those below it accept connections."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        try:
            connections = one.net_connections("inet")
        except psutil.Error:
            continue
        found |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.slow
def test_kills_of_a_worker_and_of_the_driver_lose_and_double_nothing(
    demo_engine: Path, command: Command, single_process_sha256: str, tmp_path: Path
) -> None:
    output, folder = tmp_path / "samples.npz", tmp_path / "samples.npz.shards"
    words = (demo_engine, *SERIES, "--output", output, "--ray", "--workers", 1)
    driver = Driver(*words)
    driver.wait_for_shards(folder, 2)
    assert listening(psutil.Process(driver.process.pid)) <= LOOPBACK
    for worker in driver.workers():
        worker.kill()
    driver.wait_for_shards(folder, 5)
    driver.process.send_signal(signal.SIGKILL)
    driver.process.communicate()
    assert not output.exists()
    assert 5 <= len(list(folder.glob("images-*"))) < 20
    done = command("goc-run", *words)
    assert "images were there before" in done.stderr
    assert sha256(output) == single_process_sha256
    assert len(list(folder.glob("images-*"))) == 20


@pytest.mark.usefixtures("cluster")
def test_any_number_of_workers_makes_the_file_of_one_process(
    demo_engine: Path, tmp_path: Path
) -> None:
    digests = set()
    for workers in (None, 1, 3):
        name = tmp_path / f"{workers}.npz"
        address = None if workers is None else "auto"
        shards = ShardOptions(tmp_path / f"{workers}", 2, address, workers)
        options = RunOptions(**{**_fields(SMALL), "output": name, "threads": 1})
        result = run_sharded(demo_engine, options, shards)
        assert (result.images, result.drawn, result.workers) == (10, 10, workers or 1)
        digests.add(sha256(name))
    assert len(digests) == 1


def _fields(options: RunOptions) -> dict[str, object]:
    return {name: getattr(options, name) for name in RunOptions.__dataclass_fields__}


@pytest.mark.usefixtures("cluster")
def test_too_few_cpus_or_gpus_fail_at_once() -> None:
    with connected("auto") as module:
        assert number_of_workers(module, {"CPU": 2}, None) == 2
        with pytest.raises(
            EnvironmentUnsupportedError, match="10 CPU are needed and 4 of 4 are available"
        ):
            number_of_workers(module, {"CPU": 2}, 5)
        with pytest.raises(
            EnvironmentUnsupportedError, match="1 GPU are needed and 0 of 0 are available"
        ):
            number_of_workers(module, {"CPU": 1, "GPU": 1}, None)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("package", ["goc_deploy", "numpy", "onnxruntime"])
def test_a_worker_with_another_version_is_refused(
    demo_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    from goc_deploy.sharded import ray_pool as module

    here = module.versions()
    monkeypatch.setattr(module, "versions", lambda: {**here, package: "0.0"})
    shards = ShardOptions(tmp_path / "shards", 2, "auto", 1)
    pool = ray_pool(demo_engine, SMALL, shards, lambda *_: None)
    with (
        pytest.raises(EnvironmentUnsupportedError, match=f"has {package} .* process has 0.0"),
        pool,
    ):
        pass


@pytest.mark.usefixtures("cluster")
def test_an_error_of_a_worker_is_that_of_one_process(demo_engine: Path, tmp_path: Path) -> None:
    options = RunOptions(**{**_fields(SMALL), "labels": "10", "output": tmp_path / "x.npz"})
    with pytest.raises(UsageError, match="10"):
        run_sharded(demo_engine, options, ShardOptions(tmp_path / "shards", 2, "auto", 1))


def test_a_gpu_is_not_chosen_by_its_index(tmp_path: Path) -> None:
    options = RunOptions(output=tmp_path / "x.npz", device="cuda:1")
    with pytest.raises(UsageError, match="`device=cuda`"):
        run_sharded("nowhere", options, ShardOptions(tmp_path / "shards", ray="local"))
