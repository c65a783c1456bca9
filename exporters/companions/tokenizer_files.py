"""Tokenizers as one ``tokenizer.json``, copied from a folder or made from a SentencePiece model.

Source of the SentencePiece format: ``sentencepiece_model.proto`` of google/sentencepiece. Fields
that are read: ModelProto.pieces 1, normalizer_spec 3; SentencePiece.piece 1, score 2, type 3;
NormalizerSpec.precompiled_charsmap 2. TrainerSpec is not read.

Source of the JSON format: the documentation of tokenizers by Hugging Face.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from goc_deploy.errors import ModelError
from goc_deploy.strict_json import parse_json

TOKENIZER, SENTENCEPIECE = "tokenizer.json", "spiece.model"
MAX_BYTES = 64 * 2**20
END, SPACE = "</s>", "\u2581"
UNKNOWN, CONTROL = 2, 3  # types of a piece


def read_tokenizer(folders: Sequence[Path], vocabulary: int) -> tuple[Path, bytes]:
    """Read the tokenizer of the first folder that has one.

    Args:
        folders: folders to search, in order.
        vocabulary: number of tokens of the encoder.

    Returns:
        The file that was read, and the content of a ``tokenizer.json``.

    Raises:
        ModelError: there is no tokenizer, it is damaged, or it has more tokens than the encoder.
    """
    for folder in folders:
        for name, read in ((TOKENIZER, _checked_json), (SENTENCEPIECE, json_from_sentencepiece)):
            path = folder / name
            if path.is_file():
                if path.stat().st_size > MAX_BYTES:
                    raise ModelError(
                        f"{path} has more than {MAX_BYTES} bytes; give a tokenizer of a text "
                        "encoder"
                    )
                content = read(path.read_bytes(), str(path))
                check_size(content, vocabulary, path)
                return path, content
    raise ModelError(
        f"there is no {TOKENIZER} or {SENTENCEPIECE} in {' or '.join(map(str, folders))}; download "
        "the tokenizer too"
    )


def _checked_json(content: bytes, where: str) -> bytes:
    parse_json(content, where, ModelError)
    return content


def check_size(content: bytes, vocabulary: int, path: Path) -> None:
    """Check that a ``tokenizer.json`` has a vocabulary that an encoder knows.

    Raises:
        ModelError: it has none, or more tokens than the encoder.
    """
    tokenizer = parse_json(content, str(path), ModelError)
    model = tokenizer.get("model")
    tokens = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(tokens, (list, dict)) or not 0 < len(tokens) <= vocabulary:
        count = len(tokens) if isinstance(tokens, (list, dict)) else "no"
        raise ModelError(
            f"{path} has {count} tokens but the text encoder knows {vocabulary}; they do not "
            "belong together"
        )


def json_from_sentencepiece(content: bytes, where: str) -> bytes:
    """Convert a SentencePiece unigram model to a ``tokenizer.json``.

    The tokenizer appends the end-of-text token of T5 to every text.

    Raises:
        ModelError: the content is not such a model.
    """
    try:
        pieces, charsmap = _pieces(content)
        names = [piece for piece, _, _ in pieces]
        end = names.index(END)
        unknown = next(i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN)
    except (ValueError, IndexError, struct.error, StopIteration, UnicodeDecodeError) as cause:
        raise ModelError(
            f"{where} is not a sound SentencePiece model with {END!r}; download it again"
        ) from cause
    special = [i for i, (_, _, kind) in enumerate(pieces) if kind in (UNKNOWN, CONTROL)]
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    steps: list[dict[str, Any]] = [
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE},
    ]
    if charsmap:
        encoded = base64.b64encode(charsmap).decode()
        steps.insert(0, {"type": "Precompiled", "precompiled_charsmap": encoded})
    spaces = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
    text, last = (
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": END, "type_id": 0}},
    )
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": names[i], **flags} for i in special],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": spaces,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [text, last],
            "pair": [text, last, {"Sequence": {"id": "B", "type_id": 0}}, last],
            "special_tokens": {END: {"id": END, "ids": [end], "tokens": [END]}},
        },
        "decoder": spaces,
        "model": {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [[piece, score] for piece, score, _ in pieces],
            "byte_fallback": False,
        },
    }
    return json.dumps(tokenizer, ensure_ascii=False).encode()


def _pieces(content: bytes) -> tuple[list[tuple[str, float, int]], bytes]:
    """Piece, score and type of every token, and the compiled character map."""
    pieces, charsmap = [], b""
    for field, value in _fields(content):
        if field == 1 and isinstance(value, bytes):
            entry = dict(_fields(value))
            name, score = entry.get(1, b""), entry.get(2, b"\0" * 4)
            if not isinstance(name, bytes) or not isinstance(score, bytes) or len(score) != 4:
                raise ValueError("a piece has no text or no score")
            kind = entry.get(3, 1)
            pieces.append(
                (
                    name.decode(),
                    struct.unpack("<f", score)[0],
                    int(kind) if isinstance(kind, int) else 1,
                )
            )
        elif field == 3 and isinstance(value, bytes):
            compiled = dict(_fields(value)).get(2, b"")
            charsmap = compiled if isinstance(compiled, bytes) else b""
    return pieces, charsmap


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Fields of a protocol buffer message: number and value; values of fixed size are bytes.

    Raises:
        ValueError, IndexError: the message is damaged.
    """
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(content, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(content, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(content):
            raise ValueError("a field ends behind the file")
        yield tag >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number has more than 64 bits")
