"""Models in folders that diffusers saved: architecture, sizes, tensors and class names."""

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
    WITHOUT_EFFECT,
    is_transformer,
    read_json,
    read_scheduler,
    read_weights,
)
from goc_deploy.exporters.schedulers import prediction_of
from goc_deploy.exporters.weight_sets import join_sets
from goc_deploy.samplers.process import EVEN_SIGMAS, FITTED_SHIFT
from goc_deploy.spec import ModelSpec

SECOND = "transformer_2"  # of Wan 2.2 A14B


@dataclass(frozen=True)
class FolderModel:
    """A model that was read from a folder.

    Attributes:
        checkpoint: tensors under the names of the architecture's public layout.
        spec: sizes of the model, from ``config.json``.
        class_names: one name per class, synonyms separated by commas; empty if the folder has no
            names.
        scheduler: settings of the pipeline's scheduler, with `EVEN_SIGMAS` and `FITTED_SHIFT` if
            they are true; None if the folder has no scheduler.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    class_names: tuple[str, ...]
    scheduler: dict[str, Any] | None


def read_model_folder(
    path: Path, architectures: Mapping[str, Architecture], prediction: str | None = None
) -> FolderModel:
    """Read the folder of a pipeline, or its transformer folder alone.

    The folder of a pipeline has ``model_index.json``, ``transformer/`` and ``scheduler/``, and
    ``transformer_2/`` if a second set of weights computes the later steps.

    Args:
        path: the folder.
        architectures: the architectures that are accepted, by name.
        prediction: prediction type that overrides the one of the scheduler, or None.

    Raises:
        ModelError: the folder is not such a folder, a setting is not supported, or the weights are
            missing, damaged, or do not fit the configuration.
        SafetyError: an index names files outside the folder.
    """
    index = read_json(path / PIPELINE_CONFIG) if (path / PIPELINE_CONFIG).exists() else {}
    folder = path / "transformer" if index else path
    named = _families(path, index, architectures, folder)
    config = read_json(folder / CONFIG)
    family = _family(config, named, architectures, folder)
    spec = family.spec_from_config(config, f"{folder / CONFIG}")
    files, tensors = read_weights(folder)
    described = [folder / CONFIG, *([path / PIPELINE_CONFIG] if index else [])]
    scheduler, settings = None, path / SCHEDULER_CONFIG
    if index and settings.exists():
        told = {EVEN_SIGMAS: family.even_sigmas, FITTED_SHIFT: family.fitted_shift}
        added = {name: True for name, value in told.items() if value}
        scheduler = {**read_scheduler(settings), **added}
        described.append(settings)
        prediction = prediction or prediction_of(scheduler, str(settings))
    spec = replace(spec, prediction_type=prediction or spec.prediction_type)
    spec, state = family.state_from_diffusers(tensors, spec, folder)
    if any(index.get(SECOND) or ()):
        spec = replace(spec, boundary=_boundary(index, path / PIPELINE_CONFIG))
        second = path / SECOND
        _check_same(read_json(second / CONFIG), config, second / CONFIG)
        more, tensors = read_weights(second)
        state = join_sets(state, family.state_from_diffusers(tensors, spec, second)[1])
        described.append(second / CONFIG)
        files += more
    checkpoint = Checkpoint(path, state, "plain", (*described, *files))
    return FolderModel(
        checkpoint, spec, _class_names(index, spec, path / PIPELINE_CONFIG), scheduler
    )


def _families(
    path: Path, index: Mapping[str, Any], architectures: Mapping[str, Architecture], folder: Path
) -> list[DiffusersFolder]:
    """The families whose pipeline a folder may be.

    Raises:
        ModelError: there is none, or the transformer is missing.
    """
    folders = [a.folder for a in architectures.values() if a.folder is not None]
    if not folders:
        raise ModelError(
            f"{path}: diffusers has no {' or '.join(architectures)}; give a checkpoint in its "
            "public layout"
        )
    pipelines = [name for family in folders for name in family.pipelines]
    if index and index.get("_class_name") not in pipelines:
        raise ModelError(
            f"{path} holds a {index.get('_class_name')}; this version exports "
            f"{' or '.join(pipelines)}"
        )
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{folder} has no {CONFIG}; give a .pt, .pth or .safetensors file, or a folder that "
            f"diffusers saved a pipeline ({', '.join(pipelines)}) or its transformer to"
        )
    return [a for a in folders if not index or index["_class_name"] in a.pipelines]


def _boundary(index: Mapping[str, Any], where: Path) -> float:
    """The share of the training timesteps below which the second transformer computes."""
    boundary = index.get("boundary_ratio")
    if not isinstance(boundary, float) or not 0 < boundary < 1:
        raise ModelError(
            f"{where}: boundary_ratio must be a number between 0 and 1, because there are two "
            f"transformers, got {boundary!r:.60}"
        )
    return boundary


def _check_same(second: Mapping[str, Any], first: Mapping[str, Any], where: Path) -> None:
    """Check that the second transformer has the settings of the first."""
    for name in sorted((first.keys() | second.keys()) - set(WITHOUT_EFFECT)):
        if first.get(name) != second.get(name):
            raise ModelError(
                f"{where}: {name} is {second.get(name)!r:.60}, but {first.get(name)!r:.60} in the "
                "first transformer; both must be of one size"
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
    norm, known = config.get("norm_type"), [a.folder for a in architectures.values()]
    classes = dict.fromkeys(f.transformer for f in known if f is not None)
    raise ModelError(
        f"{folder / CONFIG} is of a {config.get('_class_name')}"
        f"{'' if norm is None else f' with norm_type {norm!r:.60}'}; this version exports "
        f"{', '.join(classes)}; check `model` and the folder"
    )


def _class_names(index: Mapping[str, Any], spec: ModelSpec, where: Path) -> tuple[str, ...]:
    names = index.get("id2label")
    if names is None:
        return ()
    ids = {str(i) for i in range(spec.choices)}
    if (
        not isinstance(names, dict)
        or not all(isinstance(name, str) for name in names.values())
        or names.keys() != ids
    ):
        count = len(names) if isinstance(names, dict) else 0
        raise ModelError(
            f"{where}: id2label must name each of the model's {spec.choices} classes by its "
            f"number, it has {count} entries"
        )
    return tuple(names[str(i)] for i in range(spec.choices))
