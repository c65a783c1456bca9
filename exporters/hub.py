"""Checkpoints by their id on the Hugging Face Hub.

Only configurations and safetensors files are downloaded, and no downloaded code is run.
"""

from __future__ import annotations

import re
from pathlib import Path

from goc_deploy.errors import ModelError

CONFIGS = (
    "model_index.json",
    "config.json",
    "transformer/config.json",
    "scheduler/scheduler_config.json",
)
WEIGHTS = (
    "diffusion_pytorch_model*.safetensors",
    "diffusion_pytorch_model.safetensors.index*.json",
    "transformer/diffusion_pytorch_model*.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index*.json",
)
VARIANTS = "*fp16*"  # downloaded only if there are no other weights
FILE_SUFFIXES = (".pt", ".pth", ".safetensors", ".ckpt", ".bin")
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def hub_id(checkpoint: Path) -> str | None:
    """The id of a model, ``org/name``, if the path has this form and does not exist; else None."""
    text, is_file = checkpoint.as_posix(), checkpoint.suffix in FILE_SUFFIXES
    return None if is_file or not _ID.fullmatch(text) or checkpoint.parent.exists() else text


def folder_from_hub(name: str) -> Path:
    """The folder of a model in the local cache of the Hub, downloaded if it is missing.

    Raises:
        ModelError: huggingface_hub is not installed, the Hub cannot be reached, or it does not have
            the model.
    """
    command = f"hf download {name} --local-dir {name.rpartition('/')[2]}"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as cause:
        raise ModelError(
            f"there is no file or folder {name}, and models of the Hugging Face Hub need the "
            "package huggingface_hub; "
            f"run: pip install huggingface_hub, or where it is installed: {command}"
        ) from cause
    try:
        folder = Path(
            snapshot_download(name, allow_patterns=[*CONFIGS, *WEIGHTS], ignore_patterns=[VARIANTS])
        )
        if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
            folder = Path(snapshot_download(name, allow_patterns=[*CONFIGS, *WEIGHTS]))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as cause:
        reason = " ".join(str(cause).split())[:200]
        raise ModelError(
            f"there is no file or folder {name}, and the Hugging Face Hub does not give a model of "
            f"that name: {reason}; fetch it where there "
            f"is a connection: {command}"
        ) from cause
    return folder
