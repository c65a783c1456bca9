"""What a session uploads for a request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from goc_deploy.conditions.captions import Captions, Conditions
from goc_deploy.guidance import SkipLayerGuidance
from goc_deploy.runtime.request import Batch, Drawing, Request, prepared
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(1, 48, 3, 96, 2, 4, 4, 10, False)
NOISE = np.zeros((3, 1, 4, 8, 8), np.float32)


def request(scales: list[float], channels: int = 3, captions: Captions | None = None) -> Request:
    conditions = Conditions((7, 2, 7), (10, 10, 10), captions)
    return Request(conditions, NOISE, np.array(scales), channels)


def test_images_of_equal_labels_share_a_row_of_the_table() -> None:
    inputs = prepared(request([2.0, 2.0, 2.0]), SPEC)
    assert inputs.batch == Batch(3, True, labels=3)
    assert inputs.distinct.tolist() == [2, 7, 10]
    assert inputs.index.tolist() == [1, 0, 1, 2, 2, 2]
    assert inputs.rows.tolist() == [0, 1, 2, 0, 1, 2]


def test_an_image_of_scale_one_reads_its_own_prediction_twice() -> None:
    inputs = prepared(request([2.0, 1.0, 4.0]), SPEC)
    assert inputs.cond_rows.tolist() == [0, 1, 2]
    assert inputs.uncond_rows.tolist() == [3, 1, 5]
    assert inputs.guidance.tolist() == [[2, 2, 2, 1], [1, 1, 1, 1], [4, 4, 4, 1]]
    assert inputs.guidance.dtype == np.float32


@pytest.mark.parametrize(("scales", "channels"), [([1.0] * 3, 3), ([2.0] * 3, 0)])
def test_without_guidance_there_are_no_unconditional_rows(
    scales: list[float], channels: int
) -> None:
    inputs = prepared(request(scales, channels), SPEC)
    assert inputs.batch == Batch(3, False, labels=2)
    assert inputs.uncond_rows.tolist() == [0, 1, 2]


def test_padded_labels_depend_on_the_number_of_images_alone() -> None:
    inputs = prepared(request([2.0] * 3), SPEC, pads_labels=True)
    assert inputs.distinct.tolist() == [2, 7, 10, 10]
    assert prepared(request([1.0] * 3), SPEC, pads_labels=True).distinct.tolist() == [2, 7, 7]


def test_captions_take_the_place_of_labels() -> None:
    table = Captions(
        np.zeros((11, 2, 5), np.float32),
        np.ones((11, 2), np.float32),
        np.zeros((11, 4), np.float32),
    )
    text = replace(SPEC, caption_channels=5, caption_tokens=2)
    inputs = prepared(request([2.0] * 3, captions=table), text)
    assert inputs.batch == Batch(3, True, labels=1, captions=3)
    assert inputs.distinct.tolist() == [2, 7, 10]
    assert (inputs.in_table.tolist(), inputs.table_rows.tolist()) == ([0], [0] * 6)
    pooled = prepared(request([2.0] * 3, captions=table), replace(text, pooled_channels=4))
    assert pooled.batch == Batch(3, True, labels=3, captions=3)
    assert pooled.in_table.tolist() == [2, 7, 10]


def test_rows_with_skipped_blocks_have_rows_of_the_table_of_their_own() -> None:
    skips = SkipLayerGuidance(2.8, range(1, 4))
    inputs = prepared(replace(request([2.0, 1.0, 4.0]), skips=skips), SPEC)
    assert inputs.batch == Batch(3, True, labels=6, skip_steps=range(1, 4))
    assert (inputs.batch.rows, inputs.batch.without_skips.rows) == (9, 6)
    assert inputs.in_table.tolist() == [2, 7, 10, 7, 2, 7]
    assert inputs.table_rows.tolist() == [1, 0, 1, 2, 2, 2, 3, 4, 5]
    assert inputs.index.tolist() == [1, 0, 1, 2, 2, 2, 1, 0, 1]
    assert inputs.uncond_rows.tolist() == [3, 1, 5]
    scale = np.float32(2.8)
    np.testing.assert_array_equal(
        inputs.skip_weights, [[scale] * 3 + [0], [0] * 4, [scale] * 3 + [0]]
    )
    unguided = prepared(replace(request([1.0] * 3), skips=skips), SPEC)
    assert unguided.batch == prepared(request([1.0] * 3), SPEC).batch


def test_images_get_the_same_noise_however_a_call_is_cut() -> None:
    conditions = Conditions((7, 2, 7), (10, 10, 10))
    keys, scales = [(5, 0), (5, 1), (9, 0)], np.array([2.0, 1.0, 4.0])
    drawing = Drawing(conditions, keys, scales, 3, (4, 8, 8))
    whole = drawing.request(range(3), 2)
    part = drawing.request(range(1, 3), 2)
    np.testing.assert_array_equal(part.noise, whole.noise[1:])
    assert (part.conditions.labels, part.cfg_scale.tolist()) == ((2, 7), [1.0, 4.0])
    given = replace(drawing, start=NOISE[:, 0]).request(range(3), 2)
    assert not given.noise[:, 0].any()
    np.testing.assert_array_equal(given.noise[:, 1], whole.noise[:, 1])
