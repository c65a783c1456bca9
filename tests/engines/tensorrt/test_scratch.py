from __future__ import annotations

from types import SimpleNamespace

from goc_deploy.engines.tensorrt.scratch import limit_options, logged_bytes, needed_bytes


def test_a_build_without_a_limit_has_no_option() -> None:
    trt = SimpleNamespace(MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"))
    assert limit_options(trt, 0) == {}
    assert limit_options(trt, 512) == {"memory_pool_limits": {"workspace": 512}}


def test_the_largest_number_in_the_log_counts() -> None:
    lines = ["Total Activation Memory: 256 bytes", "other", "Total Activation Memory: 1024 bytes"]
    assert logged_bytes(lines) == 1024
    assert logged_bytes(["other"]) is None


def test_the_largest_engine_decides() -> None:
    engines = [SimpleNamespace(device_memory_size_v2=size) for size in (0, 4096, 512)]
    assert needed_bytes(engines) == 4096
    assert needed_bytes([]) == 0
