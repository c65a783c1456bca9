"""What the documents tell people to type is typed here, document by document, in a fresh folder.

Every fenced or indented block is run, unless the comment before it names the reason why not
(`tests.documents.blocks`).
Results, such as generated tables, must be what the document already has, and so must outputs that
the document shows (`tests.documents.outputs`).
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from goc_deploy.schedule import check_schedule
from goc_deploy.schedule.schedule import schedule_from_json
from tests.conftest import command_words
from tests.documents import files
from tests.documents.blocks import NOT_RUN, RUN_WITH, Block, blocks
from tests.documents.files import ROOT
from tests.documents.outputs import VARY, same_output
from tests.documents.warm_server import warm_server

COMMANDS = ("goc-export", "goc-plan", "goc-run", "goc-serve", "goc-bench", "goc-eval")
DOCUMENTS = sorted(
    [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")]
)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
FILES: dict[str, tuple[Callable[[Path], None], ...]] = {
    "README.md": (files.dit_pipeline,),
    "docs/usage.md": (files.checkpoint, files.dit_pipeline, files.pixart_pipeline),
    "docs/python.md": (files.checkpoint, files.golden_engine),
    "docs/precision.md": (files.checkpoint,),
    "docs/policies.md": (files.golden_engine,),
    "docs/gpu.md": (files.golden_engine,),
    "docs/serving.md": (files.golden_engine,),
}
TIMEOUT_S = 3600  # of a block: machines that test this program may be slow


def words_of(block: Block) -> list[str] | None:
    """How to run a block; None for one that is read instead."""
    if block.language in ("", "sh"):
        return ["bash", "-euo", "pipefail", "-c", block.adapted]
    if block.language == "python":
        return [sys.executable, "-c", block.adapted]
    assert block.language == "json", (
        f"line {block.line}: nothing runs {block.language!r}; mark the block as not run"
    )
    return None


def contents(folder: Path) -> dict[Path, bytes]:
    """Of every file below a folder."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Where ``python`` and the commands are those of this tree, installed or not.

    Commands that end by themselves run in processes that are forked warm.
    """
    folder = tmp_path_factory.mktemp("bin")
    client = [sys.executable, "-S", "-E", str(Path(__file__).parent / "warm_client.py")]
    warm = {
        name: [*client, str(folder / "socket"), name] for name in COMMANDS if name != "goc-serve"
    }
    for name, words in {
        "python": [sys.executable],
        "goc-serve": command_words("goc-serve"),
        **warm,
    }.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    with warm_server(folder / "socket"):
        yield {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a document is run; a server whose process it writes to ``server.pid`` ends with it."""
    yield tmp_path
    if (tmp_path / "server.pid").exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((tmp_path / "server.pid").read_text()), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_a_document_shows_works_in_its_order(
    name: str, environment: dict[str, str], folder: Path
) -> None:
    todo = [
        block for block in blocks((ROOT / name).read_text(encoding="utf-8")) if not block.reason
    ]
    if todo:
        files.repository(folder)
        for make in FILES.get(name, ()):
            make(folder)
    shown = contents(folder / "docs")
    printed = ""
    for block in todo:
        if block.language == "text":
            vary = VARY.fullmatch(block.comment) is not None
            assert same_output(block.text, printed, vary), (
                f"{name}:{block.line}: the commands print\n{printed}"
            )
            continue
        words = words_of(block)
        if words is None:
            check_schedule(schedule_from_json(block.text.encode(), name))
            continue
        done = subprocess.run(
            words,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        printed = done.stdout
        told = f"{name}:{block.line}: exit {done.returncode}\n{block.adapted}\n{printed}"
        assert done.returncode == 0, told
    found = contents(folder / "docs")
    assert [str(path) for path in found if found[path] != shown.get(path)] == [], (
        "what the commands wrote is not what the repository has"
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_comments_about_running_stand_before_a_block(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    used = [block.comment for block in blocks(text)]
    for line in text.splitlines():
        if re.match(r"<!-- *(not run|run|numbers)\b", line):
            assert any(form.fullmatch(line) for form in (NOT_RUN, RUN_WITH, VARY)), line
            assert line in used, f"no block follows {line}"


def test_options_that_are_named_in_sentences_exist(environment: dict[str, str]) -> None:
    help_of = {
        name: subprocess.run(
            [name, "--help"], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for name in COMMANDS
    }
    for path in DOCUMENTS:
        for span in re.findall(r"`(goc-[^`]+)`", path.read_text(encoding="utf-8")):
            name = span.split()[0]
            assert name in COMMANDS, f"{path.name}: {span}"
            for option in re.findall(r"(?<=\s)--[a-z0-9-]+", span):
                assert re.search(rf"{option}(?![a-z0-9-])", help_of[name]), f"{path.name}: {span}"


def test_links_lead_somewhere() -> None:
    for path in [*DOCUMENTS, *ROOT.glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for path in [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]:
        for line in re.findall(
            r"(?:^    |`)make ([a-z][a-z -]*)", path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            for target in line.split():
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), (
                    f"{path.name}: make {target}"
                )
