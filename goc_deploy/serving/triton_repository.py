"""A model repository for Triton Inference Server: a model (Python backend) per engine directory.

A model is a folder: ``config.pbtxt``, ``1/model.py``, and a request that warms it up. The engine
directory stays where it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from goc_deploy.disk import directory_lock, staged
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.manifest import Manifest
from goc_deploy.engines.choice import BackendOptions, candidates
from goc_deploy.errors import ConflictError
from goc_deploy.options import ServeOptions
from goc_deploy.serving.hosted import hosted_models
from goc_deploy.serving.requests import HostedModel
from goc_deploy.serving.triton_requests import (
    GUIDANCE_SCALE,
    IMAGES,
    LABEL,
    LATENTS,
    NEGATIVE_PROMPT,
    PROMPT,
    SEED,
    USED_SEED,
)
from goc_deploy.version import __version__

QUEUE_SECONDS = 60  # Requests may shorten it, each for itself.
MODEL = '''"""Written by goc-serve; the code is in the package."""

from goc_deploy.serving.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
CONFIG = """\
# Written by goc-serve {version}. It may be edited; docs/serving.md of goc_deploy describes it.
name: {name}
backend: "python"
max_batch_size: {batch}
input [
{inputs}
]
output [
{outputs}
]
dynamic_batching {{
  max_queue_delay_microseconds: {delay}
  default_queue_policy {{
    max_queue_size: {queue}
    timeout_action: REJECT
    default_timeout_microseconds: {timeout}
    allow_timeout_override: true
  }}
}}
instance_group [ {{ {instances} }} ]
model_warmup [ {{
  name: "one image"
  batch_size: 1
  inputs {{
    key: "{warmed}"
    value: {{ data_type: TYPE_STRING dims: [ 1 ] input_data_file: "{warmed}" }}
  }}
}} ]
{parameters}
"""


def write_repository(repository: Path, options: ServeOptions) -> list[Path]:
    """Write a model for each engine directory; each appears whole or not at all.

    Args:
        repository: folder of the repository, which may have other models.
        options: engine directories and settings. ``workers`` is the number of instances, and
            ``queued_images`` bounds the requests that wait, whatever their number of images.

    Returns:
        The folders of the models.

    Raises:
        ConflictError: the repository has a model of that name.
        GocError: an engine directory, plan, backend or device does not exist.
    """
    written: list[Path] = []
    for name, model in hosted_models(options).items():
        directory = EngineDir.open(Path(model.engine_dir))
        for plan in options.plans or (None,):
            directory.plan_entry(plan)
        folder = repository / name
        with directory_lock(folder):
            if folder.exists():
                raise ConflictError(f"{folder} exists; remove it, or choose another repository")
            with staged(folder) as stage:
                _write_model(stage, name, model, directory, options)
        written.append(folder)
    return written


def _write_model(
    stage: Path, name: str, model: HostedModel, directory: EngineDir, options: ServeOptions
) -> None:
    manifest = directory.manifest
    warmed, text = (LABEL, "0") if not manifest.text_encoders else (PROMPT, "warm up")
    most = min(options.batch_images or manifest.max_batch, manifest.max_batch)
    config = CONFIG.format(
        version=__version__,
        name=_quoted(name),
        batch=most,
        inputs=_tensors(_inputs(manifest)),
        outputs=_tensors(_outputs(manifest)),
        delay=round(1e3 * options.max_delay_ms),
        queue=options.queued_images,
        timeout=QUEUE_SECONDS * 10**6,
        instances=f"count: {options.workers} {_instance_kind(directory, options)}",
        warmed=warmed,
        parameters=_parameters(model),
    )
    (stage / "1").mkdir()
    (stage / "warmup").mkdir()
    (stage / "config.pbtxt").write_text(config, encoding="utf-8")
    (stage / "1" / "model.py").write_text(MODEL, encoding="utf-8")
    # Triton's form of a text in a file: its length in four bytes, then its bytes.
    encoded = text.encode()
    (stage / "warmup" / warmed).write_bytes(len(encoded).to_bytes(4, "little") + encoded)


def _inputs(manifest: Manifest) -> dict[str, str]:
    """Type and shape of each input, of one row."""
    optional = {
        SEED: "TYPE_UINT64 dims: [ 1 ] optional: true",
        GUIDANCE_SCALE: "TYPE_FP32 dims: [ 1 ] optional: true",
    }
    if not manifest.text_encoders:
        return {LABEL: "TYPE_STRING dims: [ 1 ]", **optional}
    return {
        PROMPT: "TYPE_STRING dims: [ 1 ]",
        NEGATIVE_PROMPT: "TYPE_STRING dims: [ 1 ] optional: true",
        **optional,
    }


def _outputs(manifest: Manifest) -> dict[str, str]:
    """Type and shape of each output, of one row."""
    spec, size = manifest.model, manifest.image_size
    channels = (manifest.decoder or spec).channels
    images = {IMAGES: f"TYPE_UINT8 dims: [ {size[0]}, {size[1]}, {channels} ]"} if size else {}
    return {
        **images,
        LATENTS: f"TYPE_FP32 dims: [ {', '.join(map(str, spec.latents))} ]",
        USED_SEED: "TYPE_UINT64 dims: [ 1 ]",
    }


def _tensors(tensors: Mapping[str, str]) -> str:
    return ",\n".join(f'  {{ name: "{name}" data_type: {form} }}' for name, form in tensors.items())


def _instance_kind(directory: EngineDir, options: ServeOptions) -> str:
    """Where instances run; the server decides if neither backend nor device is named.

    Raises:
        UsageError: the backend or the device does not exist.
    """
    wanted = BackendOptions(options.threads, device=options.device)
    runs = {name for name, _ in candidates(options.backend, directory, wanted)}
    if runs == {"onnxruntime"}:
        return "kind: KIND_CPU"
    if "onnxruntime" in runs:
        return "kind: KIND_AUTO"
    return "kind: KIND_GPU" + (f" gpus: [ {wanted.gpu} ]" if ":" in options.device else "")


def _parameters(model: HostedModel) -> str:
    values = {
        "engine_dir": str(Path(model.engine_dir).absolute()),
        "plans": json.dumps(list(model.plans)),
        "backend": model.backend,
        "threads": str(model.threads),
    }
    return "\n".join(
        f'parameters {{ key: "{key}" value: {{ string_value: {_quoted(value)} }} }}'
        for key, value in values.items()
    )


def _quoted(text: str) -> str:
    """A text of protobuf's text format."""
    return json.dumps(text, ensure_ascii=False)
