"""Deploy Diffusion Transformers with feature caching.

>>> import goc_deploy
>>> goc_deploy.export("model.pt", "engine_dir", num_heads=4)             # doctest: +SKIP
>>> with goc_deploy.load("engine_dir") as pipe:                          # doctest: +SKIP
...     images = pipe.generate(labels=[2, 0, 7]).images
"""

from goc_deploy import errors
from goc_deploy.api.facade import add_plan, export, load, load_plans
from goc_deploy.cancellation import CancelToken
from goc_deploy.compiler import Plan
from goc_deploy.compiler import compile_schedule as compile
from goc_deploy.errors import GocError
from goc_deploy.policies.registration import register_correction, register_policy
from goc_deploy.schedule import Schedule
from goc_deploy.spec import ModelSpec
from goc_deploy.version import __version__

__all__ = [
    "CancelToken",
    "GocError",
    "ModelSpec",
    "Plan",
    "Schedule",
    "__version__",
    "add_plan",
    "compile",
    "errors",
    "export",
    "load",
    "load_plans",
    "register_correction",
    "register_policy",
]
