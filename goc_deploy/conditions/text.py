"""Prompts to captions, with the ``tokenizers`` library and the text encoder unit."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from html import unescape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from goc_deploy.conditions.captions import Captions, PromptEmbeds
from goc_deploy.errors import EngineDirError, EnvironmentUnsupportedError, UsageError
from goc_deploy.protocols import Backend, Engine, Run
from goc_deploy.spec import ModelSpec, TextSpec
from goc_deploy.strict_json import bytes_from_file

logger = logging.getLogger(__name__)

KEPT_PROMPTS = 64
PROMPTS_AT_ONCE = 8  # limits the memory of a launch
SHOWN_CHARACTERS = 60
MAX_CHARACTERS = 100_000
NO_TOKENIZERS = (
    "prompts need the package tokenizers, which is not installed; run: "
    "pip install 'goc_deploy[text]', or give prompt embeddings"
)

_Encoded = tuple[np.ndarray, np.ndarray]  # embeddings (L, C) and mask (L,), float32

# Captions for calibration, goc-bench and goc-eval if the user has no others.
DEFAULT_PROMPTS = (
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
    """Read one prompt per line; empty lines are skipped.

    Raises:
        UsageError: the file is unreadable, is not UTF-8, or has no prompts.
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
    """Encodes prompts, several at a time, on its own stream; it keeps recent results.

    Instances are safe to use from several threads.

    Args:
        engine: engine of unit ``text_encoder``.
        backend: owner of the buffers.
        tokenizer: content of a ``tokenizer.json``.
        spec: the model.
        text: special tokens.
        most: number of captions that the unit takes at once.

    Raises:
        EnvironmentUnsupportedError: the package tokenizers is not installed.
        EngineDirError: the tokenizer's content is not a tokenizer.
    """

    def __init__(
        self,
        engine: Engine,
        backend: Backend,
        tokenizer: bytes,
        spec: ModelSpec,
        text: TextSpec,
        most: int,
    ) -> None:
        self._engine, self._spec, self._text = engine, spec, text
        self._tokenizer = _tokenizer_from_json(tokenizer)
        self._most, length = min(most, PROMPTS_AT_ONCE), spec.caption_tokens
        self._stream = backend.stream()
        self._tokens = backend.allocate((self._most, length), "int64")
        self._mask = backend.allocate((self._most, length), "float32")
        self._embeds = backend.allocate((self._most, length, spec.caption_channels), "float32")
        self._bound: dict[int, Run] = {}  # number of prompts -> launch
        self._known: OrderedDict[str, _Encoded] = OrderedDict()
        self._bind(1)

    def prompt_embeds(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str] = ("",),
        *,
        log_prompts: bool = True,
    ) -> PromptEmbeds:
        """Encode prompts and negative prompts; by default the negative prompt is empty.

        A prompt with more tokens than the model takes is cut. The log has the number of tokens, and
        the rest of the prompt if ``log_prompts`` is true.

        Raises:
            UsageError: there are no prompts, one is not a string, or the number of negatives is
                neither one nor that of the prompts.
        """
        if isinstance(prompts, str) or isinstance(negatives, str):  # a str is a sequence of str
            raise UsageError(
                "prompts and negative prompts are lists of texts, got one text; put it into a list"
            )
        if not prompts or len(negatives) not in (1, len(prompts)):
            raise UsageError(
                f"{len(prompts)} prompts and {len(negatives)} negative prompts; give one, or one "
                "for each"
            )
        texts = [
            _normalised(prompt, lower_case=self._text.lower_case)
            for prompt in (*prompts, *negatives)
        ]
        with self._stream.held():  # this also protects the buffers and the kept results
            encoded = self._encoded(texts, log_prompts=log_prompts)
        return PromptEmbeds(_captions(encoded[: len(prompts)]), _captions(encoded[len(prompts) :]))

    def _encoded(self, texts: Sequence[str], *, log_prompts: bool) -> list[_Encoded]:
        encoded = {text: self._known[text] for text in texts if text in self._known}
        unknown = iter(dict.fromkeys(text for text in texts if text not in encoded))
        while together := list(islice(unknown, self._most)):
            tokens = [self._tokens_of(text, log_prompts=log_prompts) for text in together]
            encoded.update(zip(together, self._run_encoder(tokens), strict=True))
        for text in texts:
            self._known[text] = encoded[text]
            self._known.move_to_end(text)
        while len(self._known) > KEPT_PROMPTS:
            self._known.popitem(last=False)
        return [encoded[text] for text in texts]

    def _tokens_of(self, text: str, *, log_prompts: bool) -> list[int]:
        most, eos = self._spec.caption_tokens, self._text.eos
        encoding = _of_tokenizer(lambda: self._tokenizer.encode(text))
        tokens = list(encoding.ids)
        if not tokens or tokens[-1] != eos:
            tokens.append(eos)
        if len(tokens) > most:
            rest = text[encoding.offsets[most - 1][0] :]
            shown = rest if len(rest) <= SHOWN_CHARACTERS else f"{rest[:SHOWN_CHARACTERS]}..."
            left_out = f"left out: {shown!r}" if log_prompts else "the rest is left out"
            logger.warning(
                "a prompt has %d tokens, the model takes %d; %s", len(tokens), most, left_out
            )
            tokens = [*tokens[: most - 1], eos]
        if max(tokens) >= self._text.vocabulary:
            raise EngineDirError(
                f"the tokenizer gives token {max(tokens)} but the text encoder knows "
                f"{self._text.vocabulary}; export again"
            )
        return tokens

    def _run_encoder(self, prompts: Sequence[Sequence[int]]) -> list[_Encoded]:
        """Encode the tokens of at most ``_most`` prompts."""
        count, length = len(prompts), self._spec.caption_tokens
        padded = np.full((count, length), self._text.pad)
        for row, tokens in zip(padded, prompts, strict=True):
            row[: len(tokens)] = tokens
        mask = (np.arange(length) < np.array([[len(tokens)] for tokens in prompts])).astype(
            np.float32
        )
        run = self._bind(count)
        self._stream.upload(padded, self._tokens.view(count, length))
        self._stream.upload(mask, self._mask.view(count, length))
        self._stream.wait()  # some backends run engines on a stream of their own
        run()
        embeds = self._stream.download(self._embeds.view(count, *self._embeds.shape[1:]))
        # Copies, because kept results are dropped one by one.
        return [(embeds[i].copy(), mask[i].copy()) for i in range(count)]

    def _bind(self, count: int) -> Run:
        if count not in self._bound:
            tokens, mask, embeds = (
                b.view(count, *b.shape[1:]) for b in (self._tokens, self._mask, self._embeds)
            )
            self._bound[count] = self._engine.bind(
                {"tokens": tokens, "mask": mask}, {"embeds": embeds}, self._stream
            )
        return self._bound[count]


def _normalised(prompt: str, *, lower_case: bool) -> str:
    """Clean a prompt in the same way as the reference pipeline."""
    if not isinstance(prompt, str) or len(prompt) > MAX_CHARACTERS:
        raise UsageError(
            f"a prompt must be a text of at most {MAX_CHARACTERS} characters, got {prompt!r:.60}"
        )
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UsageError(
            f"a prompt holds half a surrogate pair, which is no character: {prompt!a:.60}"
        )
    if lower_case:
        return prompt.lower().strip()
    return " ".join(unescape(unescape(prompt)).split())


def _captions(encoded: Sequence[_Encoded]) -> Captions:
    embeds, masks = zip(*encoded, strict=True)
    return Captions(np.stack(embeds), np.stack(masks), np.zeros((len(encoded), 0), np.float32))


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
