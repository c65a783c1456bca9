"""Feature extractors: an ONNX model of the user's, or torch-fidelity's Inception."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from goc_deploy.errors import EnvironmentUnsupportedError, UsageError
from goc_deploy.runtime.adm import COLOUR, GREY, with_channels

SPATIAL_CHANNELS = 7  # ADM's sFID takes the first channels of a middle layer
INCEPTION = "inception"


@dataclass(frozen=True, slots=True)
class Extracted:
    """What an extractor says of a batch, float32.

    Attributes:
        features: (n, d).
        logits: (n, K), or None.
        spatial: (n, d_s) flattened activations of a middle layer, or None.
    """

    features: np.ndarray
    logits: np.ndarray | None
    spatial: np.ndarray | None


class Extractor(Protocol):
    """Turns images into features."""

    name: str

    def check_images(self, height: int, width: int) -> None:
        """Raise UsageError where images of this size cannot be taken."""
        ...

    def extract(self, images: np.ndarray) -> Extracted:
        """Features of (n, H, W, 1 or 3) uint8 images."""
        ...


class OnnxExtractor:
    """An ONNX model: input ``images`` float32 (N, C, H, W) in -1..1; outputs ``features``, and where it has them
    ``logits`` and ``spatial``."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        """Load the model.

        Raises:
            UsageError: no readable ONNX file, or one of another form.
        """
        import onnxruntime

        from goc_deploy.engines.ort import shared_pool_of_process

        shared_pool_of_process(threads)  # the engines': a pool of its own would compete with it
        self.name = path.name
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised
        options.use_per_session_threads = False
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as cause:
            raise UsageError(
                f"features {path} cannot be loaded as an ONNX model: {cause}"
            ) from cause
        inputs = {i.name: i for i in self._session.get_inputs()}
        outputs = {o.name: o for o in self._session.get_outputs()}
        if set(inputs) != {"images"} or "features" not in outputs:
            raise UsageError(
                f"features {path} has inputs {', '.join(inputs)} and outputs {', '.join(outputs)}, expected an input "
                f"'images' and an output 'features' (and, as it has them, 'logits' and 'spatial')"
            )
        shape = inputs["images"].shape
        if (
            inputs["images"].type != "tensor(float)"
            or len(shape) != 4
            or len(outputs["features"].shape) != 2
        ):
            raise UsageError(
                f"features {path}: 'images' must be float32 [N,C,H,W] and 'features' [N,d]"
            )
        self._channels = shape[1] if isinstance(shape[1], int) else COLOUR
        if self._channels not in (GREY, COLOUR):
            raise UsageError(
                f"features {path}: 'images' has {self._channels} channels, expected 1 or 3"
            )
        self._size = tuple(side if isinstance(side, int) else None for side in shape[2:])
        self._outputs = [name for name in ("features", "logits", "spatial") if name in outputs]

    def check_images(self, height: int, width: int) -> None:
        """Raise UsageError where the model takes images of another size."""
        if any(
            takes not in (None, has) for takes, has in zip(self._size, (height, width), strict=True)
        ):
            raise UsageError(
                f"features {self.name} takes images of {self._size[0]}x{self._size[1]} but these are {height}x{width}; "
                f"use an extractor for this size, or one that resizes"
            )

    def extract(self, images: np.ndarray) -> Extracted:
        """Features of (n, H, W, 1 or 3) uint8 images."""
        pixels = (
            with_channels(images, self._channels).transpose(0, 3, 1, 2).astype(np.float32) / 127.5
            - 1
        )
        found = dict(
            zip(self._outputs, self._session.run(self._outputs, {"images": pixels}), strict=True)
        )
        spatial = found.get("spatial")
        flat = None if spatial is None else spatial[:, :SPATIAL_CHANNELS].reshape(len(spatial), -1)
        return Extracted(found["features"], found.get("logits"), flat)


class InceptionExtractor:
    """The Inception of 2015 that FID is defined by, as torch-fidelity converted it.

    ``spatial`` is what ADM's evaluator calls ``mixed_6/conv``: 17 x 17 of the first 7 channels.
    """

    name = INCEPTION

    def __init__(self, weights: Path | None) -> None:
        """Load the network; nothing is ever downloaded.

        Raises:
            UsageError: no weights file.
            EnvironmentUnsupportedError: torch-fidelity cannot be imported.
        """
        if weights is None or not weights.is_file():
            raise UsageError(
                f"features 'inception' needs `inception_weights` with torch-fidelity's file "
                f"weights-inception-2015-12-05-6726825d.pth{'' if weights is None else f'; {weights} is not a file'}"
            )
        try:
            import torch
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (
            ImportError,
            RuntimeError,
        ) as cause:  # a torchvision that does not fit torch raises RuntimeError
            raise EnvironmentUnsupportedError(
                f"features 'inception' needs torch-fidelity and a torchvision that fits torch ({cause}); "
                f"run: pip install torch-fidelity torchvision"
            ) from cause
        try:
            self._network: Any = FeatureExtractorInceptionV3(
                INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
            )
        except Exception as cause:
            raise UsageError(f"Inception weights {weights} cannot be loaded: {cause}") from cause
        self._from_numpy: Callable[[np.ndarray], Any] = torch.from_numpy
        self._taken: list[Any] = []
        self._network.Mixed_6d.branch1x1.register_forward_hook(
            lambda _module, _in, out: self._taken.append(out)
        )

    def check_images(self, height: int, width: int) -> None:
        """Every size is fine: images are resized to 299 x 299 as TensorFlow 1 did."""

    def extract(self, images: np.ndarray) -> Extracted:
        """Features of (n, H, W, 1 or 3) uint8 images."""
        pixels = np.ascontiguousarray(with_channels(images, COLOUR).transpose(0, 3, 1, 2))
        self._taken.clear()
        features, logits = self._network(self._from_numpy(pixels))
        spatial = self._taken[0][:, :SPATIAL_CHANNELS].flatten(1)
        return Extracted(features.numpy(), logits.numpy(), spatial.numpy())


def make_extractor(features: str, inception_weights: Path | None, threads: int = 0) -> Extractor:
    """The extractor of that name: ``inception``, or the path of an ONNX model.

    Raises:
        UsageError, EnvironmentUnsupportedError: it cannot be loaded.
    """
    if features == INCEPTION:
        return InceptionExtractor(inception_weights)
    if inception_weights is not None:
        raise UsageError("`inception_weights` needs `features=inception`")
    return OnnxExtractor(Path(features), threads)
