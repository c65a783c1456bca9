"""A plan bound to addresses: which engine runs on which memory, decided before the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from goc_deploy import protocols
from goc_deploy.captions import PromptEmbeds
from goc_deploy.plan import Collect, Compute, Launch, Plan, Predict, Segment
from goc_deploy.protocols import Buffer, Engine, Stream, taken
from goc_deploy.runtime.buffers import (
    Buffers,
    aligned_size,
    captions_of_block,
    coefficient_row,
    keys_values_shape,
    modulation_rows,
)
from goc_deploy.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class BoundLaunch:
    """An engine on fixed addresses: what it is, for reports, and how to run it."""

    name: str
    run: protocols.Launch


@dataclass(frozen=True, slots=True)
class Engines:
    """Loaded graphs of a model.

    Attributes:
        units: by name: those that a plan launches by themselves.
        predict: predict graphs, by signature.
        captions: that come with the model.
        segments: by signature.
    """

    units: Mapping[str, Engine]
    predict: Mapping[str, Engine]
    captions: PromptEmbeds | None = None
    segments: Mapping[str, Engine] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Batch:
    """Shape of one run, which decides all addresses.

    Attributes:
        images: N.
        guided: whether conditional and unconditional rows run together, B = 2N.
        labels: R, distinct labels including the null label; 1 where captions take their place.
        captions: K, distinct captions.
    """

    images: int
    guided: bool
    labels: int
    captions: int = 0

    @property
    def rows(self) -> int:
        """Rows B of the model's batch."""
        return self.images * (2 if self.guided else 1)


@dataclass(frozen=True, slots=True)
class BoundPlan:
    """Launches by step, the latents before each step (and after the last), and the noise buffers."""

    launches: tuple[tuple[BoundLaunch, ...], ...]
    latents: tuple[Buffer, ...]
    noise: tuple[Buffer, ...]


class Binder:
    """Binds one plan for one batch shape. Launches with equal addresses are bound once."""

    def __init__(
        self, engines: Engines, spec: ModelSpec, plan: Plan, buffers: Buffers, batch: Batch, stream: Stream
    ) -> None:
        self._engines, self._spec, self._plan, self._buffers, self._batch = engines, spec, plan, buffers, batch
        self._stream = stream
        self._feature = (batch.rows, spec.tokens, spec.hidden)
        self._coefficient = 0  # position in buffers.coefficients
        self._known: dict[tuple[object, ...], BoundLaunch] = {}

    def bind(self) -> BoundPlan:
        """Bind every step."""
        spec, buffers, images = self._spec, self._buffers, self._batch.images
        shape = (images, spec.channels, spec.side, spec.side)
        latents = tuple(buffers.latents[k % 2].view(*shape) for k in range(self._plan.steps + 1))
        noise = tuple(buffer.view(*shape) for buffer in buffers.noise)
        steps = range(self._plan.steps)
        launches = tuple(tuple(self._step(k, latents[k], latents[k + 1], noise[k % len(noise)])) for k in steps)
        return BoundPlan(launches, latents, noise)

    def _step(self, step: int, latents: Buffer, latents_out: Buffer, noise: Buffer) -> list[BoundLaunch]:
        buffers, batch, spec, ops = self._buffers, self._batch, self._spec, self._plan.launches[step]
        launches = [self._keys_values()] if step == 0 and buffers.captions else []
        launches += [self._conditioning(step)] if step % buffers.chunk == 0 else []
        launches.append(self._pick_modulation(step))
        steps_ahead = sorted({op.ahead for op in ops if isinstance(op, Predict) and op.ahead})
        launches += [self._pick_gates(step, ahead) for ahead in steps_ahead]
        x, spare = (tokens.view(*self._feature) for tokens in buffers.tokens)
        launches.append(self._unit("embed", {"latents": latents, "rows": buffers.rows.view(batch.rows)}, {"x": x}))
        for op in ops:
            if isinstance(op, Predict) and op.ahead:
                launches.append(self._accumulate(op))
            else:
                launches.append(self._update(op, x, spare))
                x, spare = spare, x
        prediction = buffers.prediction.view(batch.rows, spec.output_channels, spec.side, spec.side)
        shift, scale = self._modulation_row(spec.units), self._modulation_row(spec.units + 1)
        launches.append(self._unit("final", {"x": x, "shift": shift, "scale": scale}, {"prediction": prediction}))
        launches.append(self._sampler(step, prediction, latents, noise, latents_out))
        return launches

    def _sampler(
        self, step: int, prediction: Buffer, latents: Buffer, noise: Buffer, latents_out: Buffer
    ) -> BoundLaunch:
        """Guidance and one row of the sampler table; a multistep sampler also keeps its estimate."""
        buffers, images, table = self._buffers, self._batch.images, self._plan.sampler
        width = len(table.rows[step])
        inputs = {
            "latents": latents,
            "prediction": prediction,
            "cond_rows": buffers.cond_rows.view(images),
            "uncond_rows": buffers.uncond_rows.view(images),
            "guidance": buffers.guidance,
            "coefficients": buffers.sampler.view(width, start=aligned_size(width) * step),
            "noise": noise,
        }
        outputs = {"latents_out": latents_out}
        if table.lags:
            ring, nothing = buffers.estimates, buffers.no_estimate
            assert nothing is not None
            for place, lag in enumerate(table.reads(step), 1):
                kept = ring[(step - lag) % len(ring)] if lag <= step else nothing
                inputs[f"estimate_{place}"] = kept.view(*latents.shape)
            outputs["estimate"] = ring[step % len(ring)].view(*latents.shape)
        return self._unit(table.graph, inputs, outputs)

    def _conditioning(self, step: int) -> BoundLaunch:
        """Fill the modulation table for the steps of a chunk and those that they predict ahead."""
        buffers, spec, labels = self._buffers, self._spec, self._batch.labels
        whole = buffers.chunk + self._plan.accumulators
        steps, start = min(whole, self._plan.steps - step), step // buffers.chunk * aligned_size(whole)
        offered = {"timesteps": buffers.timesteps.view(steps, start=start), "labels": buffers.labels.view(labels)}
        table = {"table": buffers.table.view(steps, modulation_rows(spec), labels, spec.hidden)}
        return self._unit("conditioning", taken(self._engines.units["conditioning"], offered), table)

    def _keys_values(self) -> BoundLaunch:
        """Turn the captions into keys and values of all blocks, once per request."""
        spec, count, buffers = self._spec, self._batch.captions, self._buffers.captions
        assert buffers is not None
        embeds = buffers.embeds.view(count, spec.caption_tokens, spec.caption_channels)
        keys_values = buffers.keys_values.view(*keys_values_shape(spec, count))
        return self._unit("captions", {"captions": embeds}, {"keys_values": keys_values})

    def _of_captions(self, block: int) -> dict[str, Buffer]:
        """What a branch of a block may read of the captions."""
        batch, buffers = self._batch, self._buffers.captions
        if buffers is None:
            return {}
        rows = buffers.rows.view(batch.rows)
        return captions_of_block(self._spec, batch.captions, block, buffers.keys_values, buffers.bias, rows)

    def _pick_modulation(self, step: int) -> BoundLaunch:
        """Expand a step's table rows to the batch: only those that the step uses."""
        units, kinds = self._spec.units, {type(op) for op in self._plan.launches[step]}
        last = modulation_rows(self._spec) if kinds & {Compute, Segment} else units + 2
        used = range(units if kinds == {Collect} else 0, last)
        target = self._modulation_row(used.start, len(used))
        return self._pick_rows(step % self._buffers.chunk, used, target)

    def _pick_gates(self, step: int, ahead: int) -> BoundLaunch:
        """Expand the gates of a later step."""
        spec = self._spec
        target = self._buffers.gates_ahead[ahead - 1].view(spec.units, self._batch.rows, spec.hidden)
        return self._pick_rows(step % self._buffers.chunk + ahead, range(spec.units), target)

    def _pick_rows(self, table_step: int, used: range, target: Buffer) -> BoundLaunch:
        spec, labels = self._spec, self._batch.labels
        start = (table_step * modulation_rows(spec) + used.start) * labels * spec.hidden
        table = self._buffers.table.view(len(used), labels, spec.hidden, start=start)
        rows = self._buffers.label_rows.view(self._batch.rows)
        return self._unit("modulation", {"table": table, "rows": rows}, {"modulation": target})

    def _modulation_row(self, row: int, count: int | None = None) -> Buffer:
        """A row (B, D) of the step's modulation, or several (count, B, D)."""
        rows, hidden = self._batch.rows, self._spec.hidden
        shape = (rows, hidden) if count is None else (count, rows, hidden)
        return self._buffers.modulation.view(*shape, start=row * rows * hidden)

    def _gates(self, source: Buffer, op: Predict) -> Buffer:
        rows, hidden = self._batch.rows, self._spec.hidden
        return source.view(len(op.predictions), rows, hidden, start=op.unit * rows * hidden)

    def _update(self, op: Launch, x: Buffer, x_out: Buffer) -> BoundLaunch:
        """What changes x of the step itself."""
        if isinstance(op, Compute):
            return self._compute(op, x, x_out)
        if isinstance(op, Segment):
            return self._segment(op, x, x_out)
        if isinstance(op, Predict):
            return self._predict(op, x, x_out, self._gates(self._buffers.modulation, op))
        accumulated = self._buffers.accumulators[op.ahead - 1].view(*self._feature)
        return self._unit("collect", {"x": x, "accumulated": accumulated}, {"x_out": x_out})

    def _accumulate(self, op: Predict) -> BoundLaunch:
        """Predict for a later step, into its accumulator; unit 0 starts it."""
        buffers, accumulator = self._buffers, self._buffers.accumulators[op.ahead - 1].view(*self._feature)
        assert buffers.zeros is not None
        x = accumulator if op.unit else buffers.zeros.view(*self._feature)
        return self._predict(op, x, accumulator, self._gates(buffers.gates_ahead[op.ahead - 1], op))

    def _compute(self, op: Compute, x: Buffer, x_out: Buffer) -> BoundLaunch:
        name, outputs = self._spec.unit_names[op.unit], {"x_out": x_out}
        if op.store is not None:
            outputs["feature"] = self._computed(op.store)
        offered = {"x": x, **self._of_unit(op.unit)}
        return self._unit(name, taken(self._engines.units[name], offered), outputs)

    def _segment(self, op: Segment, x: Buffer, x_out: Buffer) -> BoundLaunch:
        """All units as one engine, whose tensors have the names of their unit in front."""
        offered, outputs = {"x": x}, {"x_out": x_out}
        for unit, (name, store) in enumerate(zip(self._spec.unit_names, op.stores, strict=True)):
            offered |= {f"{name}.{of_unit}": buffer for of_unit, buffer in self._of_unit(unit).items()}
            if store is not None:
                outputs[f"{name}.feature"] = self._computed(store)
        engine = self._engines.segments[op.signature]
        return self._bound("segment", engine, taken(engine, offered), outputs)

    def _of_unit(self, unit: int) -> dict[str, Buffer]:
        """What a unit may read beside x."""
        spec = self._spec
        first = spec.units + 2 + 2 * unit
        return {
            "shift": self._modulation_row(first),
            "scale": self._modulation_row(first + 1),
            "gate": self._modulation_row(unit),
            **self._of_captions(unit // len(spec.branches)),
        }

    def _computed(self, slot: int) -> Buffer:
        """A slot as a unit writes its feature."""
        return self._buffers.slots[slot].view(self._batch.rows * self._spec.tokens, self._spec.hidden)

    def _predict(self, op: Predict, x: Buffer, x_out: Buffer, gates: Buffer) -> BoundLaunch:
        width = len(coefficient_row(op))
        inputs = {
            "x": x,
            "gates": gates,
            "coefficients": self._buffers.coefficients.view(width, start=self._coefficient),
        }
        self._coefficient += aligned_size(width)
        outputs = {"x_out": x_out}
        for u, prediction in enumerate(op.predictions):
            for i, slot in enumerate(prediction.slots):
                inputs[f"g{u}_{i}"] = self._buffers.slots[slot].view(*self._feature)
            if prediction.store is not None:
                outputs[f"g{u}"] = self._buffers.slots[prediction.store].view(*self._feature)
        last = op.unit + len(op.predictions) - 1
        name = f"predict {op.unit}-{last}" + (f", {op.ahead} ahead" if op.ahead else "")
        return self._bound(name, self._engines.predict[op.signature], inputs, outputs)

    def _unit(self, name: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> BoundLaunch:
        return self._bound(name, self._engines.units[name], inputs, outputs)

    def _bound(
        self, name: str, engine: Engine, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> BoundLaunch:
        addresses = [(name, b.pointer, b.shape) for name, b in [*inputs.items(), *outputs.items()]]
        key = (id(engine), *addresses)
        if key not in self._known:
            self._known[key] = BoundLaunch(name, engine.bind(inputs, outputs, self._stream))
        return self._known[key]
