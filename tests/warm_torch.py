"""torch with everything that an export imports, so that forked processes export at once."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import warnings

import torch
import tqdm

import goc_deploy.exporters.export  # noqa: F401 (for processes that are forked)
from tests.kept_traces import keep_traces

keep_traces()


def warm_up() -> None:
    """Export a graph, because torch imports most of what that needs only then.

    Raises:
        RuntimeError: this process has other threads, which forked processes would lack.
    """
    tqdm.tqdm.monitor_interval = 0  # no thread
    logging.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            torch.nn.Linear(2, 2),
            (torch.zeros(1, 2),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=8)},),
            verbose=False,
        )
    logging.disable(logging.NOTSET)
    if threading.active_count() > 1 or "onnxruntime" in sys.modules:  # importing it starts a thread
        raise RuntimeError(f"{threading.enumerate()}: this process must not be forked")
    gc.collect()
    gc.freeze()


if __name__ != "__main__":
    warm_up()
