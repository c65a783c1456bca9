"""The update kernel on all units of DiT-XL/2: its time, and bytes moved over time.

The bytes are those that the kernel must move.

    python -m benchmarks.on_gpu.kernel kernel.json

Launches rotate over copies of their tensors that are larger than the card's cache, as a step before
them would leave it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.device import device_here, kernels_here, microseconds, saver, stack_launch
from goc_deploy.engines.plugin.kernel import Kernels, Stack
from goc_deploy.protocols import Device

UNITS, TOKENS, HIDDEN = 56, 256, 1152
STACKS = {
    "reuse": Stack((1,) * UNITS, (False,) * UNITS),
    "gradient": Stack((2,) * UNITS, (True,) * UNITS),
}
ROWS = (2, 8, 16, 32)
BEYOND_THE_CACHE, LAUNCHES = 2**29, 16


def measured(
    device: Device, kernels: Kernels, stack: Stack, shape: tuple[int, int, int], *, dry: bool
) -> dict[str, Any]:
    """One form at one number of rows.

    Returns:
        ``launched_us``, ``replayed_us`` (in one CUDA graph; None if it could not be recorded),
        ``nbytes``, and ``gb_s`` of the faster of the two.
    """
    stream, nbytes = device.stream(), stack.bytes_needed(shape, "float16")
    copies = 1 if dry else -(-BEYOND_THE_CACHE // nbytes)
    sets = [stack_launch(device, stream, kernels, stack, shape, "float16") for _ in range(copies)]
    launches = sets if dry else sets * -(-LAUNCHES // copies)
    count, repeats = len(launches), 1 if dry else 20
    found: dict[str, Any] = {
        "nbytes": nbytes,
        "launched_us": microseconds(stream, launches, count, repeats),
    }
    try:
        replay = stream.recorded(launches)
    except Exception as error:  # launched times are worth having without it
        found |= {"replayed_us": None, "not_recorded": f"{type(error).__name__}: {error}"[:300]}
    else:
        found["replayed_us"] = microseconds(stream, replay, count, repeats)
    best = min(us for us in (found["launched_us"], found["replayed_us"]) if us is not None)
    return {**found, "gb_s": nbytes / (1e3 * best)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--dry", action="store_true", help="small tensors, on the host")
    args = parser.parse_args()
    save, found, device = saver(args.output), [], device_here(dry=args.dry)
    kernels = kernels_here(dry=args.dry)
    for rows in (2,) if args.dry else ROWS:
        for form, stack in STACKS.items():
            shape = (rows, 4, 64) if args.dry else (rows, TOKENS, HIDDEN)
            found.append(
                {
                    "form": form,
                    "rows": rows,
                    **measured(device, kernels, stack, shape, dry=args.dry),
                }
            )
            save(found)


if __name__ == "__main__":
    main()
