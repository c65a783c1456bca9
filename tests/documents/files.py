"""The files that the commands of the documents need: small random models.

They have the names of public models.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.numpy import save_file as save_arrays

from tests.conftest import GOLDEN, MNIST
from tests.exporters.architectures import test_diffusers_folder as dit
from tests.exporters.architectures import test_pixart as pixart
from tests.pixart_reference import SPEC as PIXART
from tests.pixart_reference import random_state
from tests.t5_folder import save_encoder

ROOT = Path(__file__).parents[2]


def repository(folder: Path) -> None:
    """What the commands read of the repository; documents that a command rewrites are copies."""
    for name in ("examples", "benchmarks", "tests", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", folder / "docs")


def checkpoint(folder: Path) -> None:
    """``model.pt``, a DiT."""
    (folder / "model.pt").symlink_to(GOLDEN / "model.pt")


def dit_pipeline(folder: Path) -> None:
    """A DiTPipeline as diffusers saves it, with the VAE of the digits."""
    top = folder / "DiT-XL-2-256"
    (top / "transformer").mkdir(parents=True)
    dit.write_config(top / "transformer")
    dit.save_weights(top / "transformer", dit.state())
    names = {**dit.NAMES, "207": "golden retriever"}
    (top / "model_index.json").write_text(
        json.dumps({"_class_name": "DiTPipeline", "id2label": names})
    )
    (top / "vae").symlink_to(MNIST / "vae")


def pixart_pipeline(folder: Path) -> None:
    """A PixArtAlphaPipeline with its text encoder and tokenizer, and encoded captions.

    The captions were encoded elsewhere.
    """
    top = folder / "PixArt-XL-2-512x512"
    pixart.save_folder(top / "transformer", random_state(), PIXART)
    (top / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    save_encoder(top / "text_encoder")
    (top / "tokenizer").mkdir()
    (top / "text_encoder" / "spiece.model").rename(top / "tokenizer" / "spiece.model")
    (top / "vae").symlink_to(MNIST / "vae")
    save_arrays(pixart.arrays(PIXART), folder / "embeds.safetensors")


def golden_engine(folder: Path) -> None:
    """``engine``, which the documents export in other places."""
    from goc_deploy import export

    export(GOLDEN / "model.pt", folder / "engine", plans=["none"], num_heads=4)
