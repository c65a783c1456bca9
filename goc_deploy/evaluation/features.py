"""Feature extractors: an ONNX model of the user, or torch-fidelity's Inception."""

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
    """The outputs of an extractor for a batch, float32.

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
        """Raise UsageError if the extractor cannot take images of this size."""
        ...

    def extract(self, images: np.ndarray) -> Extracted:
        """Extract the features of (n, H, W, 1 or 3) uint8 images."""
        ...


class OnnxExtractor:
    """An ONNX model as extractor.

    Its input is ``images`` float32 (N, C, H, W) in -1..1. Its outputs are ``features``, and
    optionally ``logits`` and ``spatial``.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        """Load the model.

        Raises:
            UsageError: the file is no readable ONNX file, or has other inputs and outputs.
        """
        import onnxruntime

        from goc_deploy.engines.ort import shared_pool_of_process

        shared_pool_of_process(threads)  # a second pool would compete with that of the engines
        self.name = path.name
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised
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
                f"features {path} has inputs {', '.join(inputs)} and outputs "
                f"{', '.join(outputs)}, expected an input "
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
        """Raise UsageError if the model takes images of another size."""
        if any(
            takes not in (None, has) for takes, has in zip(self._size, (height, width), strict=True)
        ):
            raise UsageError(
                f"features {self.name} takes images of {self._size[0]}x{self._size[1]} but these "
                f"are {height}x{width}; "
                f"use an extractor for this size, or one that resizes"
            )

    def extract(self, images: np.ndarray) -> Extracted:
        """Extract the features of (n, H, W, 1 or 3) uint8 images."""
        pixels = (
            with_channels(images, self._channels).transpose(0, 3, 1, 2).astype(np.float32) / 127.5
            - 1
        )
        outputs = dict(
            zip(self._outputs, self._session.run(self._outputs, {"images": pixels}), strict=True)
        )
        spatial = outputs.get("spatial")
        flat = None if spatial is None else spatial[:, :SPATIAL_CHANNELS].reshape(len(spatial), -1)
        return Extracted(outputs["features"], outputs.get("logits"), flat)


class InceptionExtractor:
    """The Inception network of 2015 that defines FID, as torch-fidelity converted it.

    ``spatial`` is the layer ``mixed_6/conv`` of ADM's evaluator: 17 x 17 of the first 7 channels.
    """

    name = INCEPTION

    def __init__(self, weights: Path | None) -> None:
        """Load the network; nothing is ever downloaded.

        Raises:
            UsageError: there is no weights file.
            EnvironmentUnsupportedError: torch-fidelity cannot be imported.
        """
        if weights is None or not weights.is_file():
            missing = "" if weights is None else f"; {weights} is not a file"
            raise UsageError(
                "features 'inception' needs `inception_weights` with torch-fidelity's file "
                f"weights-inception-2015-12-05-6726825d.pth{missing}"
            )
        try:
            import torch
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as cause:  # RuntimeError: torchvision does not fit torch
            raise EnvironmentUnsupportedError(
                "features 'inception' needs torch-fidelity and a torchvision that fits torch "
                f"({cause}); "
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
        """Accept every size: images are resized to 299 x 299 as in TensorFlow 1."""

    def extract(self, images: np.ndarray) -> Extracted:
        """Extract the features of (n, H, W, 1 or 3) uint8 images."""
        pixels = np.ascontiguousarray(with_channels(images, COLOUR).transpose(0, 3, 1, 2))
        self._taken.clear()
        features, logits = self._network(self._from_numpy(pixels))
        spatial = self._taken[0][:, :SPATIAL_CHANNELS].flatten(1)
        return Extracted(features.numpy(), logits.numpy(), spatial.numpy())


def make_extractor(features: str, inception_weights: Path | None, threads: int = 0) -> Extractor:
    """Load an extractor: ``inception``, or the path of an ONNX model.

    Raises:
        UsageError, EnvironmentUnsupportedError: it cannot be loaded.
    """
    if features == INCEPTION:
        return InceptionExtractor(inception_weights)
    if inception_weights is not None:
        raise UsageError("`inception_weights` needs `features=inception`")
    return OnnxExtractor(Path(features), threads)
