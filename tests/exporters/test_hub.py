"""Models by their id on the Hugging Face Hub.

The cache is made by the test: no connection is used.
"""

from __future__ import annotations

import builtins
import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest

from goc_deploy.engine_dir.reading import read_manifest
from goc_deploy.errors import ModelError
from goc_deploy.exporters import hub
from goc_deploy.exporters.hub import folder_from_hub, hub_id
from tests.conftest import Command
from tests.exporters.architectures.test_diffusers_folder import (
    NAMES,
    save_weights,
    state,
    write_config,
)

NAME, COMMIT = "someone/DiT-tiny", "0123456789abcdef0123456789abcdef01234567"


def fill_cache(home: Path, weights: str) -> None:
    """A snapshot as the Hub's library keeps it: links to blobs."""
    model = home / "hub" / "models--someone--DiT-tiny"
    snapshot, blobs = model / "snapshots" / COMMIT, model / "blobs"
    for folder in (snapshot / "transformer", snapshot / "scheduler", blobs, model / "refs"):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    write_config(blobs)
    save_weights(blobs, state(), "weights")
    (blobs / "index").write_text(json.dumps({"_class_name": "DiTPipeline", "id2label": NAMES}))
    (blobs / "scheduler").write_text(
        json.dumps({"_class_name": "DDIMScheduler", "clip_sample": False})
    )
    (snapshot / "transformer" / "config.json").symlink_to(blobs / "config.json")
    (snapshot / "transformer" / weights).symlink_to(blobs / "weights")
    (snapshot / "scheduler" / "scheduler_config.json").symlink_to(blobs / "scheduler")
    (snapshot / "model_index.json").symlink_to(blobs / "index")


@pytest.mark.parametrize(
    "weights", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"]
)
def test_a_model_of_the_cache_is_exported_by_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, weights: str
) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub comes with the hub extra")
    fill_cache(tmp_path / "home", weights)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command("goc-export", NAME, "-o", tmp_path / "engine", "--plan", "none", "--steps", 2)
    manifest = read_manifest(tmp_path / "engine")
    assert manifest.provenance["checkpoint"] == f"{NAME}@{COMMIT}"
    assert (manifest.class_names[3], manifest.scheduler) == (
        NAMES["3"],
        {"_class_name": "DDIMScheduler", "clip_sample": False},
    )
    done = command("goc-export", "someone/other", "-o", tmp_path / "other", code=3)
    assert "there is no file or folder someone/other" in done.stderr
    assert "hf download someone/other --local-dir other" in done.stderr


def test_only_configurations_and_safetensors_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip(
        "huggingface_hub", reason="huggingface_hub comes with the hub extra"
    )
    asked: list[dict[str, Any]] = []

    def snapshot(_name: str, **given: Any) -> str:
        asked.append(given)
        return str(tmp_path)

    monkeypatch.setattr(library, "snapshot_download", snapshot)
    assert folder_from_hub(NAME) == tmp_path
    assert [given.get("ignore_patterns") for given in asked] == [[hub.VARIANTS], None]

    def wanted(file: str) -> bool:
        return any(fnmatch.fnmatch(file, pattern) for pattern in asked[1]["allow_patterns"])

    kept = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "config.json",
    ]
    stem = "transformer/diffusion_pytorch_model"
    kept += [
        f"{stem}{end}.safetensors"
        for end in ("", ".fp16", "-00001-of-00002", ".fp16-00001-of-00002")
    ]
    kept += [f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json"]
    assert all(map(wanted, kept))
    others = [
        "transformer/model.py",
        f"{stem}.bin",
        "pipeline.py",
        "vae/diffusion_pytorch_model.safetensors",
        "README.md",
    ]
    assert not any(map(wanted, others))


def test_without_the_package_the_command_that_fetches_the_model_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("huggingface_hub"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ModelError,
        match=r"pip install huggingface_hub, or .*: hf download someone/DiT-tiny --local-dir "
        r"DiT-tiny",
    ):
        folder_from_hub(NAME)


def test_paths_are_no_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for text in (
        "models/lost",
        "out/model.pt",
        "model",
        "a/b/c",
        "../a/b",
        "/a/b",
        "-x/y",
        str(tmp_path / "x"),
    ):
        assert hub_id(Path(text)) is None, text
    assert hub_id(Path("facebook/DiT-XL-2-256")) == "facebook/DiT-XL-2-256"
