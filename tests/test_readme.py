"""What the README tells people to type is typed here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import GOLDEN, Command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SMALL = {"model.pt": f"{GOLDEN / 'model.pt'}", "207,360": "2,3", "207, 360": "2, 3"}


def adapted(text: str) -> str:
    """The README's text with our small model in place of the reader's."""
    for old, new in SMALL.items():
        text = text.replace(old, new)
    return text


def test_the_commands_work_in_the_order_they_are_shown(command: Command, tmp_path: Path) -> None:
    lines = re.findall(r"^    (goc-\S+ .*)$", README, re.MULTILINE)
    assert {line.split()[0] for line in lines} == {"goc-export", "goc-run", "goc-plan", "goc-bench", "goc-eval"}
    for line in lines:
        words = shlex.split(adapted(line))
        if words[0] == "goc-export":
            words += ["--num-heads", "4"]
        command(*words, cwd=tmp_path)


def test_the_program_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(adapted(code).replace('"engine", plans', '"engine", num_heads=4, plans'), found)
    assert found["result"].latents.shape == (2, 4, 8, 8)


def test_links_lead_somewhere() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_schedule_in_the_documentation_is_legal() -> None:
    from goc_deploy.schedule import check_schedule
    from goc_deploy.serde import schedule_from_json

    (text,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "engine-directory.md").read_text(), re.DOTALL)
    check_schedule(schedule_from_json(text.encode(), "docs"))


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for target in re.findall(r"^    make (\w+)", text, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
