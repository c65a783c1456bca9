"""Tiny random CLIP text encoders and their tokenizers, as pipelines of diffusers have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from goc_deploy.exporters.companions.clip_tokenizer import END, START

MERGES = ("t h", "th e</w>", "r e", "re d</w>", "a </w>", "c a", "ca t</w>")


def vocabulary() -> dict[str, int]:
    """Every byte, alone and at the end of a word, merged parts, and the special tokens last."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    letters = [chr(byte if byte in kept else next(others)) for byte in range(256)]
    letters.sort(key=lambda letter: (ord(letter) > 255, ord(letter)))  # "!" is token 0
    merged = [merge.replace(" ", "") for merge in MERGES if merge != "a </w>"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *merged, START, END]
    return {token: number for number, token in enumerate(tokens)}


def save_tokenizer(folder: Path, *, pad: str = END) -> Path:
    """The files of a tokenizer, as the pipelines on the Hub have them."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(numbers, ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(merge for merge in MERGES if merge != "a </w>")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
    added = {
        str(numbers[token]): {"content": token, "normalized": token == START, **flags}
        for token in {START, END, pad}
    }
    named = {
        token: {"__type": "AddedToken", **added[str(numbers[token])]} for token in (START, END)
    }
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": named[START],
        "eos_token": named[END],
        "unk_token": named[END],
        "pad_token": pad,
        "added_tokens_decoder": added,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def clip(kind: str, **changes: Any) -> Any:
    """A text encoder of transformers, ``CLIPTextModel`` or ``CLIPTextModelWithProjection``.

    The test is skipped without transformers.
    """
    transformers = pytest.importorskip(
        "transformers", reason="transformers comes with the judges extra"
    )
    config = transformers.CLIPTextConfig(
        **{
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_attention_heads": 3,
            "num_hidden_layers": 3,
            "vocab_size": 600,
            "projection_dim": 10,
            "bos_token_id": vocabulary()[START],
            "eos_token_id": 2,
            **changes,
        }
    )
    return getattr(transformers, kind)(config).eval()
