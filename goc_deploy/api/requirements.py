"""Packages that a job needs beyond those of every installation."""

from __future__ import annotations

from importlib.util import find_spec

from goc_deploy.errors import EnvironmentUnsupportedError


def require(extra: str | None, *modules: str) -> None:
    """Check that modules can be imported.

    Args:
        extra: the extra of this package that brings them; None if the package itself does.
        *modules: names of modules.

    Raises:
        EnvironmentUnsupportedError: one is missing; the message has the command that installs it.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        what = f"'goc_deploy[{extra}]'" if extra else "onnxruntime"
        raise EnvironmentUnsupportedError(
            f"this needs {', '.join(missing)}, which is not installed; run: pip install {what}"
        )
