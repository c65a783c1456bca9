"""diffusers' DiTPipeline on the same weights, noise and timesteps."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor

from benchmarks.diffusers_state import diffusers_state
from benchmarks.work import Outcome, Work
from goc_deploy.exporters.architectures.dit_model import DiT
from goc_deploy.samplers import SamplerTable


def transformer_from_dit(model: DiT) -> DiTTransformer2DModel:
    """diffusers' transformer on the tensors of ``model``: nothing is copied."""
    spec = model.spec
    with torch.device("meta"):
        transformer = DiTTransformer2DModel(
            num_attention_heads=spec.heads,
            attention_head_dim=spec.hidden // spec.heads,
            in_channels=spec.channels,
            out_channels=spec.output_channels,
            num_layers=spec.depth,
            sample_size=spec.side,
            patch_size=spec.patch,
            num_embeds_ada_norm=spec.choices,
            norm_eps=1e-6,
        )
    transformer.load_state_dict(diffusers_state(model.state_dict(), spec), assign=True)
    transformer.pos_embed.pos_embed = model.pos_embed
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = (
            0  # the checkpoint's convention; diffusers' default is 1
        )
    return transformer.eval()


class TableScheduler(DDIMScheduler):
    """DDIM with the timesteps of a sampler table.

    diffusers' own DDIM steps over the spacing of such a table inexactly.
    """

    table: SamplerTable

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor(self.table.timesteps, device=device)

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **_: Any) -> Any:
        k = self.table.timesteps.index(int(timestep))
        return SimpleNamespace(
            prev_sample=self.table.latent[k] * sample + self.table.model[k] * model_output
        )


class KeepLatents(torch.nn.Module):
    """Stands where the VAE does, and keeps what it is given."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=1.0)
        self.latents = torch.empty(0)

    def decode(self, latents: Tensor) -> Any:
        self.latents = latents
        return SimpleNamespace(sample=latents)


def run_pipeline(transformer: DiTTransformer2DModel, work: Work) -> Outcome:
    """`DiTPipeline.__call__` without a real VAE; a step ends where the next one starts."""
    scheduler, vae = TableScheduler(), KeepLatents()
    scheduler.table = work.table
    pipe = DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    marks: list[float] = []
    hook = transformer.register_forward_pre_hook(lambda *_: marks.append(time.perf_counter()))
    where = "diffusers.pipelines.dit.pipeline_dit.randn_tensor"
    started = time.perf_counter()
    try:
        with mock.patch(where, return_value=torch.from_numpy(work.noise)):
            pipe(
                class_labels=list(work.labels),
                guidance_scale=work.cfg_scale,
                num_inference_steps=work.table.steps,
            )
    finally:
        hook.remove()
    stopped = time.perf_counter()
    ends = [*marks[1:], stopped]
    step_ms = tuple(1e3 * (end - start) for start, end in zip(marks, ends, strict=True))
    return Outcome(vae.latents.numpy(), step_ms, 1e3 * (stopped - started))
