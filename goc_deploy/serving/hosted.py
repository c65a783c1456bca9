"""The engine directories of a service: loaded once, with all their plans on one set of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from goc_deploy.api.engines import loaded_plans
from goc_deploy.engine_dir.directory import EngineDir
from goc_deploy.engine_dir.fingerprint import fingerprint
from goc_deploy.engines.choice import BackendOptions
from goc_deploy.errors import UsageError
from goc_deploy.options import ServeOptions
from goc_deploy.runtime.pipeline import Pipeline
from goc_deploy.serving.requests import HostedModel, ServiceLimits


@dataclass(frozen=True, slots=True, eq=False)
class HostedPlan:
    """A loaded plan.

    Attributes:
        model: name of the model in the service.
        name: name of the plan.
        pipeline: the plan on its engines.
        batch_images: images of the requests that run together.
    """

    model: str
    name: str
    pipeline: Pipeline
    batch_images: int


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A loaded engine directory.

    Attributes:
        directory: the engine directory.
        plans: its loaded plans by name.
        fingerprint: that of all files, see `goc_deploy.engine_dir.fingerprint`.
        load_seconds: the time that loading took.
    """

    directory: EngineDir
    plans: Mapping[str, HostedPlan]
    fingerprint: str
    load_seconds: float

    @property
    def takes(self) -> str:
        """What its images are drawn from: ``prompt`` or ``class``."""
        return "prompt" if self.directory.manifest.text_encoders else "class"

    def plan(self, name: str | None) -> HostedPlan:
        """Return the plan of a name or SPEC; None is the first plan that caches.

        Raises:
            UsageError: the service has no such plan.
        """
        if name is not None and name in self.plans:
            return self.plans[name]
        try:
            entry = self.directory.plan_entry(name)
        except UsageError:
            entry = None
        if entry is not None and entry.name in self.plans:
            return self.plans[entry.name]
        if name is None:
            return next(iter(self.plans.values()))
        raise UsageError(f"there is no plan {name!r:.60}; this model has {', '.join(self.plans)}")

    def describe(self) -> dict[str, Any]:
        """Describe fingerprint, backend and plans, in JSON types."""
        any_plan = next(iter(self.plans.values())).pipeline
        return {
            "fingerprint": self.fingerprint,
            "plans": list(self.plans),
            "batch_size": any_plan.batch_size,
            **any_plan.backend_description,
        }


def hosted_models(options: ServeOptions) -> dict[str, HostedModel]:
    """Return the models by the names of their directories.

    Raises:
        UsageError: two directories have the same name.
    """
    models: dict[str, HostedModel] = {}
    for path in map(Path, options.engine_dirs):
        name = path.absolute().name
        if name in models:
            raise UsageError(f"two engine directories are named {name}; rename one")
        models[name] = HostedModel(
            path,
            options.plans,
            backend=options.backend,
            device=options.device,
            threads=options.threads,
        )
    return models


def loaded_model(name: str, model: HostedModel, limits: ServiceLimits) -> LoadedModel:
    """Load an engine directory.

    Raises:
        GocError: as `goc_deploy.load_plans`.
    """
    started = perf_counter()
    directory = EngineDir.open(Path(model.engine_dir))
    names = list(model.plans) or [entry.name for entry in directory.manifest.plans]
    if not names:
        names = [directory.plan_entry(None).name]  # It raises an error: there are no plans.
    options = BackendOptions(threads=model.threads, graphs=model.cuda_graphs, device=model.device)
    pipelines = loaded_plans(
        directory,
        names,
        model.backend,
        options,
        batch_size=model.batch_size,
        max_sessions=limits.workers,
    )
    most = limits.batch_images
    plans = {
        pipeline.plan.name: HostedPlan(
            name,
            pipeline.plan.name,
            pipeline,
            pipeline.batch_size if most is None else min(most, pipeline.batch_size),
        )
        for pipeline in pipelines
    }
    digest = fingerprint(directory.manifest.files)
    return LoadedModel(directory, plans, digest, perf_counter() - started)
