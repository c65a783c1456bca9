"""The library's jobs. The stages are wired together in this folder."""

from goc_deploy.api.facade import (
    add_plan,
    build_engines,
    check_engine_options,
    check_gpu,
    cpu_backend,
    export,
    export_with,
    load,
    load_plans,
    verify_engines,
)

__all__ = [
    "add_plan",
    "build_engines",
    "check_engine_options",
    "check_gpu",
    "cpu_backend",
    "export",
    "export_with",
    "load",
    "load_plans",
    "verify_engines",
]
