"""Check that clips show the digit and the motion that their prompts name.

    python examples/clips/evaluate.py                      # the weights of this folder
    python examples/clips/evaluate.py --pipeline FOLDER --seeds 1

Exports the pipeline with and without cache, draws a clip for each digit, motion and seed, and
prints one line per plan. Exits with 1 if a share is below the minimum.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from clips import FRAMES, MNIST, MOTIONS, SIDE, STILL_SCALE, moved, prompt_of
from score import classify
from torch import Tensor

import goc_deploy

PIPELINE = Path(__file__).resolve().parent / "pipeline"
PLANS = ("none", "fora:2", "fora:2+gc:0.5", "fora:2+goc")
DIGITS, IMAGE = 10, 28
CFG_SCALE, STEPS, BATCH = 3.0, 20, 30


def digits_of(frames: Tensor) -> npt.NDArray[np.int64]:
    """The digit that the classifier of ../mnist reads in frames (N, 1, S, S) in [-1, 1].

    It runs in a process of its own, because sessions that do not share the threads of goc_deploy
    cannot be in its process.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        images = enlarged(frames).numpy()
        return process.submit(classify, images, MNIST / "classifier.onnx").result()


def enlarged(frames: Tensor) -> Tensor:
    """The digit in the middle of frames (N, 1, S, S) in the size of its training picture."""
    side = round(SIDE * STILL_SCALE)
    frames = F.interpolate(frames, (side, side), mode="bilinear", antialias=True)
    margin = (side - IMAGE) // 2
    return frames[..., margin : margin + IMAGE, margin : margin + IMAGE]


def middle(clips: Tensor) -> Tensor:
    """The mean of the two frames in the middle of clips (N, F, 1, S, S)."""
    return clips[:, FRAMES // 2 - 1 : FRAMES // 2 + 1].mean(1)


def motions_of(clips: Tensor) -> npt.NDArray[np.int64]:
    """The motion that makes the most similar clip from the middle of each clip (N, F, 1, S, S)."""
    image = enlarged(middle(clips))
    distances = [
        (moved(image, torch.full((len(clips),), motion)) - clips).square().flatten(1).sum(1)
        for motion in range(len(MOTIONS))
    ]
    return torch.stack(distances).argmin(0).numpy()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pipeline",
        type=Path,
        default=PIPELINE,
        help="folder of the weights, as train.py writes it (default %(default)s)",
    )
    parser.add_argument(
        "--engine",
        type=Path,
        default=Path("out/clips"),
        help="engine directory to write (default %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=4, help="clips per digit and motion")
    parser.add_argument(
        "--minimum", type=float, default=0.9, help="share of each plan (default %(default)s)"
    )
    args = parser.parse_args(argv)
    goc_deploy.export(
        args.pipeline,
        args.engine,
        vae=MNIST / "vae",
        text_encoder=args.pipeline / "text_encoder",
        captions=PIPELINE.parent / "prompts.txt",
        plans=list(PLANS),
        steps=STEPS,
        cfg_scale=CFG_SCALE,
        size=(SIDE, SIDE),
        frames=FRAMES,
        max_batch=BATCH,
        force=True,
    )
    pairs = [(digit, motion) for digit in range(DIGITS) for motion in range(len(MOTIONS))]
    pairs *= args.seeds
    draw = random.Random(0)
    prompts = [prompt_of(digit, motion, draw) for digit, motion in pairs]
    digits, motions = np.array(pairs).T
    reference, enough = None, True
    for plan in PLANS:
        with goc_deploy.load(args.engine, plan=plan) as pipe:
            result = pipe.generate(prompts=prompts, seed=0, cfg_scale=CFG_SCALE)
        reference = result.latents if reference is None else reference
        error = np.linalg.norm(result.latents - reference) / np.linalg.norm(reference)
        clips = torch.from_numpy(result.images.astype(np.float32).mean(-1, keepdims=True))
        clips = clips.permute(0, 1, 4, 2, 3) / 127.5 - 1
        digit = float((digits_of(middle(clips)) == digits).mean())
        motion = float((motions_of(clips) == motions).mean())
        enough = enough and min(digit, motion) >= args.minimum
        print(
            f"{plan}: right digit {digit:.1%}, right motion {motion:.1%} of {len(prompts)} clips, "
            f"relative L2 to {PLANS[0]} {error:.4f}",
            flush=True,
        )
    return 0 if enough else 1


if __name__ == "__main__":
    raise SystemExit(main())
