"""A run whose captions become NaN after the only computed step."""

from __future__ import annotations

import numpy as np

from goc_deploy.conditions.captions import PromptEmbeds
from goc_deploy.host_memory import host_array
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.runtime.step_events import StepEvent


def check_that_collapsed_steps_read_no_captions(pipe: Pipeline, captions: PromptEmbeds) -> None:
    """Fill the keys and values of the captions with NaN after step 0; the latents stay the same.

    Args:
        pipe: a pipeline of one session, with a plan that computes at step 0 only.
        captions: the captions to draw.
    """
    assert pipe.plan.kind_counts == {"full": 1, "collapsed": pipe.plan.steps - 1}
    expected = pipe.generate(prompt_embeds=captions, seed=1).latents
    (session,) = pipe._engines.weights.sessions

    def poison(event: StepEvent) -> None:
        if event.step == 0:
            buffers = session._buffers.captions
            assert buffers is not None
            assert buffers.keys_values is not None
            host_array(buffers.keys_values).fill(np.nan)

    found = pipe.generate(prompt_embeds=captions, seed=1, callback=poison).latents
    np.testing.assert_array_equal(found, expected)
