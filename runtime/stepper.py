"""An engine directory's units, run one at a time with their features in sight.

Calibration looks at features and decides by them, which a compiled plan never does. Here the engines of the pipeline run
on host memory that NumPy sees too: the engines do the heavy work, NumPy adds what was predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from goc_deploy.precision import DTYPE_OF_PRECISION, Precision
from goc_deploy.protocols import ALIGNMENT, NUMPY_DTYPES, Buffer, taken
from goc_deploy.runtime.binding import Engines
from goc_deploy.runtime.buffers import (
    captions_of_block,
    keys_values_shape,
    table_labels,
)
from goc_deploy.samplers import SamplerTable
from goc_deploy.spec import ModelSpec


class HostArray:
    """Memory that engines take by address and NumPy by view."""

    def __init__(self, elements: int, dtype: str) -> None:
        numpy_dtype = np.dtype(NUMPY_DTYPES[dtype])
        raw = np.zeros(elements * numpy_dtype.itemsize + ALIGNMENT, np.uint8)
        offset = -raw.ctypes.data % ALIGNMENT
        self._flat = raw[offset : offset + elements * numpy_dtype.itemsize].view(numpy_dtype)
        self.whole = Buffer(raw.ctypes.data + offset, (elements,), dtype, raw)

    def array(self, *shape: int, start: int = 0) -> np.ndarray:
        """Elements ``start ...`` as an array."""
        return self._flat[start : start + math.prod(shape)].reshape(shape)

    def buffer(self, *shape: int, start: int = 0) -> Buffer:
        """The same elements as engines take them."""
        return self.whole.view(*shape, start=start)


class _CaptionArrays:
    """Captions of a batch, and their keys and values."""

    def __init__(self, spec: ModelSpec, capacity: int, dtype: str) -> None:
        most = 2 * capacity
        self._spec = spec
        self.embeds = HostArray(most * spec.caption_tokens * spec.caption_channels, "float32")
        self.bias = HostArray(most * spec.caption_tokens, "float32")
        self.keys_values = HostArray(math.prod(keys_values_shape(spec, most)), dtype)
        self.rows = HostArray(most, "int64")
        self.rows_of_table: list[int] = []

    def of_block(self, block: int, rows: int) -> dict[str, Buffer]:
        """What a branch of a block may read."""
        count, keys_values, bias = len(self.rows_of_table), self.keys_values.whole, self.bias.whole
        return captions_of_block(
            self._spec, count, block, keys_values, bias, self.rows.buffer(rows)
        )


class Stepper:
    """Runs one sampling step of a batch: `begin`, then `compute` or `add` for every unit in order, then `finish`.

    Nothing of a trajectory is kept here: latents and features belong to the caller, so any number of trajectories may
    advance in turn. Arithmetic of NumPy is float32 whatever the precision of the engines.

    Args:
        engines: loaded units; predict graphs are not needed.
        spec: the model.
        precision: of the engines.
        table: the sampler.
        capacity: most images of a batch.
    """

    def __init__(
        self,
        engines: Engines,
        spec: ModelSpec,
        precision: Precision,
        table: SamplerTable,
        capacity: int,
    ) -> None:
        self.spec, self.table, self.capacity, self._engines = spec, table, capacity, engines
        dtype, rows = DTYPE_OF_PRECISION[precision], 2 * capacity
        feature, image = rows * spec.tokens * spec.hidden, spec.channels * spec.side**2
        self._timestep = HostArray(1, "float32")
        self._labels = HostArray(capacity + 1, "int64")
        self._label_rows = HostArray(rows, "int64")
        self._table = HostArray(
            spec.modulation.count * table_labels(spec, capacity) * spec.hidden, dtype
        )
        self._captions = _CaptionArrays(spec, capacity, dtype) if spec.draws_captions else None
        self._modulation = HostArray(spec.modulation.count * rows * spec.hidden, dtype)
        self._rows = HostArray(rows, "int64")
        self._cond_rows, self._uncond_rows = (
            HostArray(capacity, "int64"),
            HostArray(capacity, "int64"),
        )
        self._guidance, self._coefficients = (
            HostArray(capacity * spec.channels, "float32"),
            HostArray(len(table.rows[0]), "float32"),
        )
        self._latents, self._latents_out = (
            HostArray(capacity * image, "float32"),
            HostArray(capacity * image, "float32"),
        )
        self._noise = HostArray(capacity * image, "float32")
        self._estimates = [HostArray(capacity * image, "float32") for _ in range(table.lags + 1)]
        self._prediction = HostArray(rows * spec.output_channels * spec.side**2, "float32")
        self._tokens = [HostArray(feature, dtype), HostArray(feature, dtype)]
        self._feature = HostArray(feature, dtype)
        self._update = np.empty(feature, np.float32)
        self._bound: dict[tuple[object, ...], Callable[[], None]] = {}
        self._images = self._row_count = self._side = self._step = 0

    def begin(
        self,
        step: int,
        latents: np.ndarray,
        labels: Sequence[int],
        cfg_scale: float,
        cfg_channels: int,
    ) -> None:
        """Start a step: its modulation, and tokens from the latents.

        Args:
            step: which step.
            latents: (N, C, H, W) before the step.
            labels: N class labels.
            cfg_scale: guidance scale; 1 runs without unconditional rows.
            cfg_channels: guidance acts on the first channels only.
        """
        spec, images = self.spec, len(labels)
        guided = cfg_scale != 1 and cfg_channels > 0
        rows = [*labels, *([spec.classes] * images if guided else [])]
        distinct = sorted(set(rows))
        self._images, self._row_count, self._side, self._step = images, len(rows), 0, step
        self._timestep.array(1)[:] = self.table.timesteps[step]
        index = np.searchsorted(distinct, rows)
        if self._captions is None:
            self._labels.array(len(distinct))[:] = distinct
            self._label_rows.array(len(rows))[:] = index
        else:
            self._label_rows.array(len(rows))[:] = 0
            self._captions.rows.array(len(rows))[:] = index
            self._use_captions(self._captions, distinct)
        self._rows.array(len(rows))[:] = np.resize(np.arange(images), len(rows))
        self._cond_rows.array(images)[:] = np.arange(images)
        self._uncond_rows.array(images)[:] = np.arange(images) + len(rows) - images
        self._guidance.array(images, spec.channels)[:] = np.where(
            np.arange(spec.channels) < cfg_channels, cfg_scale, 1.0
        )
        row = self.table.rows[step]
        self._coefficients.array(len(row))[:] = row
        self._latents.array(*self._latent_shape)[:] = latents
        self._run_conditioning(1 if self._captions else len(distinct))
        inputs = {
            "latents": self._latents.buffer(*self._latent_shape),
            "rows": self._rows.buffer(len(rows)),
        }
        self._run("embed", inputs, {"x": self._tokens[0].buffer(*self.feature_shape)})

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(B, T, D) of the current step: rows (conditional, then unconditional), tokens, width."""
        return (self._row_count, self.spec.tokens, self.spec.hidden)

    @property
    def tokens(self) -> np.ndarray:
        """The tokens x as they stand, (B, T, D) in the engine's dtype; a view."""
        return self._tokens[self._side].array(*self.feature_shape)

    def gate(self, unit: int) -> np.ndarray:
        """The unit's gate at the current step, (B, 1, D) in the engine's dtype; a view."""
        rows, hidden = self._row_count, self.spec.hidden
        return self._modulation.array(
            rows, 1, hidden, start=self.spec.modulation.gate(unit) * rows * hidden
        )

    def compute(self, unit: int) -> np.ndarray:
        """Run a unit's engine, which adds its gated feature to the tokens.

        Returns:
            The feature (B, T, D) in the engine's dtype: a view that the next call overwrites.
        """
        spec, rows = self.spec, self._row_count
        modulation, name = spec.modulation, spec.unit_names[unit]
        offered = {
            "x": self._tokens[self._side].buffer(*self.feature_shape),
            "shift": self._modulation_row(modulation.shift(unit)),
            "scale": self._modulation_row(modulation.scale(unit)),
            "gate": self._modulation_row(modulation.gate(unit)),
            **(self._captions.of_block(unit // len(spec.branches), rows) if self._captions else {}),
        }
        outputs = {
            "x_out": self._tokens[1 - self._side].buffer(*self.feature_shape),
            "feature": self._feature.buffer(rows * spec.tokens, spec.hidden),
        }
        self._run(name, taken(self._engines.units[name], offered), outputs)
        self._side = 1 - self._side
        return self._feature.array(*self.feature_shape)

    def add(self, unit: int, feature: np.ndarray) -> None:
        """Add ``gate * feature`` to the tokens; ``feature`` is (B, T, D) float32."""
        update = self._update[: feature.size].reshape(feature.shape)
        np.multiply(self.gate(unit), feature, out=update)
        tokens = self.tokens
        np.add(tokens, update, out=tokens, casting="same_kind")

    def finish(
        self, noise: np.ndarray | None = None, estimates: Sequence[np.ndarray] = ()
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """End the step: final layer, guidance and the sampler's row.

        Args:
            noise: (N, C, H, W) fresh noise where the sampler is stochastic.
            estimates: what a multistep sampler kept of earlier steps, newest first; (N, C, H, W) each.

        Returns:
            The latents after the step, (N, C, H, W) float32, and what a multistep sampler keeps of it; copies.
        """
        spec, rows, shape = self.spec, self._row_count, self._latent_shape
        self._noise.array(*shape)[:] = 0.0 if noise is None else noise
        prediction = self._prediction.buffer(rows, spec.output_channels, spec.side, spec.side)
        inputs = {
            "x": self._tokens[self._side].buffer(*self.feature_shape),
            "shift": self._modulation_row(spec.modulation.final_shift),
            "scale": self._modulation_row(spec.modulation.final_scale),
        }
        self._run("final", inputs, {"prediction": prediction})
        inputs = {
            "latents": self._latents.buffer(*shape),
            "prediction": prediction,
            "cond_rows": self._cond_rows.buffer(self._images),
            "uncond_rows": self._uncond_rows.buffer(self._images),
            "guidance": self._guidance.buffer(self._images, spec.channels),
            "coefficients": self._coefficients.buffer(len(self.table.rows[0])),
            "noise": self._noise.buffer(*shape),
        }
        outputs = {"latents_out": self._latents_out.buffer(*shape)}
        for place, lag in enumerate(self.table.reads(self._step), 1):
            self._estimates[place].array(*shape)[:] = (
                estimates[lag - 1] if lag <= len(estimates) else 0.0
            )
            inputs[f"estimate_{place}"] = self._estimates[place].buffer(*shape)
        if self.table.lags:
            outputs["estimate"] = self._estimates[0].buffer(*shape)
        self._run(self.table.graph, inputs, outputs)
        estimate = self._estimates[0].array(*shape).copy() if self.table.lags else None
        return self._latents_out.array(*shape).copy(), estimate

    @property
    def _latent_shape(self) -> tuple[int, int, int, int]:
        return (self._images, self.spec.channels, self.spec.side, self.spec.side)

    def _run_conditioning(self, labels: int) -> None:
        spec, rows, count = self.spec, self._row_count, self.spec.modulation.count
        offered = {"timesteps": self._timestep.buffer(1), "labels": self._labels.buffer(labels)}
        inputs = taken(self._engines.units["conditioning"], offered)
        self._run(
            "conditioning", inputs, {"table": self._table.buffer(1, count, labels, spec.hidden)}
        )
        inputs = {
            "table": self._table.buffer(count, labels, spec.hidden),
            "rows": self._label_rows.buffer(rows),
        }
        self._run(
            "modulation", inputs, {"modulation": self._modulation.buffer(count, rows, spec.hidden)}
        )

    def _use_captions(self, arrays: _CaptionArrays, distinct: list[int]) -> None:
        """Make keys and values of the stored captions, unless they are there from the step before."""
        if arrays.rows_of_table == distinct:
            return
        stored = self._engines.captions
        assert stored is not None
        arrays.rows_of_table = distinct
        table, spec, count = stored.table, self.spec, len(distinct)
        embeds = (count, spec.caption_tokens, spec.caption_channels)
        arrays.embeds.array(*embeds)[:] = table.embeds[distinct]
        arrays.bias.array(count, spec.caption_tokens)[:] = table.bias[distinct]
        outputs = {"keys_values": arrays.keys_values.buffer(*keys_values_shape(spec, count))}
        self._run("captions", {"captions": arrays.embeds.buffer(*embeds)}, outputs)

    def _modulation_row(self, row: int) -> Buffer:
        rows, hidden = self._row_count, self.spec.hidden
        return self._modulation.buffer(rows, hidden, start=row * rows * hidden)

    def _run(self, name: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run an engine; what was bound for equal addresses and shapes is bound once."""
        key = (name, *((b.pointer, b.shape) for b in (*inputs.values(), *outputs.values())))
        if key not in self._bound:
            self._bound[key] = self._engines.units[name].bind(inputs, outputs)
        self._bound[key]()
