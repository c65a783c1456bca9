"""Mutants of files: of their bytes, and of what their JSON says."""

from __future__ import annotations

import json
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**70,
    1.5,
    -0.0,
    1e308,
    "",
    "x",
    "../x",
    "\0",
    "\ud800",
    [],
    {},
    [[]],
)
WORDS = (
    b"\0" * 8,
    b"\xff" * 8,
    b"PK\x03\x04",
    b"\x93NUMPY",
    b"cos\nsystem\n",
    b"etc/passwd",
    b"{",
    b"1" * 40,
)


def mutated_bytes(content: bytes, generator: random.Random) -> bytes:
    """A few bytes changed, a piece cut out, doubled or put in."""
    found = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 8))):
        start = generator.randrange(len(found) + 1)
        stop = min(len(found), start + generator.choice((1, 1, 4, 100)))
        kind = generator.randrange(6)
        if kind == 0:
            del found[start:stop]
        elif kind == 1:
            found[start:start] = found[start:stop]
        elif kind == 2:
            found[start:stop] = generator.choice(WORDS)
        elif kind == 3 and generator.random() < 0.3:
            del found[start:]
        elif start < len(found):
            found[start] = (
                generator.randrange(256)
                if kind == 4
                else found[start] ^ (1 << generator.randrange(8))
            )
    return bytes(found)


def mutated_value(value: Any, generator: random.Random) -> Any:
    """JSON with one value, at any depth, changed, removed or doubled."""
    if not isinstance(value, dict | list) or not value or generator.random() < 0.1:
        if isinstance(value, int | float) and generator.random() < 0.5:
            return generator.choice((value + 1, value - 1, -value, value * 1000, str(value)))
        return generator.choice(ODD)
    changed: Any = value.copy()
    key = generator.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if generator.random() < 0.1:
        del changed[key]
    elif isinstance(value, list) and generator.random() < 0.1:
        changed.append(value[key])
    else:
        changed[key] = mutated_value(value[key], generator)
    return changed


def mutated_json(content: bytes, generator: random.Random) -> bytes:
    """A mutant of a JSON file, which is mostly still JSON."""
    if generator.random() < 0.2:
        return mutated_bytes(content, generator)
    return json.dumps(mutated_value(json.loads(content), generator)).encode()
