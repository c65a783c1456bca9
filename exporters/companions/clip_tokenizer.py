"""The tokenizer of a CLIP as one ``tokenizer.json``, copied, or made of ``vocab.json`` and merges.

Source: byte-level byte pair encoding of the CLIP repository of OpenAI, ``simple_tokenizer.py``. The
JSON format is documented by the library tokenizers of Hugging Face.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from goc_deploy.errors import ModelError
from goc_deploy.exporters.companions.tokenizer_files import MAX_BYTES, TOKENIZER, check_size
from goc_deploy.exporters.folders import read_json
from goc_deploy.strict_json import bytes_from_file

VOCABULARY, MERGES, SETTINGS_FILE = "vocab.json", "merges.txt", "tokenizer_config.json"
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


@dataclass(frozen=True)
class ClipTokenizer:
    """A tokenizer that was read.

    Attributes:
        content: content of a ``tokenizer.json``.
        eos: the token that ends a text.
        pad: the token that fills the places after it.
        highest: the highest token of the vocabulary.
        files: the files that were read.
    """

    content: bytes
    eos: int
    pad: int
    highest: int
    files: tuple[Path, ...]


def read_clip_tokenizer(folder: Path, vocabulary: int, tokens: int) -> ClipTokenizer:
    """Read the tokenizer of a CLIP text encoder.

    Args:
        folder: folder with ``tokenizer.json``, or with ``vocab.json`` and ``merges.txt``, and with
            ``tokenizer_config.json``.
        vocabulary: number of tokens of the encoder.
        tokens: number of tokens of a text with its padding.

    Raises:
        ModelError: a file is missing or damaged, or does not fit the encoder.
    """
    settings_file, whole = folder / SETTINGS_FILE, folder / TOKENIZER
    settings = read_json(settings_file) if settings_file.is_file() else {}
    length = settings.get("model_max_length", tokens)
    if length != tokens:
        raise ModelError(
            f"{settings_file}: model_max_length is {length!r:.60}, but the text encoder reads "
            f"{tokens} tokens; they do not belong together"
        )
    used = (whole,) if whole.is_file() else (folder / VOCABULARY, folder / MERGES)
    for path in used:
        if not path.is_file():
            raise ModelError(
                f"{folder} has neither {TOKENIZER} nor {VOCABULARY} and {MERGES}; download the "
                "tokenizer too"
            )
        if path.stat().st_size > MAX_BYTES:
            raise ModelError(
                f"{path} has more than {MAX_BYTES} bytes; give the tokenizer of a CLIP"
            )
    tokenizer = read_json(whole) if whole.is_file() else _from_merges(folder, settings)
    content = json.dumps(tokenizer, ensure_ascii=False).encode()
    check_size(content, vocabulary, used[0])
    numbers = _numbers(tokenizer, used[0])
    eos = _number(settings, "eos_token", END, numbers, folder)
    pad = _number(settings, "pad_token", END, numbers, folder)
    files = (*used, settings_file) if settings else used
    return ClipTokenizer(content, eos, pad, max(numbers.values()), files)


def _numbers(tokenizer: Mapping[str, Any], where: Path) -> dict[str, int]:
    """The number of each token, with those that were added to the vocabulary."""
    try:
        added = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or ()}
        numbers = {**tokenizer["model"]["vocab"], **added}
        if all(type(number) is int for number in numbers.values()):
            return numbers
    except (KeyError, TypeError):
        pass
    raise ModelError(f"{where} is not the tokenizer of a CLIP; give the one of the text encoder")


def _text(settings: Mapping[str, Any], name: str, default: str) -> str:
    """A special token, which is a text or an object with one."""
    token = settings.get(name, default)
    return str(token.get("content") if isinstance(token, dict) else token)


def _number(
    settings: Mapping[str, Any], name: str, default: str, numbers: Mapping[str, int], folder: Path
) -> int:
    token = _text(settings, name, default)
    if token not in numbers:
        raise ModelError(f"{folder}: {name} is {token!r:.60}, which is not in the vocabulary")
    return numbers[token]


def _from_merges(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``tokenizer.json`` of ``vocab.json`` and ``merges.txt``."""
    vocabulary = read_json(folder / VOCABULARY)
    where = str(folder / MERGES)
    try:
        lines = bytes_from_file(folder / MERGES, where, ModelError).decode().split("\n")
    except UnicodeDecodeError as cause:
        raise ModelError(f"{where} cannot be read: {cause}; download it again") from cause
    lines = [line for line in lines if line and not line.startswith("#version")]
    pairs = [line.split(" ") for line in lines]
    if not all(len(pair) == 2 for pair in pairs):
        raise ModelError(f"{where} must hold two parts of a word in each line; download it again")
    if not all(type(number) is int for number in vocabulary.values()):
        raise ModelError(f"{folder / VOCABULARY} must map tokens to numbers; download it again")
    start, end = (
        [_text(settings, name, token), _number(settings, name, token, vocabulary, folder)]
        for name, token in (("bos_token", START), ("eos_token", END))
    )
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    normalizers: list[dict[str, Any]] = [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Lowercase"},
    ]
    split = {
        "type": "Split",
        "pattern": {"Regex": WORDS},
        "behavior": "Removed",
        "invert": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(settings, vocabulary, folder),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {"type": "ByteLevel", **byte_level}],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": end,
            "cls": start,
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _text(settings, "unk_token", END),
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": pairs,
        },
    }


def _added_tokens(
    settings: Mapping[str, Any], vocabulary: Mapping[str, int], folder: Path
) -> list[dict[str, Any]]:
    """The special tokens, which are found in a prompt before it is split into words.

    A padding token is one of them: that of the larger CLIP of Stable Diffusion 3 is ``!``.
    """
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    decoder = settings.get("added_tokens_decoder", {})
    declared = {
        str(token["content"]): {flag: bool(token.get(flag, False)) for flag in flags}
        for token in (decoder.values() if isinstance(decoder, dict) else ())
        if isinstance(token, dict) and "content" in token
    }
    for name, default in (("bos_token", START), ("eos_token", END), ("pad_token", END)):
        declared.setdefault(_text(settings, name, default), dict.fromkeys(flags, False))
    missing = sorted(declared.keys() - vocabulary.keys())
    if missing:
        raise ModelError(f"{folder}: the special token {missing[0]!r:.60} is not in {VOCABULARY}")
    return sorted(
        (
            {"id": vocabulary[text], "content": text, **of_token, "special": True}
            for text, of_token in declared.items()
        ),
        key=lambda token: int(token["id"]),
    )
