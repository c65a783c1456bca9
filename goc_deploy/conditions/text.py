"""Prompts to captions, with the text encoder units."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from html import unescape
from itertools import islice
from pathlib import Path

import numpy as np

from goc_deploy.conditions.captions import Captions, PromptEmbeds
from goc_deploy.conditions.encoder_unit import EncoderShape, EncoderUnit
from goc_deploy.conditions.tokens import PromptTokens
from goc_deploy.errors import UsageError
from goc_deploy.protocols import Backend, Engine
from goc_deploy.spec import ClipSpec, ModelSpec, TextSpec
from goc_deploy.strict_json import bytes_from_file

KEPT_PROMPTS = 64
PROMPTS_AT_ONCE = 8  # limits the memory of a launch
MAX_CHARACTERS = 100_000

# Embeddings (L, C), mask (L,) and pooled embedding (P,), float32.
_Encoded = tuple[np.ndarray, np.ndarray, np.ndarray]

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
        engines: engines by name, with those of the text encoder units; or a function that loads
            them whenever prompts must be encoded, after which they are freed.
        tokenizers: content of the ``tokenizer.json`` of each unit.
        backend: owner of the buffers.
        spec: the model.
        encoders: the text encoders by the names of their units.
        most: number of captions that the units take at once.

    Raises:
        EnvironmentUnsupportedError: the package tokenizers is not installed.
        EngineDirError: the content of a tokenizer is not a tokenizer.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine] | Callable[[], Mapping[str, Engine]],
        tokenizers: Mapping[str, bytes],
        backend: Backend,
        spec: ModelSpec,
        encoders: Mapping[str, TextSpec | ClipSpec],
        most: int,
    ) -> None:
        self._spec, self._most, self._stream = spec, min(most, PROMPTS_AT_ONCE), backend.stream()
        self._text = next((of for of in encoders.values() if isinstance(of, TextSpec)), None)
        self._clips = [of for of in encoders.values() if isinstance(of, ClipSpec)]
        self._backend, self._encoders, self._tokens = backend, encoders, dict[str, PromptTokens]()
        for name, encoder in encoders.items():
            reader = name if isinstance(encoder, ClipSpec) else "the model"
            length = self._shape(encoder).tokens
            self._tokens[name] = PromptTokens(tokenizers[name], encoder, length, reader)
        self._load = engines if callable(engines) else None
        self._units = () if callable(engines) else self._bound(engines)
        self._known: OrderedDict[str, _Encoded] = OrderedDict()

    def _bound(self, engines: Mapping[str, Engine]) -> tuple[EncoderUnit, ...]:
        """The units on buffers of their own."""
        return tuple(
            EncoderUnit(
                engines[name],
                encoder,
                self._tokens[name],
                self._shape(encoder),
                self._backend,
                self._stream,
                self._most,
            )
            for name, encoder in self._encoders.items()
        )

    def _shape(self, encoder: TextSpec | ClipSpec) -> EncoderShape:
        """The sizes of a unit."""
        if isinstance(encoder, ClipSpec):
            outputs: dict[str, tuple[int, ...]] = {"pooled": (encoder.pooled,)}
            if encoder.width:
                outputs["embeds"] = (encoder.tokens, encoder.width)
            return EncoderShape(encoder.tokens, outputs)
        tokens = self._spec.caption_tokens - clip_tokens(self._clips)
        embeds = (tokens, self._spec.caption_channels)
        return EncoderShape(tokens, {"embeds": embeds}, reads_padding=bool(self._clips))

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
        texts = [self._normalised(prompt) for prompt in (*prompts, *negatives)]
        with self._stream.held():  # this also protects the buffers and the kept results
            encoded = self._encoded(texts, log_prompts=log_prompts)
        return PromptEmbeds(_captions(encoded[: len(prompts)]), _captions(encoded[len(prompts) :]))

    def _encoded(self, texts: Sequence[str], *, log_prompts: bool) -> list[_Encoded]:
        encoded = {text: self._known[text] for text in texts if text in self._known}
        unknown = iter(dict.fromkeys(text for text in texts if text not in encoded))
        units = self._units
        while together := list(islice(unknown, self._most)):
            if not units and self._load is not None:
                units = self._bound(self._load())
            results = self._run_units(units, together, log_prompts=log_prompts)
            encoded.update(zip(together, results, strict=True))
        for text in texts:
            self._known[text] = encoded[text]
            self._known.move_to_end(text)
        while len(self._known) > KEPT_PROMPTS:
            self._known.popitem(last=False)
        return [encoded[text] for text in texts]

    def _run_units(
        self, units: Sequence[EncoderUnit], texts: Sequence[str], *, log_prompts: bool
    ) -> list[_Encoded]:
        """Encode at most ``_most`` prompts."""
        count, spec = len(texts), self._spec
        embeds = np.zeros((count, spec.caption_tokens, spec.caption_channels), np.float32)
        mask, pooled = np.ones((count, spec.caption_tokens), np.float32), [np.zeros((count, 0))]
        first_channel = 0
        for unit in units:
            tokens = [unit.tokens.of(text, log_prompts=log_prompts) for text in texts]
            outputs, text_mask = unit.run(tokens)
            if "pooled" in outputs:
                pooled.append(outputs["pooled"])
                part = outputs.get("embeds")
                if part is not None:
                    stop = first_channel + part.shape[2]
                    embeds[:, : part.shape[1], first_channel:stop] = part
                    first_channel = stop
            else:
                embeds[:, clip_tokens(self._clips) :] = outputs["embeds"]
                mask = mask if self._clips else text_mask
        joined = np.concatenate(pooled, axis=1).astype(np.float32)
        # Copies, because kept results are dropped one by one.
        return [(embeds[i].copy(), mask[i].copy(), joined[i].copy()) for i in range(count)]

    def _normalised(self, prompt: str) -> str:
        """Clean a prompt in the same way as the reference pipeline."""
        _check_prompt(prompt)
        if self._clips or self._text is None:
            return prompt
        return cleaned(prompt, lower_case=self._text.lower_case)


def clip_tokens(clips: Sequence[ClipSpec]) -> int:
    """The number of tokens of a caption that are made by CLIP."""
    return max((clip.tokens for clip in clips if clip.width), default=0)


def _check_prompt(prompt: str) -> None:
    if not isinstance(prompt, str) or len(prompt) > MAX_CHARACTERS:
        raise UsageError(
            f"a prompt must be a text of at most {MAX_CHARACTERS} characters, got {prompt!r:.60}"
        )
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UsageError(
            f"a prompt holds half a surrogate pair, which is no character: {prompt!a:.60}"
        )


def cleaned(prompt: str, *, lower_case: bool) -> str:
    """The prompt as the tokenizer reads it: in lower case, or without HTML entities and spaces."""
    if lower_case:
        return prompt.lower().strip()
    return " ".join(unescape(unescape(prompt)).split())


def _captions(encoded: Sequence[_Encoded]) -> Captions:
    embeds, masks, pooled = zip(*encoded, strict=True)
    return Captions(np.stack(embeds), np.stack(masks), np.stack(pooled))
