"""The build process: TensorRT builds outside of the process that asked for it.

There are three reasons. A build cannot be interrupted, but a process can be ended. A parser that
meets a plugin it cannot use ends its process. And the parser of TensorRT-RTX looks for
``libtensorrt_rtx.so``, which the wheel names ``libtensorrt_rtx.so.1``. A new process can have a
search path on which that name exists, without any write to site-packages.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from goc_deploy.engines.tensorrt.build import BuildReport, BuildRequest, Built, engine_from_onnx
from goc_deploy.engines.tensorrt.library import library_from_backend

_RTX_LIBRARY = "libtensorrt_rtx.so"


class BuildProcessError(Exception):
    """The build process ended during a build; the message states how."""


@dataclass(frozen=True, slots=True)
class BuildProcess:
    """A running build process."""

    process: subprocess.Popen[bytes]
    connection: Connection
    output: IO[bytes]

    def build(self, graph: bytes, request: BuildRequest, timings: bytes = b"") -> Built:
        """Build a graph; see `engine_from_onnx`.

        Raises:
            BuildProcessError: the process ended.
        """
        try:
            self.connection.send_bytes(json.dumps(asdict(request)).encode())
            self.connection.send_bytes(graph)
            self.connection.send_bytes(timings)
            report = BuildReport(**json.loads(self.connection.recv_bytes()))
            return Built(self.connection.recv_bytes(), report, self.connection.recv_bytes())
        except (EOFError, OSError) as cause:
            code = self.process.wait()
            self.output.seek(0)
            last = self.output.read()[-2000:].decode(errors="replace").strip().splitlines()[-3:]
            raise BuildProcessError(
                f"it ended with exit code {code}: {' / '.join(last) or 'no message'}"
            ) from cause


@contextlib.contextmanager
def build_process(backend: str, *, plugin: bool, gpu: int = 0) -> Iterator[BuildProcess]:
    """Start a build process, and end it in any case.

    Args:
        backend: the backend to build for.
        plugin: register the plugin.
        gpu: number of the GPU to build on, of those that this process may see.
    """
    connection, theirs = multiprocessing.Pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(connection.close)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="goc_deploy-"))
        output = stack.enter_context(tempfile.TemporaryFile())
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                __name__,
                str(theirs.fileno()),
                backend,
                "plugin" if plugin else "",
            ],
            pass_fds=[theirs.fileno()],
            env=build_environment(backend, Path(folder), gpu),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches only the command, which ends this process
        )
        theirs.close()
        stack.callback(process.wait)
        stack.callback(process.kill)
        yield BuildProcess(process, connection, output)


def build_environment(backend: str, folder: Path, gpu: int = 0) -> dict[str, str]:
    """Return the variables of the build process, with ``libtensorrt_rtx.so`` in ``folder``."""
    package_folder = Path(str(sys.modules["goc_deploy"].__file__)).parents[1]
    environment = {**os.environ, "PYTHONPATH": _prepended(str(package_folder), "PYTHONPATH")}
    if gpu:  # TensorRT builds on the first GPU that its process may see
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    if backend == "tensorrt-rtx":
        # Polygraphy reads this when it is imported.
        environment["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
        versioned = next(iter(_rtx_folder().glob(f"{_RTX_LIBRARY}.*")), None)
        if versioned is not None and not (versioned.parent / _RTX_LIBRARY).exists():
            (folder / _RTX_LIBRARY).symlink_to(versioned)
            environment["LD_LIBRARY_PATH"] = _prepended(str(folder), "LD_LIBRARY_PATH")
    return environment


def _rtx_folder() -> Path:
    try:
        return Path(str(importlib.import_module("tensorrt_rtx_libs").__file__)).parent
    except ImportError:  # installed from an archive, which has the library under both names
        return Path("/nonexistent")


def _prepended(folder: str, variable: str) -> str:
    return os.pathsep.join([folder, *filter(None, [os.environ.get(variable)])])


def _serve(connection: Connection, backend: str, *, plugin: bool) -> None:
    """Answer requests until the other side closes."""
    library = library_from_backend(backend)
    if plugin:
        from goc_deploy.engines.plugin.registration import register_plugin

        register_plugin(library.trt)
    while True:
        try:
            request: dict[str, Any] = json.loads(connection.recv_bytes())
        except EOFError:
            return
        graph, timings = connection.recv_bytes(), connection.recv_bytes()
        built = engine_from_onnx(library, graph, BuildRequest(**request), timings)
        connection.send_bytes(json.dumps(asdict(built.report)).encode())
        connection.send_bytes(built.engine)
        connection.send_bytes(built.timings)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), sys.argv[2], plugin=sys.argv[3] == "plugin")
