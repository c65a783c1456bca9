"""Prompts to captions: tokens by the ``tokenizers`` library, embeddings by the text encoder unit, once per prompt."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from goc_deploy.captions import Captions, PromptEmbeds
from goc_deploy.errors import EngineDirError, EnvironmentUnsupportedError, UsageError
from goc_deploy.protocols import Backend, Engine
from goc_deploy.serde import bytes_from_file
from goc_deploy.spec import ModelSpec, TextSpec

logger = logging.getLogger(__name__)

KEPT_PROMPTS = 64
SHOWN_CHARACTERS = 60
MAX_CHARACTERS = 100_000
NO_TOKENIZERS = "prompts need the package tokenizers, which is not installed; run: pip install 'goc_deploy[text]', or use --prompt-embeds"


DEFAULT_PROMPTS = (  # what policies learn from, and goc-bench and goc-eval draw, where nobody gives captions
    "a red apple on a wooden table",
    "a photograph of a mountain lake at sunrise",
    "an old man reading a newspaper in a cafe",
    "a cat sleeping on a blue sofa",
    "a watercolor painting of a village by the sea",
    "a glass of water in front of a white wall",
    "two children playing football in a park",
    "a close-up of a yellow flower with a bee",
    "a city street at night after the rain",
    "a steam train crossing a stone bridge",
    "a bowl of noodles with vegetables, seen from above",
    "a pencil drawing of a horse",
    "an astronaut walking through a forest",
    "a castle on a hill under heavy clouds",
    "a portrait of a woman with curly hair",
    "a small robot carrying a stack of books",
)


def prompts_from_file(path: Path) -> tuple[str, ...]:
    """One prompt per line; empty lines are skipped.

    Raises:
        UsageError: unreadable, not UTF-8, or without prompts.
    """
    try:
        lines = bytes_from_file(path, f"prompts {path}", UsageError).decode("utf-8").splitlines()
    except UnicodeDecodeError as cause:
        raise UsageError(f"prompts {path} cannot be read: {cause}") from cause
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UsageError(f"{path} holds no prompts; write one per line")
    return prompts


class TextEncoder:
    """Encodes prompts and remembers the last ones. Thread-safe: one caller at a time.

    Args:
        engine: unit ``text_encoder``.
        backend: owns its buffers.
        tokenizer: content of a ``tokenizer.json``.
        spec: the model.
        text: special tokens.

    Raises:
        EnvironmentUnsupportedError: the package tokenizers is not installed.
        EngineDirError: the tokenizer is not one.
    """

    def __init__(self, engine: Engine, backend: Backend, tokenizer: bytes, spec: ModelSpec, text: TextSpec) -> None:
        self._backend, self._spec, self._text = backend, spec, text
        self._tokenizer = _tokenizer_from_json(tokenizer)
        length = spec.caption_tokens
        self._tokens = backend.allocate((1, length), "int64")
        self._mask = backend.allocate((1, length), "float32")
        self._embeds = backend.allocate((1, length, spec.caption_channels), "float32")
        self._run = engine.bind({"tokens": self._tokens, "mask": self._mask}, {"embeds": self._embeds})
        self._known: OrderedDict[str, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def prompt_embeds(self, prompts: Sequence[str], negatives: Sequence[str] = ("",)) -> PromptEmbeds:
        """Encode what to draw and what to draw away from; by default that is nothing in particular.

        A prompt that has more tokens than the model takes is cut, and the log says what is left out.

        Raises:
            UsageError: no prompts, one that is no text, or negatives that are neither one nor one for each.
        """
        if isinstance(prompts, str) or isinstance(negatives, str):  # which is a sequence of letters
            raise UsageError("prompts and negative prompts are lists of texts, got one text; put it into a list")
        if not prompts or len(negatives) not in (1, len(prompts)):
            raise UsageError(f"{len(prompts)} prompts and {len(negatives)} negative prompts; give one, or one for each")
        with self._lock:
            return PromptEmbeds(self._captions(prompts), self._captions(negatives))

    def _captions(self, prompts: Sequence[str]) -> Captions:
        found = [self._encoded(prompt) for prompt in prompts]
        return Captions(np.stack([embeds for embeds, _ in found]), np.stack([mask for _, mask in found]))

    def _encoded(self, prompt: str) -> tuple[np.ndarray, np.ndarray]:
        if not isinstance(prompt, str) or len(prompt) > MAX_CHARACTERS:
            raise UsageError(f"a prompt must be a text of at most {MAX_CHARACTERS} characters, got {prompt!r:.60}")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise UsageError(f"a prompt holds half a surrogate pair, which is no character: {prompt!a:.60}")
        text = prompt.lower().strip()  # as the reference pipeline does
        if text not in self._known:
            self._known[text] = self._run_encoder(self._tokens_of(text))
            if len(self._known) > KEPT_PROMPTS:
                self._known.popitem(last=False)
        self._known.move_to_end(text)
        return self._known[text]

    def _tokens_of(self, text: str) -> list[int]:
        encoding, most, eos = self._tokenizer.encode(text), self._spec.caption_tokens, self._text.eos
        tokens = list(encoding.ids)
        if not tokens or tokens[-1] != eos:
            tokens.append(eos)
        if len(tokens) > most:
            rest = text[encoding.offsets[most - 1][0] :]
            shown = rest if len(rest) <= SHOWN_CHARACTERS else f"{rest[:SHOWN_CHARACTERS]}..."
            logger.warning("a prompt has %d tokens, the model takes %d; left out: %r", len(tokens), most, shown)
            tokens = [*tokens[: most - 1], eos]
        if max(tokens) >= self._text.vocabulary:
            raise EngineDirError(
                f"the tokenizer gives token {max(tokens)} but the text encoder knows {self._text.vocabulary}; export again"
            )
        return tokens

    def _run_encoder(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        padded = np.full((1, self._spec.caption_tokens), self._text.pad)
        padded[0, : len(tokens)] = tokens
        mask = (np.arange(self._spec.caption_tokens) < len(tokens)).astype(np.float32)
        self._backend.upload(padded, self._tokens)
        self._backend.upload(mask[None], self._mask)
        self._run()
        return self._backend.download(self._embeds)[0], mask


def _tokenizer_from_json(content: bytes) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as cause:
        raise EnvironmentUnsupportedError(NO_TOKENIZERS) from cause
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as cause:  # what the library raises
        raise EngineDirError(f"the tokenizer cannot be read: {cause}; export again") from cause
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
