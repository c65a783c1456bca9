"""The page at ``/``: one HTML file, and the policy that lets its browser load nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files


def page() -> tuple[str, dict[str, str]]:
    """The page, and its headers.

    The Content-Security-Policy allows the script and the style of the file by their digests,
    pictures in data URLs, and requests to this server.
    """
    text = files("goc_deploy.serving").joinpath("page.html").read_text(encoding="utf-8")
    rules = (
        "default-src 'none'",
        f"script-src {_digest(text, 'script')}",
        f"style-src {_digest(text, 'style')}",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return text, {
        "Content-Security-Policy": "; ".join(rules),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def _digest(text: str, element: str) -> str:
    """The source expression of the only element of that name, as the policy writes it."""
    (content,) = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
