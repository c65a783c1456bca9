"""The tritonserver of nvidia-pytriton as a process, for its own environment (no test framework)."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def backends(folder: Path) -> Path:
    """The Python backend with the stub of this Python, as an installation of Triton has it."""
    package = Path(str(find_spec("pytriton").origin)).parent / "tritonserver"
    stub = package / "python_backend_stubs" / f"3.{sys.version_info.minor}"
    shutil.copytree(package / "backends" / "python", folder / "python")
    shutil.copy(stub / "triton_python_backend_stub", folder / "python")
    return folder


def environment() -> dict[str, str]:
    """Variables with which server and stub find their libraries and this Python."""
    package = Path(str(find_spec("pytriton").origin)).parent
    # The stub must load the libpython of this Python: its standard library fits no other.
    libraries = [sysconfig.get_config_var("LIBDIR"), str(package.parent / "nvidia_pytriton.libs")]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


class TritonServer:
    """A server on a repository; ``with`` waits until it is ready and stops it at the end.

    Args:
        repository: the model repository, an absolute path.
        work: folder for its files.
    """

    def __init__(self, repository: Path, work: Path) -> None:
        self.ports = dict(zip(("http", "grpc", "metrics"), free_ports(3), strict=True))
        self.log = work / "triton.log"
        package = Path(str(find_spec("pytriton").origin)).parent
        words = [
            str(package / "tritonserver" / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={backends(work / 'backends')}",
            "--allow-gpu-metrics=false",
            "--exit-timeout-secs=20",
        ]
        for kind, port in self.ports.items():
            words += [f"--{kind}-port={port}", f"--{kind}-address=127.0.0.1"]
        self._words = words

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.ports['http']}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.ports['grpc']}"

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['metrics']}/metrics") as page:
            return page.read().decode()

    def __enter__(self) -> TritonServer:
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self._words,
                cwd=ROOT,  # The stub finds goc_deploy there; it ignores PYTHONPATH.
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"tritonserver ended:\n{self.log.read_text()}")
            try:
                urllib.request.urlopen(f"http://{self.http}/v2/health/ready").close()
                return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        self.__exit__()
        raise RuntimeError(f"tritonserver was not ready in time:\n{self.log.read_text()}")

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
