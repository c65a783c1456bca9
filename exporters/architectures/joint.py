"""The units of models with a stream of image tokens and one of text tokens (MMDiT).

A unit's inputs come by name, so the declaration of the unit and the inputs that it is given decide
what its graph computes: with ``cos`` and ``sin`` queries and keys of the image are turned, with
``text_cos`` and ``text_sin`` those of the text, and with ``bias`` tokens of the text are masked.
Every sequence is [text, image].

Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
ICML 2024, section 4 and figure 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from goc_deploy.blocks import IMAGE_FEATURE, TEXT_FEATURE, Feature, Unit
from goc_deploy.exporters.architectures.dit import add_gated, scaled_queries
from goc_deploy.exporters.architectures.dit_model import Mlp, modulate
from goc_deploy.exporters.architectures.wan import NORM_EPSILON, rms_norm, turned
from goc_deploy.modulation import SHIFT_AND_SCALE
from goc_deploy.spec import ModelSpec

STREAM_INPUTS = {"image": "x", "text": "text"}  # the input with the tokens of a stream
Inputs = Mapping[str, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention with scores in the model's precision and a softmax in float32.

    Args:
        q: (B, heads, Q, head width).
        k: (B, heads, K, head width).
        v: (B, heads, K, head width).
        bias: (B, 1, 1, K) float32, added to the scores.

    Returns:
        (B, Q, D).
    """
    scores = torch.matmul(scaled_queries(q), k.transpose(-1, -2)).float()  # (B, heads, Q, K)
    if bias is not None:
        scores = scores + bias
    weights = torch.softmax(scores, dim=-1).to(v.dtype)
    return torch.matmul(weights, v).transpose(1, 2).flatten(2)


def attend_in_pytorch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same tensor, computed with PyTorch's attention."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def joined_attention(
    image: Inputs, text: Inputs, how: Attend, bias: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Attention of both streams over both.

    Args:
        image: queries, keys and values of the image.
        text: those of the text; without queries, only the image attends.
        how: `attend` or `attend_in_pytorch`.
        bias: as in `attend`.

    Returns:
        The result of the text (B, L, D), or None, and that of the image (B, T, D).
    """
    k, v = (torch.cat([text[part], image[part]], dim=2) for part in "kv")
    if "q" not in text:
        return None, how(image["q"], k, v, bias)
    length = text["q"].shape[2]
    both = how(torch.cat([text["q"], image["q"]], dim=2), k, v, bias)
    return both[:, :length], both[:, length:]


def angles_of(inputs: Inputs, prefix: str = "") -> tuple[Tensor, ...]:
    """Cosines and sines of a stream, or nothing if its queries and keys are not turned."""
    return tuple(inputs[name] for name in (f"{prefix}cos", f"{prefix}sin") if name in inputs)


def mask_of(inputs: Inputs) -> Tensor | None:
    """The bias (B, 1, 1, L + T) float32 of the keys of both streams, or None without a mask."""
    if "bias" not in inputs:
        return None
    of_text = inputs["bias"].index_select(0, inputs["caption_rows"])  # (B, L)
    of_image = torch.zeros_like(inputs["x"][:, :, 0]).float()
    return torch.cat([of_text, of_image], dim=1)[:, None, None]


def add_features(unit: Unit, inputs: Inputs, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Add the features (B*n, D) of a unit to their streams: the outputs of `outputs_of`."""
    streams = {stream: inputs[name] for stream, name in STREAM_INPUTS.items() if name in inputs}
    for place, feature in zip(unit.features, features, strict=True):
        tokens = streams[place.stream]
        streams[place.stream] = add_gated(tokens, inputs[place.gate], feature.reshape(tokens.shape))
    return (*(streams[stream] for stream in changed_by(unit)), *features)


def changed_by(unit: Unit) -> tuple[str, ...]:
    """The streams that a unit changes, in order."""
    return tuple(dict.fromkeys(feature.stream for feature in unit.features))


def outputs_of(unit: Unit) -> tuple[str, ...]:
    """Names of the outputs of a unit's graph."""
    streams = (f"{STREAM_INPUTS[stream]}_out" for stream in changed_by(unit))
    return (*streams, *(feature.output for feature in unit.features))


class Heads(nn.Module):
    """Queries, keys and values of the tokens of a stream.

    Args:
        spec: sizes of the model.
        parts: ``qkv``, or ``kv`` if nothing reads the result of these tokens.
        bias: whether the layer has a bias.
        norms: whether queries and keys are normalised over a head.
        epsilon: that of the norms.
    """

    def __init__(
        self,
        spec: ModelSpec,
        parts: str = "qkv",
        *,
        bias: bool = True,
        norms: bool = True,
        epsilon: float = NORM_EPSILON,
    ) -> None:
        super().__init__()
        self.heads, self.parts, self.epsilon = spec.heads, parts, epsilon
        self.add_module(parts, nn.Linear(spec.hidden, len(parts) * spec.hidden, bias=bias))
        for part in parts[:-1] if norms else ():
            weight = nn.Parameter(torch.empty(spec.hidden // spec.heads))
            self.register_parameter(f"norm_{part}", weight)

    def forward(self, x: Tensor, angles: tuple[Tensor, ...] = ()) -> dict[str, Tensor]:
        """Tokens to (B, heads, T, head width), by the letters of ``parts``.

        Args:
            x: (B, T, D).
            angles: cos and sin (T, head width / 2) float32, or nothing.
        """
        batch, tokens, hidden = x.shape
        joined = self.get_submodule(self.parts)(x.reshape(-1, hidden))  # (B*T, parts * D)
        shape = (batch, tokens, self.heads, hidden // self.heads)
        split = dict(zip(self.parts, joined.chunk(len(self.parts), dim=-1), strict=True))
        return {
            part: self._placed(part, values.reshape(shape), angles)
            for part, values in split.items()
        }

    def _placed(self, part: str, values: Tensor, angles: tuple[Tensor, ...]) -> Tensor:
        """(B, T, heads, head width) to (B, heads, T, head width)."""
        weight = getattr(self, f"norm_{part}", None)
        if weight is not None:
            values = rms_norm(values, weight, self.epsilon)
        placed = values.transpose(1, 2)
        return turned(placed, *angles) if angles and part != "v" else placed


class JointUnit(nn.Module):
    """A unit whose graph has attention.

    Args:
        unit: its declaration.
        names: names of its inputs, in order.
    """

    def __init__(self, unit: Unit, names: Sequence[str]) -> None:
        super().__init__()
        self.unit, self.names = unit, tuple(names)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """The inputs, in the order of their names, to the outputs of `outputs_of`.

        The inputs are x (B, T, D), text (B, L, D), rows and gates (B, D); cos and sin
        (T, head width / 2), text_cos and text_sin (L, head width / 2) and bias (K, L) float32;
        caption_rows (B,) int64, the caption of each row.
        """
        return self._outputs(attend, given)

    def reference(self, *given: Tensor) -> tuple[Tensor, ...]:
        """The same tensors, computed with PyTorch's attention."""
        return self._outputs(attend_in_pytorch, given)

    def _outputs(self, how: Attend, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        inputs = dict(zip(self.names, given, strict=True))
        return add_features(self.unit, inputs, self.features(how, inputs))

    def features(self, how: Attend, inputs: Inputs) -> list[Tensor]:
        """The features (B*n, D), in the order of the declaration."""
        raise NotImplementedError


class AttnUnit(JointUnit):
    """The unit of an attention branch, with layers of its own for each stream.

    Args:
        spec: sizes of the model.
        unit: its declaration. It shows whether the image has a second attention, of its own tokens
            alone, and whether the text has queries.
        names: names of its inputs.
        bias: whether layers have biases.
        norms: whether queries and keys are normalised.
    """

    def __init__(
        self,
        spec: ModelSpec,
        unit: Unit,
        names: Sequence[str],
        *,
        bias: bool = True,
        norms: bool = True,
    ) -> None:
        super().__init__(unit, names)
        parts = "qkv" if TEXT_FEATURE in unit.features else "kv"
        self.image = Heads(spec, bias=bias, norms=norms)
        self.text = Heads(spec, parts, bias=bias, norms=norms)
        if "gate_2" in self.names:
            self.second = Heads(spec, bias=bias, norms=norms)
        for feature in unit.features:
            linear = nn.Linear(spec.hidden, spec.hidden, bias=bias)
            self.add_module(f"proj{feature.suffix}", linear)

    def features(self, how: Attend, inputs: Inputs) -> list[Tensor]:
        """See `JointUnit`."""
        image = self.image(modulated(inputs), angles_of(inputs))
        text = self.text(modulated(inputs, TEXT_FEATURE), angles_of(inputs, "text_"))
        of_text, of_image = joined_attention(image, text, how, mask_of(inputs))
        mixed = {"": of_image, "_text": of_text}
        if "gate_2" in inputs:
            second = self.second(modulated(inputs, Feature("image", "_2")))
            mixed["_2"] = how(second["q"], second["k"], second["v"], None)
        return [self._projected(feature.suffix, mixed) for feature in self.unit.features]

    def _projected(self, suffix: str, mixed: Mapping[str, Tensor | None]) -> Tensor:
        values, linear = mixed[suffix], self.get_submodule(f"proj{suffix}")
        assert values is not None
        projected: Tensor = linear(values.reshape(-1, values.shape[-1]))
        return projected


class MlpUnit(nn.Module):
    """The unit of an MLP branch, with layers of its own for each stream that it changes.

    Args:
        spec: sizes of the model.
        unit: its declaration.
        names: names of its inputs.
        make: makes an MLP of a width and an inner width.
    """

    def __init__(
        self,
        spec: ModelSpec,
        unit: Unit,
        names: Sequence[str],
        make: Callable[[int, int], nn.Module] = Mlp,
    ) -> None:
        super().__init__()
        self.unit, self.names = unit, tuple(names)
        for stream in changed_by(unit):
            self.add_module(stream, make(spec.hidden, spec.mlp_hidden))

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Tokens x (B, T, D) and text (B, L, D), rows and gates (B, D) to `outputs_of`."""
        inputs = dict(zip(self.names, given, strict=True))
        features = [
            self.get_submodule(feature.stream)(modulated(inputs, feature).flatten(0, 1))
            for feature in self.unit.features
        ]
        return add_features(self.unit, inputs, features)


def modulated(inputs: Inputs, feature: Feature = IMAGE_FEATURE) -> Tensor:
    """The tokens of a feature's stream (B, n, D), modulated by its rows."""
    shift, scale = (inputs[f"{name}{feature.suffix}"] for name in SHIFT_AND_SCALE)
    return modulate(inputs[STREAM_INPUTS[feature.stream]], shift, scale)
