"""Mutants of files: of their bytes, and of the content in their format.

The latter get past the parser.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

from goc_deploy.engine_dir.graph_check import OPERATORS
from goc_deploy.engine_dir.onnx_messages import model_from_bytes

Mutation = Callable[[bytes, random.Random], bytes]

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
NUMBERS = (0, 1, -1, 2, 3, 2**16, 2**31, 2**40, -(2**63), 2**63 - 1)
FRACTIONS = (0.0, -1.0, 1e-30, 1e30, float("inf"), float("nan"))
WITHOUT_EFFECT = ("doc_string", "metadata_props", "producer_name", "producer_version")
RAW_SHARE = 0.2  # of the mutants that a format has, which are of its bytes


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
    if generator.random() < RAW_SHARE:
        return mutated_bytes(content, generator)
    return json.dumps(mutated_value(json.loads(content), generator)).encode()


def mutated_safetensors(content: bytes, generator: random.Random) -> bytes:
    """A mutant of a safetensors file, whose header mostly has the length that it says."""
    if generator.random() < RAW_SHARE:
        return mutated_bytes(content, generator)
    length = int.from_bytes(content[:8], "little")
    header = mutated_json(content[8 : 8 + length], generator)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def mutated_archive(content: bytes, generator: random.Random) -> bytes:
    """A mutant of a zip archive, such as ``.npz`` and torch's files.

    One member is mutated, and the checksums fit.
    """
    if generator.random() < RAW_SHARE:
        return mutated_bytes(content, generator)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info: archive.read(info) for info in archive.infolist()}
    changed = generator.choice(list(members))
    members[changed] = mutated_bytes(members[changed], generator)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for info, member in members.items():
            archive.writestr(info.filename, member, info.compress_type)
    return written.getvalue()


def mutated_onnx(content: bytes, generator: random.Random) -> bytes:
    """A mutant of an ONNX file, which is mostly still a graph."""
    if generator.random() < RAW_SHARE:
        return mutated_bytes(content, generator)
    model = model_from_bytes(content)
    names = [name for node in model.graph.node for name in (*node.input, *node.output)]
    for _ in range(generator.choice((1, 1, 2, 4))):
        _mutate(model, names, generator)
    return bytes(model.SerializeToString())


def _mutate(message: Any, names: Sequence[str], generator: random.Random) -> None:
    """Change, remove, double or swap one field of a message, at any depth."""
    fields = [pair for pair in message.ListFields() if pair[0].name not in WITHOUT_EFFECT]
    if not fields:
        return
    field, value = generator.choice(fields)
    if not isinstance(value, str | bytes) and hasattr(value, "__len__"):
        at, other = generator.randrange(len(value)), generator.randrange(len(value))
        kind = generator.random()
        if kind < 0.1:
            del value[at]
        elif field.message_type is not None:
            if kind < 0.2:
                value.add().CopyFrom(value[at])
            elif kind < 0.3:
                value[at].CopyFrom(value[other])
            else:
                _mutate(value[at], names, generator)
        elif kind < 0.2:
            value.append(value[at])
        elif kind < 0.3:
            value[at], value[other] = value[other], value[at]
        else:
            value[at] = _other(field.name, value[at], names, generator)
    elif field.message_type is not None:
        _mutate(value, names, generator)
    else:
        setattr(message, field.name, _other(field.name, value, names, generator))


def _other(field: str, value: Any, names: Sequence[str], generator: random.Random) -> Any:
    """Another value of the same type."""
    if isinstance(value, str):
        words = sorted(OPERATORS) if field == "op_type" else names
        return generator.choice(words) if generator.random() < 0.9 else generator.choice(("", "x"))
    if isinstance(value, bytes):
        return mutated_bytes(value, generator)
    if isinstance(value, float):
        return generator.choice((*FRACTIONS, 2 * value))
    near = (value + 1, value - 1, 2 * value)
    found = generator.choice((*near, *near, *NUMBERS))
    return found if -(2**63) <= found < 2**63 else 0


def mutated_text(content: bytes, generator: random.Random) -> bytes:
    """A mutant of a text: characters left out, doubled, or taken from elsewhere in it."""
    text = content.decode()
    for _ in range(generator.choice((1, 1, 2, 4))):
        start = generator.randrange(len(text) + 1)
        stop = min(len(text), start + generator.choice((1, 1, 3)))
        odd = ("", "9" * 30, "-1", "nan", "1e999", ",", "+", ":", "@", "\0", "\u0663", text[stop:])
        piece = generator.choice((*odd, text[start:stop] * 2))
        text = text[:start] + piece + text[stop:]
    return text.encode()
