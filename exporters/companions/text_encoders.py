"""The text encoders of a model: a T5, or those of a whole pipeline, with one or two CLIPs."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from goc_deploy.conditions.text import TextEncoder, clip_tokens
from goc_deploy.engine_dir.manifest import Manifest
from goc_deploy.errors import ModelError
from goc_deploy.exporters.checkpoint import Checkpoint
from goc_deploy.exporters.companions.clip import ClipFiles, clip_kind, is_clip, read_clip
from goc_deploy.exporters.companions.t5 import (
    PRECISION,
    TextEncoderFiles,
    read_text_encoder,
    text_encoder_kind,
)
from goc_deploy.exporters.folders import CONFIG, PIPELINE_CONFIG, read_json
from goc_deploy.exporters.unit_files import UnitWriter
from goc_deploy.spec import TEXT_ENCODER, ClipSpec, ModelSpec, TextSpec, clip_unit

PARTS = {
    TEXT_ENCODER: "tokenizer",
    "text_encoder_2": "tokenizer_2",
    "text_encoder_3": "tokenizer_3",
}


@dataclass(frozen=True)
class TextEncoders:
    """The text encoders that were read.

    Attributes:
        t5: the T5, or None; then the tokens of the caption that it would make are zeros.
        clips: the CLIPs, in the order in which their embeddings are joined.
    """

    t5: TextEncoderFiles | None
    clips: tuple[ClipFiles, ...] = ()

    @property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """The weights by the name of the unit."""
        clips = {clip_unit(i): clip.checkpoint for i, clip in enumerate(self.clips)}
        return clips if self.t5 is None else {TEXT_ENCODER: self.t5.checkpoint, **clips}

    @property
    def tokenizers(self) -> dict[str, bytes]:
        """The content of each ``tokenizer.json`` by the name of the unit."""
        clips = {clip_unit(i): clip.tokenizer.content for i, clip in enumerate(self.clips)}
        return clips if self.t5 is None else {**clips, TEXT_ENCODER: self.t5.tokenizer}

    @property
    def clip_specs(self) -> tuple[ClipSpec, ...]:
        """The inputs and outputs of the CLIPs."""
        return tuple(clip.spec(_tokenizer(clip_unit(i))) for i, clip in enumerate(self.clips))

    @property
    def t5_spec(self) -> TextSpec | None:
        """The inputs of the T5."""
        if self.t5 is None:
            return None
        config = self.t5.config
        lower_case = not config.biases_per_layer
        path = _tokenizer(TEXT_ENCODER)
        return TextSpec(path, config.vocabulary, config.eos, config.pad, lower_case)


def read_text_encoders(path: Path, spec: ModelSpec) -> TextEncoders:
    """Read the text encoders of a model.

    Args:
        path: folder of a pipeline. If the model reads no pooled embeddings, the folder of a T5 is
            enough.
        spec: the model that they are for.

    Raises:
        ModelError: a folder, setting or tokenizer is missing or not supported, or the widths of the
            embeddings are not those of the model.
        SafetyError: an index names files outside its folder, or a file asks to run code.
    """
    if not spec.pooled_channels:
        return TextEncoders(read_text_encoder(path, spec))
    if not os.path.isfile(path / PIPELINE_CONFIG):
        raise ModelError(
            f"{path} has no {PIPELINE_CONFIG}; the model reads the embeddings of several text "
            "encoders, so give the folder of its pipeline"
        )
    t5, clips = None, list[ClipFiles]()
    for part, tokenizer in PARTS.items():
        config = path / part / CONFIG
        if not os.path.isfile(config):
            continue  # Stable Diffusion 3 may lack its T5; other missing encoders fail below
        if is_clip(read_json(config)):
            clips.append(read_clip(path / part, path / tokenizer))
        elif t5 is None:
            t5 = read_text_encoder(path, spec, part)
        else:
            raise ModelError(f"{config}: the pipeline has a second text encoder that is no CLIP")
    encoders = TextEncoders(t5, tuple(clips))
    _check_sizes(encoders, spec, path)
    return encoders


def _check_sizes(encoders: TextEncoders, spec: ModelSpec, path: Path) -> None:
    """Check that captions of the encoders are those of the model.

    Raises:
        ModelError: they are not.
    """
    clips = encoders.clip_specs
    pooled, width = sum(clip.pooled for clip in clips), sum(clip.width for clip in clips)
    made = [f"{clip_unit(i)} {clip.pooled}" for i, clip in enumerate(clips)]
    if pooled != spec.pooled_channels:
        raise ModelError(
            f"{path}: the text encoders make pooled embeddings of width {pooled} "
            f"({', '.join(made) or 'there is no CLIP'}), but the model takes "
            f"{spec.pooled_channels}; give the encoders that it was trained with"
        )
    if width > spec.caption_channels or not _fits(clips, spec, has_t5=encoders.t5 is not None):
        raise ModelError(
            f"{path}: the CLIPs make {clip_tokens(clips)} tokens of width {width}, and there is "
            f"{'a' if encoders.t5 else 'no'} T5, but the model takes {spec.caption_tokens} tokens "
            f"of width {spec.caption_channels}; give the encoders that it was trained with"
        )


def _fits(clips: tuple[ClipSpec, ...], spec: ModelSpec, *, has_t5: bool) -> bool:
    """Whether there are encoders for the tokens of a caption."""
    tokens = clip_tokens(clips)
    return tokens < spec.caption_tokens if has_t5 else 0 < tokens <= spec.caption_tokens


def write_text_encoders(
    encoders: TextEncoders, manifest: Manifest, writer: UnitWriter
) -> tuple[Manifest, TextEncoder]:
    """Write the graphs and tokenizers of text encoders into the directory of the writer.

    Returns:
        The manifest with them, and a text encoder that runs them.
    """
    spec, clips, units = manifest.model, encoders.clip_specs, []
    kinds = {}
    if encoders.t5 is not None:
        length = spec.caption_tokens - clip_tokens(clips)
        kinds[TEXT_ENCODER] = text_encoder_kind(encoders.t5.config, spec, length)
    for i, clip in enumerate(encoders.clips):
        kinds[clip_unit(i)] = clip_kind(clip_unit(i), clip.config, spec)
    for name, kind in kinds.items():
        tensors = encoders.checkpoints[name].tensors
        units += writer.write((kind,), tensors, PRECISION, TEXT_ENCODER)
        (writer.stage / _tokenizer(name)).write_bytes(encoders.tokenizers[name])
    manifest = replace(
        manifest, graphs=(*manifest.graphs, *units), text=encoders.t5_spec, clip=clips
    )
    engines = {unit.name: writer.loaded(unit) for unit in units}
    return manifest, TextEncoder(
        engines,
        encoders.tokenizers,
        writer.backend,
        spec,
        manifest.text_encoders,
        2 * manifest.max_batch,
    )


def _tokenizer(unit: str) -> str:
    """The path of the tokenizer of a unit in an engine directory."""
    name = "tokenizer.json" if unit == TEXT_ENCODER else f"{unit}_tokenizer.json"
    return f"{TEXT_ENCODER}/{name}"
