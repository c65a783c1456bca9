"""Write the digits of this example as an ADM reference batch, for goc-eval --reference."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from goc_deploy.runtime.adm import adm_writer

HERE = Path(__file__).resolve().parent
BATCH = 1000


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "output", type=Path, help="ADM .npz to write: arr_0 uint8 [N,28,28,3], arr_1 labels"
    )
    parser.add_argument("--data", type=Path, default=HERE / "mnist10k.npz")
    parser.add_argument("--images", type=int, help="the first so many only")
    args = parser.parse_args(argv)
    with np.load(args.data) as data:
        images, labels = data["images"][: args.images], data["labels"][: args.images]
    with adm_writer(args.output, *images.shape) as writer:
        for first in range(0, len(images), BATCH):
            rows = slice(first, first + BATCH)
            writer.add(images[rows, :, :, None], tuple(labels[rows].tolist()))
    print(args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
