"""The images of a call, its requests to a session, and the input arrays of a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from goc_deploy.conditions.captions import Conditions, joined_conditions
from goc_deploy.guidance import EMBEDDED_GUIDANCE, SkipLayerGuidance
from goc_deploy.runtime.noise import image_noise
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Inputs of one run.

    Attributes:
        conditions: what each image shows.
        noise: (N, draws, C, H, W) float32: x_T, then one tensor for each step of a stochastic
            sampler.
        cfg_scale: (N,) guidance scale of each image; if all are 1, there are no unconditional rows.
        cfg_channels: guidance acts on channels 0 .. cfg_channels - 1.
        guidance: guidance scale that the model embeds; other models do not read it.
        cfg_scale_2: guidance scale of the second set of weights; None is ``cfg_scale``.
        references: (N, C, H, W) float32, latents of each reference image.
        skips: skip-layer guidance of the images that are guided, or None.
    """

    conditions: Conditions
    noise: np.ndarray
    cfg_scale: np.ndarray
    cfg_channels: int
    guidance: float = EMBEDDED_GUIDANCE
    cfg_scale_2: float | None = None
    references: tuple[np.ndarray, ...] = ()
    skips: SkipLayerGuidance | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """All N images of a call, which `request` divides into requests.

    Attributes:
        conditions: what each image shows.
        noise_keys: for each image, the two numbers that determine its noise.
        cfg_scale: (N,) guidance scale of each image.
        cfg_channels: guidance acts on channels 0 .. cfg_channels - 1.
        shape: shape of the latents of an image, (C, H, W), or (C, F, H, W) of a video.
        start: (N, C, H, W) float32 in place of the x_T made from the keys, or None.
        guidance: guidance scale that the model embeds; other models do not read it.
        cfg_scale_2: guidance scale of the second set of weights; None is ``cfg_scale``.
        references: (N, C, H, W) float32, latents of each reference image.
        skips: skip-layer guidance of the images that are guided, or None.
    """

    conditions: Conditions
    noise_keys: Sequence[tuple[int, int]]
    cfg_scale: np.ndarray
    cfg_channels: int
    shape: tuple[int, ...]
    start: np.ndarray | None = None
    guidance: float = EMBEDDED_GUIDANCE
    cfg_scale_2: float | None = None
    references: tuple[np.ndarray, ...] = ()
    skips: SkipLayerGuidance | None = None

    def __len__(self) -> int:
        return len(self.conditions.labels)

    def request(self, part: range, draws: int) -> Request:
        """The request of some images.

        Args:
            part: indices of the images.
            draws: noise tensors of an image: x_T, and one per step of a stochastic sampler.
        """
        cut = slice(part.start, part.stop)
        noise = np.stack([image_noise(*key, draws, self.shape) for key in self.noise_keys[cut]])
        if self.start is not None:
            noise[:, 0] = self.start[cut]
        conditions = self.conditions.part(part)
        return Request(
            conditions,
            noise,
            self.cfg_scale[cut],
            self.cfg_channels,
            self.guidance,
            self.cfg_scale_2,
            tuple(latents[cut] for latents in self.references),
            self.skips,
        )


def joined(drawings: Sequence[Drawing]) -> Drawing:
    """Join calls of one pipeline to one call, with their images in order.

    Args:
        drawings: calls with the same ``cfg_channels``, ``shape``, ``guidance``, ``cfg_scale_2`` and
            ``skips``, and without ``start`` and ``references``.
    """
    first = drawings[0]
    for drawing in drawings:
        assert drawing.start is None
        assert not drawing.references
        assert (drawing.cfg_channels, drawing.shape) == (first.cfg_channels, first.shape)
        assert (drawing.guidance, drawing.cfg_scale_2) == (first.guidance, first.cfg_scale_2)
        assert drawing.skips == first.skips
    return Drawing(
        joined_conditions([drawing.conditions for drawing in drawings]),
        [key for drawing in drawings for key in drawing.noise_keys],
        np.concatenate([drawing.cfg_scale for drawing in drawings]),
        first.cfg_channels,
        first.shape,
        guidance=first.guidance,
        cfg_scale_2=first.cfg_scale_2,
        skips=first.skips,
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """The shape of one run, which determines all addresses.

    Attributes:
        images: N, number of images.
        guided: whether conditional and unconditional rows run together, B = 2N.
        labels: R, number of rows of the modulation table: distinct labels with the null label;
            captions if the conditioning reads their pooled embeddings; else 1. Skip-layer guidance
            adds one per image.
        captions: K, number of distinct captions.
        axes: tokens along each axis of a sample; empty for the size of the model.
        references: tokens along each axis of each reference image, likewise.
        skip_steps: the steps that skip-layer guidance acts in. Until the last of them there are N
            more rows, without the skipped blocks; B = 3N.
    """

    images: int
    guided: bool
    labels: int
    captions: int = 0
    axes: tuple[int, ...] = ()
    references: tuple[tuple[int, ...], ...] = ()
    skip_steps: range = range(0)

    @property
    def rows(self) -> int:
        """Rows B of the model's batch."""
        return self.images * (1 + self.guided + bool(self.skip_steps))

    @property
    def without_skips(self) -> Batch:
        """The shape of the run after the last step of skip-layer guidance."""
        return replace(self, skip_steps=range(0))


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The input arrays of a request, without its noise.

    Attributes:
        batch: shape of the run.
        distinct: (K,) distinct labels in ascending order, or indices of captions.
        index: (B,) for each row, the index of its label or caption in ``distinct``.
        in_table: (R,) what each row of the modulation table is made for: labels, or indices of
            captions; one zero if all share a row.
        table_rows: (B,) for each row, its row of the table.
        rows: (B,) image of each row.
        cond_rows: (N,) row with the conditional model output of each image.
        uncond_rows: (N,) row with the unconditional output; for a scale of 1, the same row.
        guidance: (N, C) float32, weight of the conditional output; (2, N, C) if the model has two
            sets of weights.
        skip_weights: (N, C) float32, weight of skip-layer guidance.
    """

    batch: Batch
    distinct: np.ndarray
    index: np.ndarray
    in_table: np.ndarray
    table_rows: np.ndarray
    rows: np.ndarray
    cond_rows: np.ndarray
    uncond_rows: np.ndarray
    guidance: np.ndarray
    skip_weights: np.ndarray


def prepared(request: Request, spec: ModelSpec, *, pads_labels: bool = False) -> Inputs:
    """The input arrays of a request.

    Args:
        request: the request.
        spec: sizes of the model.
        pads_labels: whether the last label is repeated, so that fewer different shapes are bound.
    """
    conditions, images = request.conditions, len(request.conditions.labels)
    of_sets = [request.cfg_scale]
    if spec.boundary:
        second = request.cfg_scale_2
        of_sets += [request.cfg_scale if second is None else np.full(images, second)]
    scales = np.stack(of_sets)
    guided = request.cfg_channels > 0 and bool((scales != 1).any())
    skips = request.skips if guided else None
    wanted = [*conditions.labels, *(conditions.nulls if guided else ())]
    distinct = sorted(set(wanted))
    index = np.searchsorted(distinct, wanted)
    if pads_labels:
        distinct += distinct[-1:] * (images + guided - len(distinct))
    in_table, table_rows = ([0], np.zeros_like(index)) if spec.one_modulation else (distinct, index)
    own = np.arange(images)
    if skips is not None:
        # The rows without the skipped blocks have rows of the table of their own, with other gates.
        table_rows = np.concatenate([table_rows, len(in_table) + own])
        in_table = [*in_table, *conditions.labels]
        index = np.concatenate([index, index[:images]])
    batch = Batch(
        images,
        guided,
        labels=len(in_table),
        captions=len(distinct) if conditions.captions is not None else 0,
        axes=spec.axes_of(request.noise.shape[2:]) if spec.any_size else (),
        references=tuple(spec.axes_of(latents.shape[1:]) for latents in request.references),
        skip_steps=range(0) if skips is None else skips.steps,
    )
    of_channels = np.arange(spec.channels) < request.cfg_channels
    weights = np.where(of_channels, scales[..., None], 1.0)
    acts = of_channels & (scales[0, :, None] != 1)
    return Inputs(
        batch=batch,
        distinct=np.asarray(distinct),
        index=index,
        in_table=np.asarray(in_table),
        table_rows=table_rows,
        rows=np.resize(own, batch.rows),
        cond_rows=own,
        uncond_rows=np.where((scales == 1).all(0), own, own + images * guided),
        guidance=(weights if spec.boundary else weights[0]).astype(np.float32),
        skip_weights=np.where(acts, 0.0 if skips is None else skips.scale, 0.0).astype(np.float32),
    )
