"""Help texts about SPECs."""

from __future__ import annotations

from goc_deploy.policies.bases import ForaOptions
from goc_deploy.policies.head import HEAD_HELP, HeadOptions
from goc_deploy.policies.help import WIDTH, calibrated, form_of, grammar, policy_help
from goc_deploy.policies.options import fields_of
from goc_deploy.policies.polynomials import HermiteOptions
from goc_deploy.policies.tables import BASES, CORRECTIONS


def test_a_form_has_optional_arguments_in_brackets() -> None:
    assert form_of("fora", ForaOptions) == "fora:INTERVAL[@FRACTION]"
    assert form_of("hermite", HermiteOptions) == "hermite[:ORDER[:SIGMA]]"


def test_the_grammar_has_every_form() -> None:
    forms = [form_of(name, base.options) for name, base in BASES.items()]
    forms += [f"+{form_of(name, row.options)}" for name, row in CORRECTIONS.items()]
    for form in (*forms, "+head[:scalar|patch|hidden|squares]"):
        assert form in grammar()


def test_the_help_has_every_policy_option_range_and_default_on_lines_that_fit() -> None:
    text = policy_help()
    words = " ".join(text.split())
    rows = [(row.help, row.options) for row in (*BASES.values(), *CORRECTIONS.values())]
    for sentence, options in (*rows, (HEAD_HELP, HeadOptions)):
        assert sentence in words
        for one in fields_of(options):
            assert one.help in words
    assert ",gamma=GAMMA" in words
    assert "A number within 0..1. [default: 0.5]" in words
    assert ",phase=first|last" in words
    assert max(map(len, text.splitlines())) <= WIDTH


def test_policies_that_learn_from_images_are_named() -> None:
    assert calibrated() == "goc, fit, search, smoothcache, head"
