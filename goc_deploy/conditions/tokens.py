"""Prompts to the tokens of a text encoder, with the ``tokenizers`` library."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from goc_deploy.errors import EngineDirError, EnvironmentUnsupportedError
from goc_deploy.spec import ClipSpec, TextSpec

logger = logging.getLogger(__name__)

SHOWN_CHARACTERS = 60
NO_TOKENIZERS = (
    "prompts need the package tokenizers, which is not installed; run: "
    "pip install 'goc_deploy[text]', or give prompt embeddings"
)


class PromptTokens:
    """The tokenizer of a text encoder.

    Args:
        tokenizer: content of a ``tokenizer.json``.
        encoder: special tokens.
        length: largest number of tokens of a prompt.
        reader: what reads the tokens, for the log.

    Raises:
        EnvironmentUnsupportedError: the package tokenizers is not installed.
        EngineDirError: the content is not a tokenizer.
    """

    def __init__(
        self, tokenizer: bytes, encoder: TextSpec | ClipSpec, length: int, reader: str
    ) -> None:
        self._tokenizer = _tokenizer_from_json(tokenizer)
        self._encoder, self._length, self._reader = encoder, length, reader

    def of(self, text: str, *, log_prompts: bool) -> list[int]:
        """The tokens of a prompt, with the token that ends it, cut to the largest number.

        Raises:
            EngineDirError: the tokenizer is damaged, or is not that of the encoder.
        """
        most, eos = self._length, self._encoder.eos
        encoding = _of_tokenizer(lambda: self._tokenizer.encode(text))
        tokens = list(encoding.ids)
        if not tokens or tokens[-1] != eos:
            tokens.append(eos)
        if len(tokens) > most:
            rest = text[encoding.offsets[most - 1][0] :]
            shown = rest if len(rest) <= SHOWN_CHARACTERS else f"{rest[:SHOWN_CHARACTERS]}..."
            left_out = f"left out: {shown!r}" if log_prompts else "the rest is left out"
            logger.warning(
                "a prompt has %d tokens, %s takes %d; %s", len(tokens), self._reader, most, left_out
            )
            tokens = [*tokens[: most - 1], eos]
        if max(tokens) >= self._encoder.vocabulary:
            raise EngineDirError(
                f"the tokenizer gives token {max(tokens)} but the text encoder knows "
                f"{self._encoder.vocabulary}; export again"
            )
        return tokens


def _tokenizer_from_json(content: bytes) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as cause:
        raise EnvironmentUnsupportedError(NO_TOKENIZERS) from cause
    tokenizer = _of_tokenizer(lambda: Tokenizer.from_str(content.decode()))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _of_tokenizer(call: Callable[[], Any]) -> Any:
    """Call the library; a damaged tokenizer raises any exception, and a panic is no Exception."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as cause:
        raise EngineDirError(f"the tokenizer cannot be used: {cause}; export again") from cause
