from __future__ import annotations

import pytest

from goc_deploy.conditions.labels import labels_from_text
from goc_deploy.errors import UsageError
from goc_deploy.policies.bases import ForaOptions
from goc_deploy.policies.options import filled

NAMES = ("tench, Tinca tinca", "golden retriever", "crane", "drake", "crane, lifting device")


def test_labels_are_numbers_or_names_in_any_case() -> None:
    assert labels_from_text("Golden  Retriever, 3,tinca tinca ,lifting device", NAMES) == (
        1,
        3,
        0,
        4,
    )
    assert labels_from_text("1, 2", ()) == (1, 2)


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("crane", NAMES, "'crane' is the name of the classes 2 and 4; give the number"),
        ("poodle", NAMES, "label 'poodle' is not the name of a class"),
        ("1,,2", NAMES, "label '' is not the name of a class"),
        ("poodle", (), "label 'poodle' must be a whole number, the model has no class names"),
    ],
)
def test_words_that_name_no_class_or_several_are_refused(
    text: str, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        labels_from_text(text, names)


@pytest.mark.parametrize("text", ["\uff11", "\u0663", "2" * 5000, "2.0", ""])
def test_numbers_are_digits_of_ascii_and_few(text: str) -> None:
    with pytest.raises(UsageError, match="must be a whole number"):
        labels_from_text(text, ())
    with pytest.raises(UsageError, match="must be a whole number"):
        filled(ForaOptions, "fora", text, {})
