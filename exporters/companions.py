"""What an engine directory holds beside the model: the decoder of a VAE, and captions that stand for labels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from goc_deploy.captions import PromptEmbeds, captions_to_bytes, prompt_embeds_from_arrays
from goc_deploy.errors import UsageError
from goc_deploy.exporters.checkpoint import Checkpoint
from goc_deploy.exporters.unit_files import UnitWriter
from goc_deploy.exporters.vae import PRECISION, Vae, decoder_kind, decoder_spec, read_vae_folder
from goc_deploy.manifest import Manifest
from goc_deploy.options import ExportOptions
from goc_deploy.spec import ModelSpec
from goc_deploy.tensor_files import arrays_from_file

CAPTIONS_FILE = "captions/captions.npz"


@dataclass(frozen=True)
class Companions:
    """What was read beside the model; None where nobody gave it."""

    vae: Vae | None
    captions: PromptEmbeds | None

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Weights that were read."""
        return () if self.vae is None else (self.vae.checkpoint,)

    @property
    def provenance(self) -> Mapping[str, str]:
        """Digests of what was read."""
        found = {}
        if self.vae is not None:
            found["vae_sha256"] = self.vae.checkpoint.sha256
        if self.captions is not None:
            table = self.captions.table
            found["captions_sha256"] = hashlib.sha256(table.embeds.tobytes() + table.mask.tobytes()).hexdigest()
        return found


def read_companions(options: ExportOptions, spec: ModelSpec) -> Companions:
    """Read what the options name.

    Raises:
        ModelError, SafetyError: a folder that cannot be used, or does not fit the model.
        UsageError: captions that do not fit it.
    """
    vae = None if options.vae is None else read_vae_folder(options.vae, spec)
    captions = None
    if options.captions is not None:
        captions = prompt_embeds_from_arrays(arrays_from_file(options.captions), spec, str(options.captions))
        if captions.negatives is None:
            raise UsageError(f"{options.captions} has no negative_prompt_embeds, the caption of nothing; add it")
    return Companions(vae, captions)


def write_companions(
    companions: Companions, manifest: Manifest, options: ExportOptions, writer: UnitWriter
) -> Manifest:
    """Write them beside the units that the manifest lists."""
    if companions.vae is not None:
        decoder = decoder_spec(companions.vae.config, manifest.model, options.vae_tile)
        kind = decoder_kind(companions.vae.config, manifest.model, decoder)
        units = writer.write((kind,), companions.vae.checkpoint.tensors, PRECISION, "vae")
        manifest = replace(manifest, units=(*manifest.units, *units), decoder=decoder)
    if companions.captions is not None:
        path = writer.stage / CAPTIONS_FILE
        path.parent.mkdir()
        path.write_bytes(captions_to_bytes(companions.captions))
        manifest = replace(manifest, captions=CAPTIONS_FILE)
    return manifest
