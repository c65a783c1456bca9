from __future__ import annotations

from tests.torch_registry import keep_registry

keep_registry()
