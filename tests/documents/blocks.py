"""Code blocks of Markdown documents, and what the comment before a block says about running it.

<!-- not run: REASON -->              nobody runs the block here
<!-- run with: OLD => NEW; ... -->    the block is run with these replacements, which make it small
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

NOT_RUN = re.compile(r"<!-- not run: (?P<reason>\S.*) -->")
RUN_WITH = re.compile(r"<!-- run with: (?P<pairs>\S.*) -->")
FENCE = re.compile(r"```(?P<language>\w*)$")
INDENT = "    "


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced or indented block.

    Attributes:
        line: of its first line of content, from 1.
        language: what stands behind the fence; empty for shell.
        text: its content.
        comment: the comment right before it, or nothing.
    """

    line: int
    language: str
    text: str
    comment: str

    @property
    def reason(self) -> str:
        """Why it is not run, or nothing."""
        found = NOT_RUN.fullmatch(self.comment)
        return found["reason"] if found else ""

    @property
    def adapted(self) -> str:
        """Its text with the replacements of its comment.

        Raises:
            ValueError: a replacement that is not in the block, or none in the comment.
        """
        found, text = RUN_WITH.fullmatch(self.comment), self.text
        for pair in found["pairs"].split("; ") if found else ():
            old, arrow, new = pair.partition(" => ")
            if not arrow or old not in text:
                raise ValueError(f"line {self.line}: the block has no {old!r} to replace")
            text = text.replace(old, new)
        return text


def blocks(document: str) -> Iterator[Block]:
    """Every block of a document in order. Blocks within list items are not looked for.

    Raises:
        ValueError: a fence that is never closed.
    """
    lines, comment, at = document.splitlines(), "", 0
    while at < len(lines):
        fence = FENCE.match(lines[at])
        if fence or (
            lines[at].startswith(INDENT) and (at == 0 or not lines[at - 1].strip() or comment)
        ):
            end = _end_of_fence(lines, at + 1) if fence else _end_of_indent(lines, at)
            first = at + 1 if fence else at
            content = [line if fence else line.removeprefix(INDENT) for line in lines[first:end]]
            yield Block(
                first + 1,
                fence["language"] if fence else "",
                "\n".join(content).rstrip() + "\n",
                comment,
            )
            comment, at = "", end + 1 if fence else end
            continue
        if lines[at].strip():
            comment = (
                lines[at] if lines[at].startswith("<!--") and lines[at].endswith("-->") else ""
            )
        at += 1


def _end_of_fence(lines: list[str], at: int) -> int:
    for end in range(at, len(lines)):
        if lines[end] == "```":
            return end
    raise ValueError(f"line {at}: the fence is never closed")


def _end_of_indent(lines: list[str], at: int) -> int:
    end = at
    for i in range(at, len(lines)):
        if lines[i].startswith(INDENT):
            end = i + 1
        elif lines[i].strip():
            break
    return end
