from __future__ import annotations

import numpy as np
import pytest

from goc_deploy.samplers.head import HeadForm
from goc_deploy.samplers.head_features import (
    cells_from_latents,
    head_correction,
    head_features,
    latents_from_cells,
    normalized,
)
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(2, 48, 3, 192, 2, 4, 4, 10, learn_sigma=True)
FORMS = [
    HeadForm("scalar", 2),
    HeadForm("patch", 3),
    HeadForm("patch", 1, scaled=True),
    HeadForm("hidden", 3, 2),
    HeadForm("squares", 2, 1),
    HeadForm("squares", 1, 1, scaled=True),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.signature)
def test_cells_and_latents_are_inverse(form: HeadForm) -> None:
    latents = np.random.default_rng(0).normal(size=(2, SPEC.channels, SPEC.side, SPEC.side))
    cells = cells_from_latents(latents, form, SPEC)
    assert cells.shape[-1] == form.cell_values(SPEC)
    np.testing.assert_array_equal(latents_from_cells(cells, form, SPEC), latents)


def test_a_patch_is_ordered_by_row_column_and_channel() -> None:
    latents = np.arange(SPEC.channels * SPEC.side**2, dtype=np.float32)
    latents = latents.reshape(1, SPEC.channels, SPEC.side, SPEC.side)
    cells = cells_from_latents(latents, HeadForm("patch"), SPEC)
    patch = latents[0, :, : SPEC.patch, SPEC.patch : 2 * SPEC.patch]  # of the second token
    np.testing.assert_array_equal(cells[0, 1], patch.transpose(1, 2, 0).ravel())


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.signature)
def test_features_have_the_width_of_the_form_with_short_and_long_histories(form: HeadForm) -> None:
    rng = np.random.default_rng(1)
    image = (2, SPEC.channels, SPEC.side, SPEC.side)
    pairs = [(rng.normal(size=image), rng.normal(size=image)) for _ in range(1 + form.outputs)]
    tokens = [
        (normalized(rng.normal(size=(2, SPEC.tokens, SPEC.hidden))),) * 2
        for _ in range(1 + form.tokens)
    ]
    latents, scales = rng.normal(size=image), np.array([1.5, 4.0])
    whole = head_features(form, SPEC, latents, pairs, tokens, scales)
    short = head_features(form, SPEC, latents, pairs[:1], tokens[:1], scales)
    assert whole.shape == short.shape
    assert whole.shape[-1] == form.width(SPEC)
    assert np.abs(short).sum() < np.abs(whole).sum()
    if form.scaled:
        half = form.width(SPEC) // 2
        np.testing.assert_allclose(
            whole[..., half:], whole[..., :half] * scales[:, None, None], rtol=1e-5
        )
    zeros = np.zeros((form.width(SPEC), form.cell_values(SPEC)), np.float32)
    assert not head_correction(zeros, whole, form, SPEC).any()


def test_squares_are_those_of_the_tokens_that_hidden_reads_and_come_before_the_one() -> None:
    rng = np.random.default_rng(2)
    latents = rng.normal(size=(2, SPEC.channels, SPEC.side, SPEC.side))
    tokens = [(rng.normal(size=(2, SPEC.tokens, SPEC.hidden)),) * 2 for _ in range(2)]
    read = ([(latents, latents)], tokens, np.array([1.5, 4.0]))
    hidden = head_features(HeadForm("hidden", 3, 2), SPEC, latents, *read)
    found = head_features(HeadForm("squares", 3, 2), SPEC, latents, *read)
    of_tokens = hidden[..., -1 - 6 * SPEC.hidden : -1]
    squares = np.square(of_tokens)
    expected = np.concatenate([hidden[..., :-1], squares, hidden[..., -1:]], axis=-1)
    np.testing.assert_array_equal(found, expected)
