"""Captions: what is padded, what points where, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from goc_deploy.conditions.captions import (
    MASKED,
    conditions_from_captions,
    conditions_from_labels,
    joined_conditions,
    prompt_embeds_from_arrays,
)
from goc_deploy.conditions.stored_captions import captions_from_bytes, captions_to_bytes
from goc_deploy.errors import EngineDirError, UsageError
from goc_deploy.spec import ModelSpec

SPEC = ModelSpec(
    1,
    8,
    1,
    8,
    2,
    2,
    4,
    2,
    False,
    "pixart",
    ("attn", "cross", "mlp"),
    caption_channels=3,
    caption_tokens=5,
)
POOLED = replace(SPEC, pooled_channels=2)
CLASSES = ModelSpec(1, 8, 1, 8, 2, 2, 4, 10, False)


def arrays(**changes: Any) -> dict[str, np.ndarray]:
    found = {
        "prompt_embeds": np.ones((2, 4, 3), np.float16),
        "prompt_attention_mask": np.array([[1, 1, 0, 0], [1, 1, 1, 1]]),
        "negative_prompt_embeds": np.zeros((1, 2, 3), np.float32),
        **changes,
    }
    return {name: value for name, value in found.items() if value is not None}


def test_captions_are_padded_and_padding_is_masked() -> None:
    given = prompt_embeds_from_arrays(arrays(), SPEC, "x")
    assert given.prompts.embeds.shape == (2, 5, 3)
    assert given.prompts.embeds.dtype == np.float32
    np.testing.assert_array_equal(given.prompts.bias[0], [0, 0, MASKED, MASKED, MASKED])
    assert given.negatives is not None
    np.testing.assert_array_equal(given.negatives.mask, [[1, 1, 0, 0, 0]])
    assert len(given.table) == 3


def test_rows_point_into_prompts_then_negatives() -> None:
    one = conditions_from_captions(
        None, prompt_embeds_from_arrays(arrays(), SPEC, "x"), guided=True
    )
    assert (one.labels, one.nulls) == ((0, 1), (2, 2))
    each = arrays(negative_prompt_embeds=np.zeros((2, 2, 3)))
    two = conditions_from_captions(
        [1, 0, 1], prompt_embeds_from_arrays(each, SPEC, "x"), guided=True
    )
    assert (two.labels, two.nulls) == ((1, 0, 1), (3, 2, 3))
    assert two.part(range(1, 3)).labels == (0, 1)
    classes = conditions_from_labels([3, np.int64(4)], CLASSES, None)
    assert (classes.labels, classes.nulls, classes.captions) == ((3, 4), (10, 10), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_embeds": None}, "x must hold prompt_embeds"),
        (
            {"more": np.zeros(1)},
            "may hold prompt_attention_mask, negative_prompt_embeds, .*; it has more, negative",
        ),
        (
            {f"blocks.{i}": np.zeros(1) for i in range(20)},
            r"it has blocks\.0, blocks\.1, blocks\.10, [^,]*(, [^,]*){4} and 1\d more$",
        ),
        (
            {"negative_prompt_embeds": None, "negative_prompt_attention_mask": np.ones((1, 2))},
            "x must hold",
        ),
        (
            {"prompt_embeds": np.ones((4, 3))},
            r"prompt_embeds is float64 \[4, 3\], expected floating point \[N,L,C\]",
        ),
        ({"prompt_embeds": np.ones((2, 4, 3), int)}, "prompt_embeds is int64"),
        (
            {"prompt_embeds": np.ones((2, 4, 7))},
            "embeddings of width 7 but the model takes 3; use its own text encoder",
        ),
        (
            {"prompt_embeds": np.ones((2, 6, 3))},
            "has 6 tokens but the model takes 5; encode with that limit",
        ),
        (
            {"prompt_embeds": np.full((2, 4, 3), np.nan)},
            "prompt_embeds holds NaN or infinite values",
        ),
        (
            {"prompt_attention_mask": np.ones((2, 3))},
            r"prompt_attention_mask must be \[2, 4\] of zeros and ones",
        ),
        ({"prompt_attention_mask": np.full((2, 4), 2)}, "must be .* of zeros and ones"),
        ({"prompt_attention_mask": np.zeros((2, 4))}, "with a one for each caption"),
        (
            {"negative_prompt_embeds": np.zeros((3, 2, 3))},
            "has 3 negative captions for 2; give one, or one for each",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prompt_embeds_from_arrays(arrays(**changes), SPEC, "x")


def test_models_of_classes_take_no_captions() -> None:
    with pytest.raises(
        UsageError, match="this is a class-conditional model, which takes no captions; use `labels`"
    ):
        prompt_embeds_from_arrays(arrays(), CLASSES, "x")
    with pytest.raises(
        UsageError, match="the engine directory keeps no captions to take instead of class labels"
    ):
        conditions_from_labels([0], SPEC, None)


def pooled_arrays(**changes: Any) -> dict[str, np.ndarray]:
    found = {
        "pooled_prompt_embeds": np.array([[1, 2], [3, 4]], np.float16),
        "negative_pooled_prompt_embeds": np.array([[5.0, 6.0]]),
        **changes,
    }
    return arrays(**found)


def test_pooled_embeddings_follow_their_captions() -> None:
    given = prompt_embeds_from_arrays(pooled_arrays(), POOLED, "x")
    np.testing.assert_array_equal(given.table.pooled, [[1, 2], [3, 4], [5, 6]])
    assert given.table.pooled.dtype == np.float32
    parts = [conditions_from_captions(rows, given, guided=True) for rows in ([1], [0, 0])]
    together = joined_conditions(parts)
    assert together.captions is not None
    np.testing.assert_array_equal(
        together.captions.pooled[list(together.labels)], [[3, 4], [1, 2], [1, 2]]
    )
    np.testing.assert_array_equal(together.captions.pooled[list(together.nulls)], [[5, 6]] * 3)
    assert prompt_embeds_from_arrays(arrays(), SPEC, "x").table.pooled.shape == (3, 0)


def test_stored_captions_are_read_as_they_were_written() -> None:
    given = prompt_embeds_from_arrays(pooled_arrays(), POOLED, "x")
    content = captions_to_bytes(given)
    stored = captions_from_bytes(memoryview(content), POOLED, "x")
    for name in ("embeds", "mask", "pooled"):
        np.testing.assert_array_equal(getattr(stored.table, name), getattr(given.table, name))
    alone = captions_to_bytes(replace(given, negatives=None))
    with pytest.raises(EngineDirError, match="x holds no negative caption; export again"):
        captions_from_bytes(memoryview(alone), POOLED, "x")
    with pytest.raises(EngineDirError, match="x holds 2 captions, not 3; export again"):
        captions_from_bytes(memoryview(content), replace(POOLED, choices=3), "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pooled_prompt_embeds": None},
            "x must hold prompt_embeds and pooled_prompt_embeds, and may hold prompt_attention",
        ),
        (
            {"negative_pooled_prompt_embeds": None},
            "x has negative_prompt_embeds but no negative_pooled_prompt_embeds",
        ),
        ({"negative_prompt_embeds": None}, "x must hold .*; it has negative_pooled_prompt_embeds"),
        (
            {"pooled_prompt_embeds": np.zeros((2, 3))},
            r"pooled_prompt_embeds is float64 \[2, 3\], expected floating point \[2, 2\]",
        ),
        (
            {"negative_pooled_prompt_embeds": np.zeros((2, 2))},
            r"negative_pooled_prompt_embeds is float64 \[2, 2\], expected .* \[1, 2\]",
        ),
        ({"pooled_prompt_embeds": np.full((2, 2), np.nan)}, "pooled_prompt_embeds holds NaN"),
        ({"pooled_prompt_embeds": np.zeros((2, 2), int)}, "pooled_prompt_embeds is int64"),
    ],
)
def test_pooled_embeddings_that_do_not_fit_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        prompt_embeds_from_arrays(pooled_arrays(**changes), POOLED, "x")


def test_pooled_embeddings_are_refused_by_a_model_that_reads_none() -> None:
    with pytest.raises(UsageError, match="x must hold prompt_embeds, and may hold prompt_attent"):
        prompt_embeds_from_arrays(pooled_arrays(), SPEC, "x")
