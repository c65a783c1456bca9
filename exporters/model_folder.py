"""A model in a folder that diffusers saved: which architecture it is, its sizes, tensors and class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from goc_deploy.errors import ModelError
from goc_deploy.exporters.architectures.contract import Architecture, DiffusersFolder
from goc_deploy.exporters.checkpoint import Checkpoint
from goc_deploy.exporters.folders import (
    CONFIG,
    PIPELINE_CONFIG,
    SCHEDULER_CONFIG,
    is_transformer,
    read_json,
    read_scheduler,
    read_weights,
)
from goc_deploy.exporters.schedulers import prediction_of
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True)
class FolderModel:
    """A model of a folder.

    Attributes:
        checkpoint: tensors under the names of the architecture's public layout.
        spec: sizes, as ``config.json`` gives them.
        class_names: one per class, synonyms separated by commas; empty where the folder has none.
        scheduler: settings of the scheduler that the pipeline samples with, or None where the folder has none.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    class_names: tuple[str, ...]
    scheduler: dict[str, Any] | None


def read_model_folder(
    path: Path, architectures: Mapping[str, Architecture], prediction: str | None = None
) -> FolderModel:
    """Read a folder of a pipeline (``model_index.json``, ``transformer/`` and ``scheduler/``) or its transformer folder alone.

    Args:
        path: the folder.
        architectures: what it may hold, by name.
        prediction: what the model predicts, where somebody says otherwise than its scheduler.

    Raises:
        ModelError: not such a folder, a setting that is not supported, weights that are missing, damaged, or not those
            of the configuration.
        SafetyError: an index that names files outside the folder.
    """
    index = read_json(path / PIPELINE_CONFIG) if (path / PIPELINE_CONFIG).exists() else {}
    folders = [a.folder for a in architectures.values() if a.folder is not None]
    if not folders:
        raise ModelError(
            f"{path}: diffusers has no {' or '.join(architectures)}; give a checkpoint in its public layout"
        )
    pipelines = [name for family in folders for name in family.pipelines]
    if index and index.get("_class_name") not in pipelines:
        raise ModelError(
            f"{path} holds a {index.get('_class_name')}; this version exports {' or '.join(pipelines)}"
        )
    folder = path / "transformer" if index else path
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{folder} has no {CONFIG}; give a .pt, .pth or .safetensors file, or a folder that diffusers saved a "
            f"pipeline ({', '.join(pipelines)}) or its transformer to"
        )
    config = read_json(folder / CONFIG)
    family = _family(config, folders, architectures, folder)
    spec = family.spec_from_config(config, f"{folder / CONFIG}")
    files, found = read_weights(folder)
    described = [folder / CONFIG, *([path / PIPELINE_CONFIG] if index else [])]
    scheduler, settings = None, path / SCHEDULER_CONFIG
    if index and settings.exists():
        scheduler = read_scheduler(settings)
        described.append(settings)
        prediction = prediction or prediction_of(scheduler, str(settings))
    spec = replace(spec, prediction=prediction or spec.prediction)
    spec, state = family.state_from_diffusers(found, spec, folder)
    checkpoint = Checkpoint(path, state, "plain", (*described, *files))
    return FolderModel(
        checkpoint, spec, _class_names(index, spec, path / PIPELINE_CONFIG), scheduler
    )


def _family(
    config: Mapping[str, Any],
    families: Sequence[DiffusersFolder],
    architectures: Mapping[str, Architecture],
    folder: Path,
) -> DiffusersFolder:
    for family in families:
        if is_transformer(config, family.transformer, family.norm_type):
            return family
    raise ModelError(
        f"{folder / CONFIG} is of a {config.get('_class_name')} with norm_type {config.get('norm_type')!r}, "
        f"this version exports {', '.join(architectures)}; check `model` and the folder"
    )


def _class_names(index: Mapping[str, Any], spec: ModelSpec, where: Path) -> tuple[str, ...]:
    names = index.get("id2label")
    if names is None:
        return ()
    ids = {str(i) for i in range(spec.classes)}
    if (
        not isinstance(names, dict)
        or not all(isinstance(name, str) for name in names.values())
        or names.keys() != ids
    ):
        count = len(names) if isinstance(names, dict) else 0
        raise ModelError(
            f"{where}: id2label must name each of the model's {spec.classes} classes by its number, it has {count} entries"
        )
    return tuple(names[str(i)] for i in range(spec.classes))
