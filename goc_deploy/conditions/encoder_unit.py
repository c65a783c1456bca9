"""A text encoder unit: the engine, its tokenizer, and buffers for several prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from goc_deploy.conditions.tokens import PromptTokens
from goc_deploy.protocols import Backend, Buffer, Engine, Run, Stream
from goc_deploy.spec import ClipSpec, TextSpec


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """The sizes of an encoder's tensors.

    Attributes:
        tokens: L, the number of tokens of a prompt.
        outputs: shape of each output for one prompt, by its name.
        reads_padding: whether a T5 reads the padding after a prompt like text.
    """

    tokens: int
    outputs: Mapping[str, tuple[int, ...]]
    reads_padding: bool = False


class EncoderUnit:
    """One text encoder of a model; runs up to ``most`` prompts at a time.

    Args:
        engine: engine of the unit.
        encoder: special tokens of a T5 or CLIP.
        tokens: the tokenizer.
        shape: sizes of the tensors.
        backend: owner of the buffers.
        stream: where the unit runs.
        most: number of prompts that the unit takes at once.
    """

    def __init__(
        self,
        engine: Engine,
        encoder: TextSpec | ClipSpec,
        tokens: PromptTokens,
        shape: EncoderShape,
        backend: Backend,
        stream: Stream,
        most: int,
    ) -> None:
        self._engine, self._encoder, self.tokens, self._stream = engine, encoder, tokens, stream
        self._shape = shape
        self._tokens = backend.allocate((most, shape.tokens), "int64")
        # Of a CLIP: one at the token that ends the text. Of a T5: one for every token that it sees.
        self._mask = backend.allocate((most, shape.tokens), "float32")
        self._mask_name = "end" if isinstance(encoder, ClipSpec) else "mask"
        self._outputs = {
            name: backend.allocate((most, *of_prompt), "float32")
            for name, of_prompt in shape.outputs.items()
        }
        self._bound: dict[int, Run] = {}  # number of prompts -> launch
        self._bind(1)

    def run(self, prompts: Sequence[Sequence[int]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Encode the tokens of prompts.

        Returns:
            The outputs by name, (K, ...) float32 each, and (K, L) float32: 1 for a token, 0 for
            padding.
        """
        count = len(prompts)
        padded = np.full((count, self._shape.tokens), self._encoder.pad)
        text = np.zeros((count, self._shape.tokens), np.float32)
        for row, tokens in enumerate(prompts):
            padded[row, : len(tokens)] = tokens
            text[row, : len(tokens)] = 1
        if isinstance(self._encoder, ClipSpec):
            ends = [tokens.index(self._encoder.eos) for tokens in prompts]
            mask = np.eye(self._shape.tokens, dtype=np.float32)[ends]
        else:
            mask = np.ones_like(text) if self._shape.reads_padding else text
        run = self._bind(count)
        self._stream.upload(padded, _rows(self._tokens, count))
        self._stream.upload(mask, _rows(self._mask, count))
        self._stream.wait()  # some backends run engines on a stream of their own
        run()
        outputs = {
            name: self._stream.download(_rows(buffer, count))
            for name, buffer in self._outputs.items()
        }
        return outputs, text

    def _bind(self, count: int) -> Run:
        if count not in self._bound:
            inputs = {"tokens": self._tokens, self._mask_name: self._mask}
            self._bound[count] = self._engine.bind(
                {name: _rows(buffer, count) for name, buffer in inputs.items()},
                {name: _rows(buffer, count) for name, buffer in self._outputs.items()},
                self._stream,
            )
        return self._bound[count]


def _rows(buffer: Buffer, count: int) -> Buffer:
    return buffer.view(count, *buffer.shape[1:])
