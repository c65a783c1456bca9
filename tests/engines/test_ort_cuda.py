"""The memory arena of ONNX Runtime's CUDA provider; `tests.runtime.test_ort_cuda` has sessions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as state

from goc_deploy.engines import ort_cuda


@pytest.fixture(autouse=True)
def no_arena_yet() -> Iterator[None]:
    ort_cuda.shared_arena.cache_clear()
    yield
    ort_cuda.shared_arena.cache_clear()


def test_each_gpu_has_one_arena_that_grows_by_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(state, "create_and_register_allocator_v2", lambda *call: calls.append(call))
    for device in (1, 1, 0):
        ort_cuda.shared_arena(device)
    assert [(provider, where.name, where.device_id) for provider, where, *_ in calls] == [
        ("CUDAExecutionProvider", "Cuda", 1),
        ("CUDAExecutionProvider", "Cuda", 0),
    ]
    for _, where, options, arena in calls:
        assert where.allocator_type == state.OrtAllocatorType.ORT_ARENA_ALLOCATOR
        assert options == {}
        assert (arena.arena_extend_strategy, arena.max_mem) == (1, 0)


def test_onnx_runtime_takes_the_arguments(caplog: pytest.LogCaptureFixture) -> None:
    """Without CUDA libraries it refuses the provider, and not the types of the arguments."""
    ort_cuda.shared_arena(0)
    assert "incompatible function arguments" not in caplog.text
