"""The modules of a Stable Diffusion 3 that become the graphs of its units."""

from __future__ import annotations

from torch import Tensor, nn

from goc_deploy.blocks import Unit
from goc_deploy.exporters.architectures.dit import MlpUnit, add_gated
from goc_deploy.exporters.architectures.dit_model import Mlp, modulate
from goc_deploy.exporters.architectures.joint import (
    Attend,
    Heads,
    attend,
    attend_in_pytorch,
    joined_attention,
)
from goc_deploy.spec import ModelSpec


def module_of(spec: ModelSpec, unit: Unit) -> nn.Module:
    """The module of a unit by its declaration."""
    if unit.branch == "attn":
        return AttnUnit(spec, unit)
    return JointMlpUnit(spec, unit) if "text" in unit.reads else MlpUnit(spec)


class AttnUnit(nn.Module):
    """The unit of an attention branch.

    Args:
        spec: sizes of the model.
        unit: its declaration, which shows whether the block is dual and whether it is the last.
    """

    def __init__(self, spec: ModelSpec, unit: Unit) -> None:
        super().__init__()
        self.names = (*unit.rows, *(feature.gate for feature in unit.features))
        self.image = Heads(spec)
        self.image_proj = nn.Linear(spec.hidden, spec.hidden)
        if "gate_2" in self.names:
            self.second = Heads(spec)
            self.second_proj = nn.Linear(spec.hidden, spec.hidden)
        changes_text = "gate_text" in self.names
        self.text = Heads(spec, "qkv" if changes_text else "kv")
        if changes_text:
            self.text_proj = nn.Linear(spec.hidden, spec.hidden)

    def forward(self, x: Tensor, text: Tensor, *modulation: Tensor) -> tuple[Tensor, ...]:
        """Both streams to the outputs of `outputs_of`.

        Args:
            x: (B, T, D).
            text: (B, L, D).
            modulation: the rows of the unit and its gates, (B, D) each.
        """
        return self._outputs(x, text, modulation, attend)

    def reference(self, x: Tensor, text: Tensor, *modulation: Tensor) -> tuple[Tensor, ...]:
        """The same tensors, computed with PyTorch's attention."""
        return self._outputs(x, text, modulation, attend_in_pytorch)

    def _outputs(
        self, x: Tensor, text: Tensor, modulation: tuple[Tensor, ...], how: Attend
    ) -> tuple[Tensor, ...]:
        rows = dict(zip(self.names, modulation, strict=True))
        hidden = x.shape[-1]
        image = self.image(modulate(x, rows["shift"], rows["scale"]))
        words = self.text(modulate(text, rows["shift_text"], rows["scale_text"]))
        of_text, of_image = joined_attention(image, words, how)
        feature = self.image_proj(of_image.reshape(-1, hidden))
        x_out = add_gated(x, rows["gate"], feature.reshape(x.shape))
        features = [feature]
        if "gate_2" in rows:
            second = self.second(modulate(x, rows["shift_2"], rows["scale_2"]))
            mixed = how(second["q"], second["k"], second["v"])
            features.append(self.second_proj(mixed.reshape(-1, hidden)))
            x_out = add_gated(x_out, rows["gate_2"], features[1].reshape(x.shape))
        if of_text is None:
            return x_out, *features
        features.append(self.text_proj(of_text.reshape(-1, hidden)))
        text_out = add_gated(text, rows["gate_text"], features[-1].reshape(text.shape))
        return x_out, text_out, *features


class JointMlpUnit(nn.Module):
    """The unit of an MLP branch that changes both streams."""

    def __init__(self, spec: ModelSpec, unit: Unit) -> None:
        super().__init__()
        self.names = (*unit.rows, *(feature.gate for feature in unit.features))
        self.image, self.text = (Mlp(spec.hidden, spec.mlp_hidden) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, *modulation: Tensor) -> tuple[Tensor, ...]:
        """Both streams to x_out, text_out, feature (B*T, D) and feature_text (B*L, D).

        Args:
            x: (B, T, D).
            text: (B, L, D).
            modulation: the rows of the unit and its gates, (B, D) each.
        """
        rows, hidden = dict(zip(self.names, modulation, strict=True)), x.shape[-1]
        of_image = modulate(x, rows["shift"], rows["scale"])
        of_text = modulate(text, rows["shift_text"], rows["scale_text"])
        feature = self.image(of_image.reshape(-1, hidden))
        feature_text = self.text(of_text.reshape(-1, hidden))
        x_out = add_gated(x, rows["gate"], feature.reshape(x.shape))
        text_out = add_gated(text, rows["gate_text"], feature_text.reshape(text.shape))
        return x_out, text_out, feature, feature_text


def outputs_of(unit: Unit) -> tuple[str, ...]:
    """Names of the outputs of a unit's graph."""
    changed = dict.fromkeys(feature.stream for feature in unit.features)
    streams = {"image": "x_out", "text": "text_out"}
    return (*(streams[stream] for stream in changed), *(f.output for f in unit.features))
