"""Train the digit classifier that scores generated samples and export it to ONNX."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
HELD_OUT = 1000
FEATURES = 64
SPATIAL_CHANNELS = 7
MAX_SHIFT = 2 / 14
MAX_TURN = 0.2
MAX_STRETCH = 0.12


class Classifier(nn.Module):
    """Four convolutions, a 64-wide feature layer and a linear layer over it."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 2)):
            convolution = nn.Conv2d(
                inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False
            )
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.dropout = nn.Dropout(0.3)
        self.hidden = nn.Linear(32 * 7 * 7, FEATURES)
        self.output = nn.Linear(FEATURES, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, 10) and features (N, 64) of images (N, 1, 28, 28) in [-1, 1]."""
        features = F.relu(self.hidden(self.dropout(self.body(images))))
        return self.output(features), features


def load_digits(path: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) float32 in [-1, 1] and labels (N,) int64."""
    with np.load(path) as data:
        images = torch.from_numpy(data["images"]).float()[:, None] / 127.5 - 1
        labels = torch.from_numpy(data["labels"]).long()
    return images, labels


def distort(images: Tensor) -> Tensor:
    """Turn, stretch and shift every image at random by a little.

    The pixels that come into view are background (-1).
    """
    count = len(images)
    limits = torch.tensor([MAX_TURN, MAX_STRETCH, MAX_STRETCH])
    turn, stretch_x, stretch_y = (torch.rand(3, count) * 2 - 1) * limits[:, None]
    shift = (torch.rand(count, 2) * 2 - 1) * MAX_SHIFT
    first = torch.stack([turn.cos() * (1 + stretch_x), -turn.sin(), shift[:, 0]], dim=1)
    second = torch.stack([turn.sin(), turn.cos() * (1 + stretch_y), shift[:, 1]], dim=1)
    places = F.affine_grid(
        torch.stack([first, second], dim=1), list(images.shape), align_corners=False
    )
    return F.grid_sample(images + 1, places, align_corners=False) - 1


def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of images that the model labels correctly."""
    model.eval()
    with torch.no_grad():
        return float((model(images)[0].argmax(dim=1) == labels).float().mean())


def fit(model: Classifier, images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Train the model on distorted images with a warmed-up cosine learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    steps = args.epochs * math.ceil(len(images) / args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=steps, pct_start=0.2
    )
    start = time.monotonic()
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for chosen in torch.randperm(len(images)).split(args.batch):
            logits, _ = model(distort(images[chosen]))
            loss = F.cross_entropy(logits, labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        print(
            f"epoch {epoch + 1}, {time.monotonic() - start:.0f} s, loss {total / len(images):.4f}",
            flush=True,
        )


def with_spatial_output(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Add ``spatial`` (N, 7, 7, 7) for sFID.

    It is the first channels of the last convolution, as ADM takes them from Inception.
    """
    graph = proto.graph
    flattened = next(node for node in graph.node if node.op_type == "Reshape").input[0]
    bounds = {"spatial_start": [0], "spatial_stop": [SPATIAL_CHANNELS], "spatial_axis": [1]}
    for name, value in bounds.items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
    graph.node.append(
        onnx.helper.make_node("Slice", [flattened, *bounds], ["spatial"], name="spatial")
    )
    shape = ["N", SPATIAL_CHANNELS, 7, 7]
    graph.output.append(
        onnx.helper.make_tensor_value_info("spatial", onnx.TensorProto.FLOAT, shape)
    )
    return proto


def export(model: Classifier, path: Path) -> None:
    """Write the model as one ONNX file with a dynamic batch.

    Readers see the old file or the whole new one.
    """
    model.eval()
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 1, 28, 28),),
        input_names=["images"],
        output_names=["logits", "features"],
        dynamic_shapes={"images": {0: torch.export.Dim("N")}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    proto = with_spatial_output(program.model_proto)
    proto.doc_string = ""
    for node in proto.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    onnx.checker.check_model(proto)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(proto.SerializeToString())
    os.replace(temporary, path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=HERE / "mnist10k.npz")
    parser.add_argument("--out", type=Path, default=HERE / "classifier.onnx")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images, labels = load_digits(args.data)
    order = torch.randperm(len(images))
    held_out, training = order[:HELD_OUT], order[HELD_OUT:]
    model = Classifier()
    fit(model, images[training], labels[training], args)
    share = accuracy(model, images[held_out], labels[held_out])
    export(model, args.out)
    print(f"accuracy on {HELD_OUT} held-out digits: {share:.4f}; wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
