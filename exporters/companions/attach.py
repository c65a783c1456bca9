"""Reading and writing the optional parts of an engine directory.

These are a text encoder, stored captions, and the decoder of a VAE.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from goc_deploy.conditions.captions import PromptEmbeds, prompt_embeds_from_arrays
from goc_deploy.conditions.stored_captions import captions_to_bytes
from goc_deploy.conditions.tensor_files import arrays_from_file
from goc_deploy.conditions.text import DEFAULT_PROMPTS, prompts_from_file
from goc_deploy.engine_dir.manifest import Manifest
from goc_deploy.errors import ModelError, UsageError
from goc_deploy.exporters.checkpoint import Checkpoint
from goc_deploy.exporters.companions.qwen_vae import QwenVae, read_qwen_vae_folder
from goc_deploy.exporters.companions.text_encoders import (
    TextEncoders,
    read_text_encoders,
    write_text_encoders,
)
from goc_deploy.exporters.companions.vae import (
    PRECISION,
    Vae,
    decoder_kind,
    decoder_spec,
    read_vae_folder,
)
from goc_deploy.exporters.companions.wan_vae import (
    WanVae,
    read_wan_vae_folder,
    video_decoder_kind,
    video_decoder_spec,
)
from goc_deploy.exporters.companions.wan_vae_config import QWEN_VAE_CLASS, WAN_VAE_CLASS
from goc_deploy.exporters.folders import CONFIG, part_of_pipeline, read_json
from goc_deploy.exporters.unit_files import UnitWriter
from goc_deploy.options import ExportOptions
from goc_deploy.spec import ModelSpec

CAPTIONS_FILE = "captions/captions.npz"


@dataclass(frozen=True)
class Companions:
    """The optional parts that were read.

    Attributes:
        vae: the VAE whose decoder is exported, or None.
        text: the text encoders, or None.
        captions: prompt embeddings to store, or None.
        prompts: texts that the text encoder encodes to stored captions; may be empty.
    """

    vae: Vae | QwenVae | WanVae | None
    text: TextEncoders | None
    captions: PromptEmbeds | None
    prompts: tuple[str, ...]

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The weights of the parts."""
        vae = () if self.vae is None else (self.vae.checkpoint,)
        text = () if self.text is None else tuple(self.text.checkpoints.values())
        return (*vae, *text)

    def scaled(self, spec: ModelSpec) -> tuple[ModelSpec, int]:
        """A model of videos with the scales of its VAE, and the pixels per latent pixel and side.

        A VAE of images decodes a video frame by frame.
        """
        if self.vae is None:
            return spec, spec.vae_scale
        pixels = self.vae.config.upscale
        if spec.video:
            frames = self.vae.config.frames if isinstance(self.vae, WanVae) else 1
            spec = replace(spec, vae_scale=pixels, vae_frames=frames)
        return spec, pixels

    @property
    def labels(self) -> int:
        """The number of captions that will be stored."""
        return len(self.captions.prompts) if self.captions is not None else len(self.prompts)

    @property
    def provenance(self) -> Mapping[str, str]:
        """Name of each part with ``_sha256`` -> digest of its content."""
        digests = {}
        if self.vae is not None:
            digests["vae_sha256"] = self.vae.checkpoint.sha256
        if self.text is not None:
            for name, checkpoint in self.text.checkpoints.items():
                digests[f"{name}_sha256"] = checkpoint.sha256
        if self.prompts:
            digests["prompts_sha256"] = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        if self.captions is not None:
            table = self.captions.table
            digests["captions_sha256"] = hashlib.sha256(
                table.embeds.tobytes() + table.mask.tobytes() + table.pooled.tobytes()
            ).hexdigest()
        return digests


def read_companions(options: ExportOptions, spec: ModelSpec) -> Companions:
    """Read the parts that the options name.

    Raises:
        ModelError, SafetyError: a folder cannot be used, or does not fit the model.
        UsageError: the captions do not fit the model.
    """
    vae = None if options.vae is None else _read_vae(options.vae, spec)
    text = None if options.text_encoder is None else read_text_encoders(options.text_encoder, spec)
    if options.captions is None:
        return Companions(vae, text, None, DEFAULT_PROMPTS if text else ())
    if options.captions.suffix == ".txt":
        if text is None:
            raise UsageError(
                f"{options.captions} holds texts, which need a text encoder; add `text_encoder`"
            )
        return Companions(vae, text, None, prompts_from_file(options.captions))
    captions = prompt_embeds_from_arrays(
        arrays_from_file(options.captions), spec, str(options.captions)
    )
    if captions.negatives is None:
        raise UsageError(
            f"{options.captions} has no negative_prompt_embeds, the caption of nothing; add it"
        )
    return Companions(vae, text, captions, ())


def _read_vae(path: Path, spec: ModelSpec) -> Vae | QwenVae | WanVae:
    """Read a VAE: of videos if its class is Wan's, else of images, or of the frames of a video."""
    config = read_json(part_of_pipeline(path, "vae", "diffusers saved a VAE to") / CONFIG)
    if config.get("_class_name") == QWEN_VAE_CLASS:
        return read_qwen_vae_folder(path, spec)
    if config.get("_class_name") != WAN_VAE_CLASS:
        return read_vae_folder(path, spec)
    if not spec.video:
        raise ModelError(f"{path} is a VAE of videos, but the model draws images; give its own VAE")
    return read_wan_vae_folder(path, spec)


def write_companions(
    companions: Companions, manifest: Manifest, options: ExportOptions, writer: UnitWriter
) -> Manifest:
    """Write the parts into the directory of the writer.

    Returns:
        The manifest with the graphs of the parts and the stored captions.
    """
    if isinstance(companions.vae, WanVae):
        kind = video_decoder_kind(companions.vae.config, manifest.model)
        units = writer.write((kind,), companions.vae.checkpoint.tensors, PRECISION, "vae")
        sizes = video_decoder_spec(companions.vae.config, options.vae_tile)
        manifest = replace(manifest, graphs=(*manifest.graphs, *units), video_decoder=sizes)
    elif companions.vae is not None:
        decoder = decoder_spec(companions.vae.config, manifest.model, options.vae_tile)
        kind = decoder_kind(companions.vae.decoder, manifest.model, decoder)
        units = writer.write((kind,), companions.vae.checkpoint.tensors, PRECISION, "vae")
        manifest = replace(manifest, graphs=(*manifest.graphs, *units), decoder=decoder)
    captions = companions.captions
    if companions.text is not None:
        manifest, encoder = write_text_encoders(companions.text, manifest, writer)
        if companions.prompts:
            captions = encoder.prompt_embeds(companions.prompts)
    if captions is not None:
        path = writer.stage / CAPTIONS_FILE
        path.parent.mkdir()
        path.write_bytes(captions_to_bytes(captions))
        manifest = replace(manifest, stored_captions=CAPTIONS_FILE)
    return manifest
