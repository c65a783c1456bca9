"""What a person chooses from: the models of a service, their classes, and their plans."""

from __future__ import annotations

from typing import Any

from goc_deploy.compiler import Plan
from goc_deploy.display.plans import prediction_name
from goc_deploy.serving.hosted import LoadedModel
from goc_deploy.serving.service import Service

LETTERS = {"compute": "C", "reuse": "R"}  # any other action is P, a prediction


def model_cards(service: Service) -> list[dict[str, Any]]:
    """Describe each loaded model with its plans, in JSON types."""
    return [_model_card(name, model) for name, model in service.models.items()]


def _model_card(name: str, model: LoadedModel) -> dict[str, Any]:
    manifest = model.directory.manifest
    return {
        "id": name,
        "takes": model.takes,
        "classes": 0 if manifest.text_encoders else manifest.model.choices,
        "class_names": list(manifest.class_names),
        "side": manifest.image_size and min(manifest.image_size),
        "units": list(manifest.model.unit_names),
        "default_plan": model.plan(None).name,
        "plans": [plan_card(plan.pipeline.plan) for plan in model.plans.values()],
    }


def plan_card(plan: Plan) -> dict[str, Any]:
    """Describe a plan.

    ``actions`` has a text per step, with a letter per unit: C is computed, R is reused, P is
    predicted. With level ``residual`` one feature stands for all units of a step.
    """
    schedule = plan.schedule
    return {
        "id": plan.name,
        "policy": schedule.policy,
        "sampler": plan.sampler.sampler,
        "steps": plan.steps,
        "level": schedule.level,
        "prediction": prediction_name(schedule),
        "computed_units": schedule.computed,
        "all_units": schedule.steps * schedule.units,
        "actions": [
            "".join(LETTERS.get(schedule.action(step, unit), "P") for unit in range(schedule.units))
            for step in range(schedule.steps)
        ],
    }
