"""Model repositories for Triton, as goc-serve writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from goc_deploy.errors import ConflictError, UsageError
from goc_deploy.options import ServeOptions
from goc_deploy.serving.triton_repository import write_repository
from tests.conftest import Command


def config_of(repository: Path, engine: Path, **more: object) -> str:
    (folder,) = write_repository(repository, ServeOptions((engine,), **more))  # type: ignore[arg-type]
    assert folder == repository / engine.name
    return (folder / "config.pbtxt").read_text(encoding="utf-8")


def test_the_command_writes_a_model_for_each_directory(
    golden_engine: Path, tmp_path: Path, command: Command
) -> None:
    other = tmp_path / "zwei"
    other.symlink_to(golden_engine)
    repository = tmp_path / "new" / "models"
    settings = ("--plan", "none", "--plan", "fora:2", "--batch-images", 4, "--queued-images", 9)
    more = ("--max-delay-ms", 2.5, "--workers", 3, "--threads", 1, "--device", "cpu")
    done = command(
        *("goc-serve", golden_engine, other, "--triton-repository", repository, *settings, *more)
    )
    assert done.stdout == (
        f"wrote {repository / 'engine'}\nwrote {repository / 'zwei'}\n"
        f"next: tritonserver --model-repository {repository}\n"
    )
    assert sorted(path.name for path in repository.iterdir()) == ["engine", "zwei"]
    config = (repository / "zwei" / "config.pbtxt").read_text(encoding="utf-8")
    for line in (
        'name: "zwei"',
        "max_batch_size: 4",
        "max_queue_size: 9",
        "max_queue_delay_microseconds: 2500",
        "count: 3 kind: KIND_CPU",
        'key: "plans" value: { string_value: "[\\"none\\", \\"fora:2\\"]" }',
        f'key: "engine_dir" value: {{ string_value: {json.dumps(str(other))} }}',
    ):
        assert line in config
    code = (repository / "zwei" / "1" / "model.py").read_text()
    assert "from goc_deploy.serving.triton_model import TritonPythonModel" in code
    assert (repository / "zwei" / "warmup" / "LABEL").read_bytes() == b"\x01\0\0\x000"


def test_inputs_and_outputs_are_those_of_the_model(
    golden_engine: Path, prompt_engine_small: Path, tmp_path: Path
) -> None:
    def tensors(config: str) -> list[str]:
        return re.findall(r'\{ name: "(\w+)" data_type: (.*?) \}', config)

    optional = [
        ("SEED", "TYPE_UINT64 dims: [ 1 ] optional: true"),
        ("GUIDANCE_SCALE", "TYPE_FP32 dims: [ 1 ] optional: true"),
    ]
    used = ("USED_SEED", "TYPE_UINT64 dims: [ 1 ]")
    assert tensors(config_of(tmp_path / "a", golden_engine)) == [
        ("LABEL", "TYPE_STRING dims: [ 1 ]"),
        *optional,
        ("LATENTS", "TYPE_FP32 dims: [ 4, 8, 8 ]"),
        used,
    ]
    assert tensors(config_of(tmp_path / "b", prompt_engine_small)) == [
        ("PROMPT", "TYPE_STRING dims: [ 1 ]"),
        ("NEGATIVE_PROMPT", "TYPE_STRING dims: [ 1 ] optional: true"),
        *optional,
        ("IMAGES", "TYPE_UINT8 dims: [ 28, 28, 1 ]"),
        ("LATENTS", "TYPE_FP32 dims: [ 4, 7, 7 ]"),
        used,
    ]


@pytest.mark.parametrize(
    ("backend", "device", "kind"),
    [
        ("auto", "auto", "KIND_AUTO }"),
        ("auto", "cpu", "KIND_CPU }"),
        ("onnxruntime", "auto", "KIND_CPU }"),
        ("auto", "cuda", "KIND_GPU }"),
        ("tensorrt", "auto", "KIND_GPU }"),
        ("auto", "cuda:2", "KIND_GPU gpus: [ 2 ] }"),
    ],
)
def test_instances_are_where_the_backend_runs(
    golden_engine: Path, tmp_path: Path, backend: str, device: str, kind: str
) -> None:
    assert f"kind: {kind}" in config_of(tmp_path, golden_engine, backend=backend, device=device)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"plans": ("fora:7",)}, "there is no plan 'fora:7'"),
        ({"device": "tpu"}, "there is no device 'tpu'"),
        ({"backend": "caffe"}, "there is no backend 'caffe'"),
        ({"backend": "onnxruntime", "device": "cuda"}, "does not run on device cuda"),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_is_written(
    golden_engine: Path, tmp_path: Path, more: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        config_of(tmp_path / "models", golden_engine, **more)
    assert not (tmp_path / "models").exists()


def test_a_model_that_exists_is_left_alone(golden_engine: Path, tmp_path: Path) -> None:
    config_of(tmp_path, golden_engine)
    edited = tmp_path / "engine" / "config.pbtxt"
    edited.write_text("mine")
    with pytest.raises(ConflictError, match="remove it, or choose another repository"):
        config_of(tmp_path, golden_engine)
    assert edited.read_text() == "mine"


def test_options_of_the_http_server_are_refused(
    golden_engine: Path, tmp_path: Path, command: Command
) -> None:
    words = ("goc-serve", golden_engine, "--triton-repository", tmp_path, "--port", 8000)
    done = command(*words, code=2)
    assert "--port is for the HTTP server, not for --triton-repository" in done.stderr
    assert list(tmp_path.iterdir()) == []
