"""Runs the commands that shells of the documents start, each in a process that is forked warm."""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.warm_commands import run_warm

TIMEOUT_S = 3600


class _Command(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        asked = json.loads(self.rfile.read())
        words = (asked["name"], asked["arguments"], asked["environment"], Path(asked["cwd"]))
        done = run_warm(*words, TIMEOUT_S, streams=("printed", "printed"))
        answer = {"printed": done.stdout, "code": done.returncode}
        self.wfile.write(json.dumps(answer).encode())


@contextlib.contextmanager
def warm_server(address: Path) -> Iterator[None]:
    """Serve `tests.documents.warm_client` at a Unix socket until the block ends."""
    with socketserver.ThreadingUnixStreamServer(str(address), _Command) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()
