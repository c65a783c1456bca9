"""The library's jobs. The stages are wired together in this folder.

`goc_deploy.api.run` and `goc_deploy.api.bench` need NumPy, which ``import goc_deploy`` does not
import, so they are imported by their own names.
"""

from goc_deploy.api.engines import build_engines, check_engine_options, cpu_backend, verify_engines
from goc_deploy.api.exporting import export_with
from goc_deploy.api.facade import add_plan, export, load, load_plans

__all__ = [
    "add_plan",
    "build_engines",
    "check_engine_options",
    "cpu_backend",
    "export",
    "export_with",
    "load",
    "load_plans",
    "verify_engines",
]
