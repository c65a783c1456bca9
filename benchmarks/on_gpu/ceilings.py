"""Measure the ceilings of the card: copies and matrix products.

The copies are made by our device layer and by PyTorch, the matrix products by PyTorch.

python -m benchmarks.on_gpu.ceilings ceilings.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.on_gpu.device import device_here, microseconds, saver


def copy_gb_s(nbytes: int, repeats: int, *, dry: bool) -> float:
    """Bytes read plus bytes written per second of a copy by the device layer, in GB/s."""
    device = device_here(dry=dry)
    stream, source, target = (
        device.stream(),
        device.allocate((nbytes,), "uint8"),
        device.allocate((nbytes,), "uint8"),
    )
    return (
        2 * nbytes / (1e3 * microseconds(stream, [lambda: stream.copy(source, target)], 1, repeats))
    )


def torch_ceilings(nbytes: int, side: int, repeats: int, *, dry: bool) -> dict[str, float]:
    """Copy in GB/s and square products in TFLOP/s, on random values."""
    import torch

    where = "cpu" if dry else "cuda"
    source = torch.ones(nbytes, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    found = {
        "copy_gb_s_torch": 2
        * nbytes
        / 1e6
        / milliseconds(lambda: target.copy_(source), repeats, dry=dry)
    }
    for name, dtype in {"fp16": torch.float16, "bf16": torch.bfloat16}.items():
        a, b = (torch.randn(side, side, dtype=torch.float32).to(where, dtype) for _ in range(2))
        elapsed = milliseconds(lambda x=a, y=b: x @ y, repeats, dry=dry)
        found[f"{name}_tflops"] = 2 * side**3 / 1e9 / elapsed
    return found


def milliseconds(run: Callable[[], object], repeats: int, *, dry: bool) -> float:
    """Median of a call, by events on the card."""
    import time

    import torch

    times = []
    for repeat in range(repeats + 3):
        if dry:
            started = time.perf_counter()
            run()
            elapsed = 1e3 * (time.perf_counter() - started)
        else:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run()
            last.record()
            last.synchronize()
            elapsed = first.elapsed_time(last)
        if repeat >= 3:
            times.append(elapsed)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--dry", action="store_true", help="small sizes, on the host")
    args = parser.parse_args()
    save, nbytes, side, repeats = (
        saver(args.output),
        *((2**22, 128, 1) if args.dry else (2**30, 8192, 20)),
    )
    found: dict[str, Any] = {"copy_gb_s_ours": copy_gb_s(nbytes, repeats, dry=args.dry)}
    save({**found, "copy_gb_s": found["copy_gb_s_ours"]})
    if find_spec("torch") is None:
        print("torch is not installed: no matrix products, and no copy by PyTorch")
        return
    found |= torch_ceilings(nbytes, side, repeats, dry=args.dry)
    save({**found, "copy_gb_s": max(found["copy_gb_s_ours"], found["copy_gb_s_torch"])})


if __name__ == "__main__":
    main()
