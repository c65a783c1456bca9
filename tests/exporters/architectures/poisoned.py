"""A run whose conditions become NaN after the only computed step."""

from __future__ import annotations

from typing import Any

import numpy as np

from goc_deploy.host_memory import host_array
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.runtime.step_events import StepEvent


def check_that_collapsed_steps_read_no_conditions(pipe: Pipeline, **request: Any) -> None:
    """Fill what captions and references became with NaN after step 0; the latents stay the same.

    These are keys and values of captions, or the streams beside the image, whose history is empty,
    and the patches of references.

    Args:
        pipe: a pipeline of one session, with a plan that computes at step 0 only.
        request: the captions and references to draw.
    """
    assert pipe.plan.kind_counts == {"full": 1, "collapsed": pipe.plan.steps - 1}
    expected = pipe.generate(**request, seed=1).latents
    (session,) = pipe.engines.weights.sessions
    buffers = session.buffers
    assert buffers.captions is not None
    if pipe.spec.has_text_stream:
        assert "text" in buffers.others
    else:
        assert buffers.captions.keys_values is not None
    assert (buffers.patches is not None) == ("reference" in buffers.others)

    def poison(event: StepEvent) -> None:
        if event.step == 0:
            conditions = [buffers.captions.keys_values, buffers.patches]
            for stream in buffers.others.values():
                assert not stream.slots
                conditions += [stream.start, *stream.tokens]
            for buffer in conditions:
                if buffer is not None:
                    host_array(buffer).fill(np.nan)

    found = pipe.generate(**request, seed=1, callback=poison).latents
    np.testing.assert_array_equal(found, expected)
