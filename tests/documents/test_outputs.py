from __future__ import annotations

import pytest

from tests.documents.outputs import same_output

TABLE = "┃ plan ┃ ms ┃\n│ none │ 10.00 │\n"


@pytest.mark.parametrize(
    ("found", "vary", "same"),
    [
        (TABLE, False, True),
        ("│ plan │     ms │\n│ none │  10.01 │\n", False, True),
        ("tracing: 3 of 9, 1.5/s, 0:00:04 left\n" + TABLE, False, True),
        (TABLE.replace("10.00", "20.00"), False, False),
        (TABLE.replace("10.00", "20.00"), True, True),
        (TABLE.replace("none", "fora"), True, False),
        (TABLE + "more\n", True, False),
    ],
)
def test_words_are_compared_and_numbers_unless_they_vary(
    found: str, vary: bool, same: bool
) -> None:
    assert same_output(TABLE, found, vary) is same


def test_versions_are_compared_as_text() -> None:
    assert not same_output("onnxruntime 1.31.1", "onnxruntime 1.31.2", vary=False)
    assert same_output("onnxruntime 1.31.1", "onnxruntime 1.31.2", vary=True)
