from __future__ import annotations

import pytest

from tests.documents.blocks import blocks

TEXT = """# Title

    first --a
    second

- a list
  with text

<!-- not run: needs a GPU -->
```
third
```
Text.
<!-- run with: 100 => 1; big => small -->

    fourth --n 100 \\
        big

```json
{}
```
"""


def test_every_block_is_found_with_its_comment() -> None:
    found = list(blocks(TEXT))
    assert [(b.line, b.language, b.text) for b in found] == [
        (3, "", "first --a\nsecond\n"),
        (11, "", "third\n"),
        (16, "", "fourth --n 100 \\\n    big\n"),
        (20, "json", "{}\n"),
    ]
    assert [b.reason for b in found] == ["", "needs a GPU", "", ""]
    assert found[2].adapted == "fourth --n 1 \\\n    small\n"


def test_a_replacement_that_is_not_in_the_block_is_refused() -> None:
    (found,) = blocks("<!-- run with: 5 => 1 -->\n```\necho 4\n```\n")
    with pytest.raises(ValueError, match="line 3: the block has no '5' to replace"):
        _ = found.adapted


def test_an_open_fence_is_refused() -> None:
    with pytest.raises(ValueError, match="never closed"):
        list(blocks("```\necho\n"))
