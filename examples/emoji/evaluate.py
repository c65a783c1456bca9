"""Check that held-out prompts draw the emoji that they name.

A prompt succeeds if the nearest training picture is one of that name.

    python examples/emoji/evaluate.py                              # the weights of this folder
    python examples/emoji/evaluate.py --pipeline FOLDER --pairs 100

Exports the pipeline with and without cache, draws the prompts, prints one line per plan with the
prompts that missed, and writes a sheet of 100 pictures per plan, with their prompts in a text file
beside it. Exits with 1 below a minimum.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from captions import read_captions

import goc_deploy
from goc_deploy.runtime.images import grid

HERE = Path(__file__).resolve().parent
CHECKPOINT, TEXT_ENCODER = "pixart_emoji.safetensors", "text_encoder"
MINIMA = {"none": 0.90, "fora:2+goc": 0.88}
PAIRS_SEED = 7
CFG_SCALE = 2.0
CELLS = 12
EDGE_WEIGHT = 2.0
SHEET, SHEET_COLUMNS = 100, 10

Floats = npt.NDArray[np.float32]


def features(images: npt.NDArray[np.uint8]) -> Floats:
    """Colours and edges of pictures (N, 48, 48, 3), averaged over 12x12 cells: (N, F) float32."""
    pixels = images.astype(np.float32) / 255
    grey = pixels.mean(axis=3)
    across, down = np.diff(grey, axis=2, append=1.0), np.diff(grey, axis=1, append=1.0)
    edges = np.stack([np.abs(across), np.abs(down)], axis=3) * EDGE_WEIGHT
    both = np.concatenate([pixels, edges], axis=3)  # (N, H, W, 5)
    count, height, width, channels = both.shape
    cells = both.reshape(count, CELLS, height // CELLS, CELLS, width // CELLS, channels).mean(
        axis=(2, 4)
    )
    return np.asarray(cells.reshape(count, -1), dtype=np.float32)


def nearest(
    images: npt.NDArray[np.uint8], references: npt.NDArray[np.uint8]
) -> npt.NDArray[np.int64]:
    """The row of the nearest reference of each picture."""
    found, known = features(images), features(references)
    distances = (found**2).sum(1)[:, None] - 2 * found @ known.T + (known**2).sum(1)
    return distances.argmin(axis=1)


def held_out_pairs(count: int) -> list[tuple[int, str]]:
    """(row of the emoji, held-out prompt) in a fixed random order.

    Picture i of a request has noise of its own.
    """
    entries = list(read_captions().values())
    rows = list(range(len(entries)))
    random.Random(PAIRS_SEED).shuffle(rows)
    return [(row, entries[row].held_out) for row in (rows * (count // len(rows) + 1))[:count]]


def write_sheet(images: npt.NDArray[np.uint8], prompts: Sequence[str], path: Path) -> None:
    """The first pictures as a PNG, and what they should show as text, row by row."""
    grid(images[:SHEET], SHEET_COLUMNS, scale=2, gap=4).save(path)
    rows = [
        prompts[first : first + SHEET_COLUMNS]
        for first in range(0, min(SHEET, len(prompts)), SHEET_COLUMNS)
    ]
    path.with_suffix(".txt").write_text(
        "\n".join(" | ".join(row) for row in rows) + "\n", encoding="utf-8"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pipeline",
        type=Path,
        default=HERE,
        help="folder of the weights, as train.py writes it (default %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/emoji"), help="folder to write (default %(default)s)"
    )
    parser.add_argument(
        "--pairs", type=int, default=300, help="(prompt, noise) pairs (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument(
        "--cfg-scale", type=float, default=CFG_SCALE, help="guidance (default %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="of DPM-Solver++ (default %(default)s)"
    )
    parser.add_argument(
        "--minimum", type=float, help="share for every plan in place of those of this example"
    )
    args = parser.parse_args(argv)
    if args.pairs < 1:
        parser.error(f"--pairs {args.pairs}: give at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    engine = args.out / "engine"
    goc_deploy.export(
        args.pipeline / CHECKPOINT,
        engine,
        text_encoder=args.pipeline / TEXT_ENCODER,
        captions=HERE / "prompts.txt",
        plans=list(MINIMA),
        sampler="dpm++",
        prediction="x0",
        num_heads=6,
        steps=args.steps,
        cfg_scale=args.cfg_scale,
        max_batch=25,
        force=True,
    )
    with np.load(HERE / "pictures.npz") as arrays:
        references, names = arrays["images"], arrays["names"].tolist()
    pairs = held_out_pairs(args.pairs)
    wanted, prompts = np.array([row for row, _ in pairs]), [prompt for _, prompt in pairs]
    enough = True
    for plan, minimum in MINIMA.items():
        minimum = minimum if args.minimum is None else args.minimum
        with goc_deploy.load(engine, plan=plan) as pipe:
            result = pipe.generate(prompts=prompts, seed=args.seed, cfg_scale=args.cfg_scale)
        images = _pictures(result.images)
        found = nearest(images, references)
        share = float((found == wanted).mean())
        enough = enough and share >= minimum
        missed = [f"{prompts[i]} -> {names[found[i]]}" for i in np.flatnonzero(found != wanted)]
        print(
            f"{plan}: {share:.1%} of {len(pairs)} pairs are nearest to what they name, minimum "
            f"{minimum:.0%}"
        )
        if missed:
            print(f"  missed: {'; '.join(missed)}")
        sheet = args.out / f"{plan.replace(':', '-').replace('+', '-')}.png"
        write_sheet(images, prompts, sheet)
        print(f"  {sheet}")
    return 0 if enough else 1


def _pictures(images: npt.NDArray[np.uint8] | None) -> npt.NDArray[np.uint8]:
    assert images is not None  # the model draws pixels
    return images


if __name__ == "__main__":
    raise SystemExit(main())
