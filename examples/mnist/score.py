"""Check that a classifier reads in generated digits the labels that they were generated for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

HERE = Path(__file__).resolve().parent
BATCH = 500
SAMPLE_SHAPES = ((28, 28, 1), (28, 28, 3))


def load_samples(path: Path) -> npt.NDArray[np.float32]:
    """Samples of an ADM npz as (N, 1, 28, 28) float32 in [-1, 1]; three channels become their mean.

    Raises:
        ValueError: the file has no ``arr_0`` of uint8 28x28 images with one or three channels.
    """
    with np.load(path) as data:
        if "arr_0" not in data:
            raise ValueError(f"{path}: no array arr_0")
        samples = data["arr_0"]
    if samples.dtype != np.uint8 or samples.shape[1:] not in SAMPLE_SHAPES:
        raise ValueError(
            f"{path}: arr_0 is {samples.dtype} {samples.shape}, not uint8 (N, 28, 28, 1 or 3)"
        )
    if len(samples) == 0:
        raise ValueError(f"{path}: no samples")
    grey = samples.astype(np.float32).mean(axis=3)
    return np.asarray(grey[:, None] / 127.5 - 1, dtype=np.float32)


def classify(samples: npt.NDArray[np.float32], classifier: Path) -> npt.NDArray[np.int64]:
    """The digit that the classifier reads in each sample."""
    session = onnxruntime.InferenceSession(str(classifier), providers=["CPUExecutionProvider"])
    parts = [
        session.run(["logits"], {"images": samples[first : first + BATCH]})[0].argmax(axis=1)
        for first in range(0, len(samples), BATCH)
    ]
    return np.concatenate(parts)


def parse_labels(text: str) -> list[int]:
    """Comma-separated digits."""
    labels = [int(part) for part in text.split(",")]
    if any(not 0 <= label <= 9 for label in labels):
        raise ValueError(text)
    return labels


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("samples", type=Path, help="ADM npz with arr_0")
    parser.add_argument(
        "--labels",
        type=parse_labels,
        required=True,
        help="labels in the order of the samples, repeated if fewer",
    )
    parser.add_argument("--minimum", type=float, default=0.95, help="exit 1 below this agreement")
    parser.add_argument("--classifier", type=Path, default=HERE / "classifier.onnx")
    args = parser.parse_args(argv)
    try:
        samples = load_samples(args.samples)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    labels = np.resize(np.array(args.labels), len(samples))
    agrees = classify(samples, args.classifier) == labels
    for label in np.unique(labels):
        of_label = agrees[labels == label]
        print(f"label {label}: {of_label.sum()} of {len(of_label)}")
    agreement = float(agrees.mean())
    print(f"agreement {agreement:.4f} ({agrees.sum()} of {len(agrees)}), minimum {args.minimum:g}")
    return 0 if agreement >= args.minimum else 1


if __name__ == "__main__":
    raise SystemExit(main())
