from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest

from goc_deploy.errors import EnvironmentUnsupportedError, UsageError
from goc_deploy.evaluation.features import OnnxExtractor, make_extractor

CLASSIFIER = Path(__file__).parents[3] / "examples" / "mnist" / "classifier.onnx"


def save_model(path: Path, name: str, shape: list[int | str], output: str = "features") -> Path:
    """An extractor whose features are the mean over channels and columns."""
    tensor = onnx.helper.make_tensor_value_info
    axes = onnx.numpy_helper.from_array(np.array([1, 3]), "axes")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("ReduceMean", [name, "axes"], [output], keepdims=0)],
        "extractor",
        [tensor(name, onnx.TensorProto.FLOAT, shape)],
        [tensor(output, onnx.TensorProto.FLOAT, ["N", "d"])],
        [axes],
    )
    onnx.save(
        onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10
        ),
        path,
    )
    return path


def test_the_demo_classifier_gives_features_logits_and_spatial_activations_of_the_digits() -> None:
    extractor = make_extractor(str(CLASSIFIER), None)
    with np.load(CLASSIFIER.with_name("mnist10k.npz")) as digits:
        images, labels = digits["images"][:100, :, :, None], digits["labels"][:100]
    extractor.check_images(28, 28)
    found = extractor.extract(images)
    assert found.features.shape == (100, 64)
    assert found.spatial is not None
    assert found.spatial.shape == (100, 7 * 7 * 7)
    assert found.spatial.std() > 0
    assert found.logits is not None
    assert (found.logits.argmax(axis=1) == labels).mean() > 0.95
    coloured = extractor.extract(np.repeat(images, 3, axis=3))
    np.testing.assert_array_equal(coloured.features, found.features)


def test_pixels_go_in_between_minus_one_and_one(tmp_path: Path) -> None:
    extractor = OnnxExtractor(save_model(tmp_path / "x.onnx", "images", ["N", 3, "H", "W"]))
    extractor.check_images(5, 9)
    images = np.zeros((2, 4, 4, 1), np.uint8)
    images[1] = 255
    found = extractor.extract(images)
    assert found.features.tolist() == [[-1] * 4, [1] * 4]
    assert found.logits is None
    assert found.spatial is None


def test_extractors_of_another_form_are_refused(tmp_path: Path) -> None:
    for model, message in (
        (
            save_model(tmp_path / "a.onnx", "pixels", ["N", 3, 8, 8]),
            "inputs pixels and outputs features",
        ),
        (save_model(tmp_path / "b.onnx", "images", ["N", 3, 8, 8], "out"), "outputs out, expected"),
        (
            save_model(tmp_path / "c.onnx", "images", ["N", 4, 8, 8]),
            "has 4 channels, expected 1 or 3",
        ),
        (tmp_path / "missing.onnx", "cannot be loaded as an ONNX model"),
    ):
        with pytest.raises(UsageError, match=message):
            OnnxExtractor(model)
    (tmp_path / "text.onnx").write_text("text")
    with pytest.raises(UsageError, match="cannot be loaded as an ONNX model"):
        OnnxExtractor(tmp_path / "text.onnx")
    with pytest.raises(UsageError, match="takes images of 28x28 but these are 32x32"):
        OnnxExtractor(CLASSIFIER).check_images(32, 32)


def test_inception_is_refused_without_weights_or_package_and_never_downloaded(
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match="needs `inception_weights`"):
        make_extractor("inception", None)
    with pytest.raises(UsageError, match="is not a file"):
        make_extractor("inception", tmp_path / "missing.pth")
    with pytest.raises(UsageError, match="needs `features=inception`"):
        make_extractor(str(CLASSIFIER), tmp_path)
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"no weights")
    if find_spec("torch_fidelity") is None:
        with pytest.raises(
            EnvironmentUnsupportedError, match="pip install torch-fidelity torchvision"
        ):
            make_extractor("inception", weights)
    else:
        with pytest.raises((UsageError, EnvironmentUnsupportedError)):
            make_extractor("inception", weights)
