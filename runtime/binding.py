"""A plan bound to addresses: the engine and the memory of every launch, before the step loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field

from goc_deploy.blocks import TokenStream, Unit
from goc_deploy.compiler import (
    Accumulate,
    AddSum,
    Collect,
    Compute,
    Plan,
    Predict,
    Residual,
    Segment,
)
from goc_deploy.conditions.captions import PromptEmbeds
from goc_deploy.protocols import Buffer, Engine, Stream, taken
from goc_deploy.runtime.bound import BoundLaunch, BoundPlan, BoundStep
from goc_deploy.runtime.buffers import (
    Buffers,
    captions_of_block,
    keys_values_shape,
)
from goc_deploy.runtime.constants import aligned_size
from goc_deploy.runtime.head_binding import HeadBinding
from goc_deploy.runtime.lookahead import chunk_steps, lookahead_of
from goc_deploy.runtime.modulation_tables import ModulationTables
from goc_deploy.runtime.request import Batch
from goc_deploy.runtime.skip_binding import SkipBinding
from goc_deploy.runtime.stream_buffers import StreamBuffers
from goc_deploy.runtime.weights import Weights
from goc_deploy.size_inputs import size_shapes
from goc_deploy.spec import SECOND_SET, ModelSpec


@dataclass(frozen=True, slots=True)
class Engines:
    """The loaded engines of a model.

    Attributes:
        units: engines of units and of the graphs around the blocks, by name.
        predict: engines of predict graphs, by signature.
        captions: the stored captions of the engine directory, or None.
        segments: engines of segments, by signature.
        weights: the weights of ``units`` and ``segments``.
        tables: modulation tables that are not computed per request, or None without any.
    """

    units: MutableMapping[str, Engine]
    predict: Mapping[str, Engine]
    captions: PromptEmbeds | None = None
    segments: MutableMapping[str, Engine] = field(default_factory=dict)
    weights: Weights = field(default_factory=Weights)
    tables: ModulationTables | None = None

    def holds_table(self, plan: Plan) -> bool:
        """Whether the session puts the modulation table of a plan in its place, not a launch."""
        return self.tables is not None and self.tables.holds(plan)


# Names of the tensors in graphs:
TOKENS: Mapping[TokenStream, str] = {"image": "x", "text": "text", "reference": "reference"}


class _Tokens:
    """The tokens of a stream during a step, which launches write to two buffers in turn."""

    def __init__(self, start: Buffer, first: Buffer, second: Buffer) -> None:
        self.now, self._next, self._after = start, first, second

    def advance(self) -> tuple[Buffer, Buffer]:
        """The tokens before and after a launch."""
        before, self.now = self.now, self._next
        self._next, self._after = self._after, self._next
        return before, self.now


class Binder:
    """Binds one plan for one batch shape. Launches with equal addresses are bound once.

    Every step reads its values at their own addresses. In `goc_deploy.runtime.shared_binding`,
    steps share launches.

    Args:
        engines: the engines that the plan launches.
        spec: sizes of the model for the samples of the batch.
        plan: the plan.
        buffers: the memory of the session.
        batch: the batch shape.
        stream: the stream of the launches.
        earlier: binder of the steps before those that this one binds, which have more rows, or
            None. Fewer rows are the first ones of all memory, except for gates that were fetched.
    """

    def __init__(
        self,
        engines: Engines,
        spec: ModelSpec,
        plan: Plan,
        buffers: Buffers,
        batch: Batch,
        stream: Stream,
        earlier: Binder | None = None,
    ) -> None:
        self._engines, self._spec, self._plan, self._buffers, self._batch = (
            engines,
            spec,
            plan,
            buffers,
            batch,
        )
        self._stream, self._lookahead, self._earlier = stream, lookahead_of(plan), earlier
        self._shapes: Mapping[TokenStream, tuple[int, ...]] = {
            stream: (batch.rows, spec.tokens_of(stream), spec.hidden) for stream in TOKENS
        }
        self._feature = self._shapes["image"]
        self._names, self._units, self._unit_places = (
            spec.unit_names,
            spec.declared_units,
            spec.unit_places,
        )
        modulation = spec.modulation
        self._rows_of_units = [modulation.of_unit(unit) for unit in range(spec.units)]
        self._latents_shape = (batch.images, *spec.latents)
        self._of_size = {
            name: buffers.of_size[name].view(*shape) for name, shape in size_shapes(spec).items()
        }
        self._launches: dict[tuple[object, ...], BoundLaunch] = {}
        skips = buffers.skips
        self._skips = None if skips is None else SkipBinding(skips, spec, batch)
        head, of_head, shared = plan.sampler.head, buffers.head, buffers.shared is not None
        self._head = (
            HeadBinding(head, of_head, plan, spec, batch, shared=shared)
            if head is not None and of_head is not None
            else None
        )

    def bind(self, first: int, stop: int) -> BoundPlan:
        """Bind the steps from ``first`` to ``stop``, with the noise of all steps."""
        steps = range(first, stop)
        latents = tuple(map(self._latents_out, steps))
        noisy = self._plan.steps if self._plan.sampler.stochastic else 1
        noise = tuple(map(self._noise_of, range(noisy)))
        return BoundPlan(
            tuple(map(self._step, steps)), self._initial(), latents, noise, self._resets()
        )

    def _step(self, step: int) -> BoundStep:
        buffers, spec = self._buffers, self._spec
        switches = step == self._plan.schedule.switch
        begins = step == 0 or switches
        before = [self._captions(step)] if begins and buffers.captions else []
        before += [self._references(step)] if begins and buffers.patches else []
        computes_table = step % buffers.chunk == 0 or switches
        if computes_table and not self._engines.holds_table(self._plan):
            before.append(self._conditioning(step))
            if self._batch.skip_steps and self._skips is not None:
                table, steps = buffers.table, self._chunk_steps(step)
                before.append(self._skips.close_gates(table, steps, self._stream))
        before += [self._pick_gates(step, later) for later in self._lookahead.fetched[step]]
        streams = self._streams()
        start = (*self._start(step), self._embed(step, streams["image"].now))
        updates: list[BoundLaunch] = []
        ops = zip(self._plan.launches[step], buffers.coefficients[step], strict=True)
        for op, coefficients in ops:
            if isinstance(op, Predict) and op.ahead:
                updates.append(self._predict_ahead(step, op, coefficients))
            elif isinstance(op, Accumulate):
                updates.append(self._accumulate(step, op, coefficients))
            elif isinstance(op, Residual):
                updates.append(self._residual(op, streams["image"].now))
            else:
                updates.append(self._update(step, op, streams, coefficients))
        x, prediction = streams["image"].now, self._prediction(step)
        shift = self._modulation_row(spec.modulation.final_shift)
        scale = self._modulation_row(spec.modulation.final_scale)
        inputs = {"x": self._along_axes(x), "shift": shift, "scale": scale}
        final = self._unit(
            self._of_set(step, "final"), inputs, {"prediction": self._in_patches(prediction)}
        )
        end = (final, self._sampler(step, prediction, x))
        return BoundStep(tuple(before), start, tuple(updates), end)

    def _of_set(self, step: int, name: str) -> str:
        """Name of a graph of the model with the weights that compute a step."""
        return SECOND_SET + name if self._plan.schedule.in_second_set(step) else name

    def _streams(self) -> dict[TokenStream, _Tokens]:
        """The tokens of each stream at the start of a step."""
        buffers = self._buffers
        even, odd = (tokens.view(*self._feature) for tokens in buffers.tokens)
        first = even if buffers.start is None else buffers.start.view(*self._feature)
        streams: dict[TokenStream, _Tokens] = {"image": _Tokens(first, odd, even)}
        for stream, other in buffers.others.items():
            shape = self._shapes[stream]
            turns = (tokens.view(*shape) for tokens in other.tokens)
            streams[stream] = _Tokens(other.start.view(*shape), *turns)
        return streams

    def _embed(self, step: int, x: Buffer) -> BoundLaunch:
        """Turn the latents into the tokens x (B, T, D)."""
        offered = {
            "latents": self._in_patches(self._latents(step)),
            "rows": self._buffers.rows.view(self._batch.rows),
            **self._of_size,
        }
        name = self._of_set(step, "embed")
        inputs = taken(self._engines.units[name], offered)
        return self._unit(name, inputs, {"x": self._along_axes(x)})

    def _in_patches(self, images: Buffer) -> Buffer:
        """Latents or model outputs as the graphs see them: by patches if they accept any size."""
        spec = self._spec
        return images.view(*spec.in_patches(images.shape)) if spec.any_size else images

    def _along_axes(self, x: Buffer) -> Buffer:
        """Tokens as the graphs around the blocks see them: along their axes, likewise."""
        spec = self._spec
        return x.view(x.shape[0], *spec.axes, spec.hidden) if spec.any_size else x

    def _prediction(self, step: int) -> Buffer:
        """The buffer of the model output of a step, (B, C_out, H, W)."""
        if self._head is not None and self._head.computes(step):
            return self._head.prediction(step)
        return self._buffers.prediction.view(self._batch.rows, *self._spec.prediction)

    def _start(self, step: int) -> list[BoundLaunch]:
        """The launches before the tokens of a step: they expand its modulation."""
        used = self._used_modulation(step)
        target = self._modulation_row(used.start, len(used))
        return [self._pick_rows(step % self._buffers.chunk, used, target)]

    def _initial(self) -> Buffer:
        """The buffer of x_T, (N, C, H, W)."""
        return self._latents(0)

    def _latents(self, step: int) -> Buffer:
        """The latents before a step, (N, C, H, W)."""
        return self._buffers.latents[step % 2].view(*self._latents_shape)

    def _latents_out(self, step: int) -> Buffer:
        """The latents after a step, (N, C, H, W)."""
        return self._latents(step + 1)

    def _noise_of(self, step: int) -> Buffer:
        """The buffer to which the noise of a step is uploaded, (N, C, H, W)."""
        start = (
            step * aligned_size(math.prod(self._latents_shape))
            if self._plan.sampler.stochastic
            else 0
        )
        return self._buffers.noise.view(*self._latents_shape, start=start)

    def _noise(self, step: int) -> Buffer:
        """The buffer from which the sampler reads the noise of a step, (N, C, H, W)."""
        return self._noise_of(step)

    def _estimate(self, step: int, lag: int) -> Buffer:
        """The estimate of ``lag`` steps ago, (N, C, H, W); 0 is the buffer for the new estimate."""
        ring, nothing = self._buffers.estimates, self._buffers.no_estimate
        assert nothing is not None
        kept = ring[(step - lag) % len(ring)] if lag <= step else nothing
        return kept.view(*self._latents_shape)

    def _resets(self) -> tuple[tuple[Buffer, Buffer], ...]:
        """Copies that must be made before the first step."""
        return ()

    def _sampler(self, step: int, prediction: Buffer, x: Buffer) -> BoundLaunch:
        """Guidance, a row of the sampler table, and the head; some samplers store an estimate."""
        buffers, images, table = self._buffers, self._batch.images, self._plan.sampler
        inputs = {
            "latents": self._latents(step),
            "prediction": prediction,
            "cond_rows": buffers.cond_rows.view(images),
            "uncond_rows": buffers.uncond_rows.view(images),
            "guidance": self._guidance(step),
            "coefficients": buffers.sampler_rows[step],
            "noise": self._noise(step),
        }
        if self._skips is not None:
            inputs |= self._skips.inputs(step, inputs["cond_rows"])
        outputs = {"latents_out": self._latents_out(step)}
        if table.lags:
            for place, lag in enumerate(table.reads(step), 1):
                inputs[f"estimate_{place}"] = self._estimate(step, lag)
            outputs["estimate"] = self._estimate(step, 0)
        if self._head is not None:
            inputs |= self._head.inputs(step, x)
            outputs |= self._head.outputs(step)
        return self._unit(table.graph, inputs, outputs)

    def _guidance(self, step: int) -> Buffer:
        """The guidance weights (N, C) of the set of weights that computes a step."""
        shape = (self._batch.images, self._spec.channels)
        second = self._plan.schedule.in_second_set(step)
        return self._buffers.guidance.view(*shape, start=math.prod(shape) if second else 0)

    def _conditioning(self, step: int) -> BoundLaunch:
        """Fill the modulation table for a chunk and the later steps whose gates it fetches."""
        buffers, spec, labels = self._buffers, self._spec, self._batch.labels
        steps = len(self._chunk_steps(step))
        (whole,), chunks = buffers.timesteps.shape, -(-self._plan.steps // buffers.chunk)
        start = step // buffers.chunk * (whole // chunks)
        offered = {
            "timesteps": buffers.timesteps.view(steps, start=start),
            "guidance": buffers.embedded_guidance,
            **self._of_size,
        }
        if buffers.pooled is None:
            offered["labels"] = buffers.labels.view(labels)
        else:
            offered["pooled"] = buffers.pooled.view(labels, spec.pooled_channels)
        table = {"table": buffers.table.view(steps, spec.modulation.count, labels, spec.hidden)}
        name = self._of_set(step, "conditioning")
        return self._unit(name, taken(self._engines.units[name], offered), table)

    def _captions(self, step: int) -> BoundLaunch:
        """Turn the captions into keys and values, or the text of every row.

        This happens once per request and set of weights.
        """
        spec, count, buffers = self._spec, self._batch.captions, self._buffers.captions
        assert buffers is not None
        offered = {
            "captions": buffers.embeds.view(count, spec.caption_tokens, spec.caption_channels),
            "caption_rows": buffers.rows.view(self._batch.rows),
            "bias": buffers.bias.view(count, spec.caption_tokens),
        }
        outputs: dict[str, Buffer] = {}
        if buffers.keys_values is not None:
            outputs["keys_values"] = buffers.keys_values.view(*keys_values_shape(spec, count))
        if self._buffers.text is not None:
            outputs["text"] = self._buffers.text.start.view(*self._shapes["text"])
        name = self._of_set(step, "captions")
        return self._unit(name, taken(self._engines.units[name], offered), outputs)

    def _references(self, step: int) -> BoundLaunch:
        """Turn the patches of the reference images into tokens, as often as `_captions`."""
        batch, shape, buffers = self._batch, self._shapes["reference"], self._buffers
        assert buffers.patches is not None
        assert buffers.reference is not None
        patches = buffers.patches.view(batch.images, shape[1], self._spec.patch_values)
        inputs = {"patches": patches, "rows": buffers.rows.view(batch.rows)}
        outputs = {"reference": buffers.reference.start.view(*shape)}
        return self._unit(self._of_set(step, "references"), inputs, outputs)

    def _of_captions(self, block: int) -> dict[str, Buffer]:
        """The tensors of the captions that a branch of a block may read."""
        batch, buffers = self._batch, self._buffers.captions
        if buffers is None:
            return {}
        rows = buffers.rows.view(batch.rows)
        return captions_of_block(
            self._spec, batch.captions, block, buffers.keys_values, buffers.bias, rows
        )

    def _used_modulation(self, step: int) -> range:
        """The rows of the modulation table that a step uses."""
        kinds = {type(op) for op in self._plan.launches[step]}
        by_unit = self._plan.schedule.level == "unit"  # residuals have no gates
        return self._spec.modulation.read(
            computes=bool(kinds & {Compute, Segment}), predicts=by_unit and Predict in kinds
        )

    def _chunk_steps(self, step: int) -> list[int]:
        """The steps in the modulation table while a step runs, in the order of the table."""
        chunk = self._buffers.chunk
        return chunk_steps(self._plan, self._lookahead, step - step % chunk, chunk)

    def _pick_gates(self, step: int, later: int) -> BoundLaunch:
        """Expand the gates of a later step."""
        gates = self._spec.modulation.gates
        target = self._gates_of_step(later, 0, len(gates))
        return self._pick_rows(self._chunk_steps(step).index(later), gates, target)

    def _gates_of_step(self, later: int, feature: int, count: int) -> Buffer:
        """The gates (count, B, D) of features from ``feature`` on at a later step.

        B is the number of rows of the step that fetched them.
        """
        earlier = self._earlier
        if earlier is not None:
            before = self._lookahead.fetched[: earlier._batch.skip_steps.stop]
            if any(later in steps for steps in before):
                return earlier._gates_of_step(later, feature, count)
        rows, hidden, modulation = self._batch.rows, self._spec.hidden, self._spec.modulation
        first = modulation.gates.index(modulation.gate(feature))
        return self._buffers.gates_ahead[self._lookahead.place[later]].view(
            count, rows, hidden, start=first * rows * hidden
        )

    def _pick_rows(self, table_step: int, used: range, target: Buffer) -> BoundLaunch:
        spec, labels = self._spec, self._batch.labels
        start = (table_step * spec.modulation.count + used.start) * labels * spec.hidden
        table = self._buffers.table.view(len(used), labels, spec.hidden, start=start)
        rows = self._buffers.label_rows.view(self._batch.rows)
        return self._unit("modulation", {"table": table, "rows": rows}, {"modulation": target})

    def _modulation_row(self, row: int, count: int | None = None) -> Buffer:
        """A row (B, D) of the step's modulation, or several (count, B, D)."""
        rows, hidden = self._batch.rows, self._spec.hidden
        shape = (rows, hidden) if count is None else (count, rows, hidden)
        return self._buffers.modulation.view(*shape, start=row * rows * hidden)

    def _gates(self, op: Predict) -> Buffer:
        """The gates (count, B, D) of a launch that predicts in place; ones for a residual."""
        rows, hidden = self._batch.rows, self._spec.hidden
        if self._plan.schedule.level == "residual":
            assert self._buffers.ones is not None
            return self._buffers.ones.view(1, rows, hidden)
        return self._modulation_row(self._spec.modulation.gate(op.feature), len(op.predictions))

    def _update(
        self,
        step: int,
        op: Compute | Segment | Predict | Collect | AddSum,
        streams: dict[TokenStream, _Tokens],
        coefficients: Buffer | None,
    ) -> BoundLaunch:
        """A launch that changes the tokens of the step itself."""
        if isinstance(op, Compute):
            return self._compute(step, op, streams)
        if isinstance(op, Segment):
            return self._segment(op, streams)
        if isinstance(op, Predict):
            x, x_out = streams[op.stream].advance()
            return self._predict(op, x, x_out, self._gates(op), coefficients)
        stream: TokenStream = "image" if isinstance(op, Collect) else op.stream
        x, x_out = streams[stream].advance()
        accumulator = op.ahead - 1 if isinstance(op, Collect) else op.accumulator
        inputs = {"x": x, "accumulated": self._accumulator(stream, accumulator)}
        return self._unit("collect", inputs, {"x_out": x_out})

    def _history_of(self, stream: TokenStream) -> Buffers | StreamBuffers:
        """The slots and accumulators of a stream."""
        return self._buffers.others.get(stream, self._buffers)

    def _slot(self, stream: TokenStream, slot: int) -> Buffer:
        """A slot of the history, (B, tokens of the stream, D)."""
        return self._history_of(stream).slots[slot].view(*self._shapes[stream])

    def _accumulator(self, stream: TokenStream, accumulator: int) -> Buffer:
        """A sum of gated predictions, likewise."""
        return self._history_of(stream).accumulators[accumulator].view(*self._shapes[stream])

    def _accumulate(self, step: int, op: Accumulate, coefficients: Buffer | None) -> BoundLaunch:
        """Add a feature to the accumulators of later steps, in place."""
        assert coefficients is not None
        rows, hidden = self._batch.rows, self._spec.hidden
        inputs = {"g": self._slot(op.stream, op.slot), "coefficients": coefficients}
        outputs = {}
        for index, tap in enumerate(op.taps):
            gate = self._gates_of_step(step + tap.ahead, op.feature, 1)
            accumulator = self._accumulator(op.stream, tap.accumulator)
            inputs[f"gate{index}"] = gate.view(rows, hidden)
            inputs |= {} if tap.starts else {f"a{index}": accumulator}
            outputs[f"a{index}_out"] = accumulator
        name = f"accumulate {op.feature}, {len(op.taps)} taps"
        return self._bound(name, self._engines.predict[op.signature], inputs, outputs)

    def _predict_ahead(self, step: int, op: Predict, coefficients: Buffer | None) -> BoundLaunch:
        """Predict for a later step, into its accumulator; feature 0 starts it.

        All predictions for a step are made during one step, so the gates have as many rows as it.
        """
        zeros, accumulator = self._buffers.zeros, self._accumulator("image", op.ahead - 1)
        assert zeros is not None
        x = accumulator if op.feature else zeros.view(*self._feature)
        gates = self._gates_of_step(step + op.ahead, op.feature, len(op.predictions))
        return self._predict(op, x, accumulator, gates, coefficients)

    def _residual(self, op: Residual, x: Buffer) -> BoundLaunch:
        """Keep what all units added to the tokens of the step."""
        assert self._buffers.start is not None
        inputs = {"x": x, "start": self._buffers.start.view(*self._feature)}
        return self._unit("residual", inputs, {"residual": self._slot("image", op.store)})

    def _compute(self, step: int, op: Compute, streams: dict[TokenStream, _Tokens]) -> BoundLaunch:
        name = self._of_set(step, self._names[op.unit])
        unit = self._units[op.unit]
        offered, outputs = self._of_unit(op.unit), self._features(unit, op.stores)
        changed = {feature.stream for feature in unit.features}
        for stream, tokens in streams.items():
            offered[TOKENS[stream]] = tokens.now
            if stream in changed:
                _, outputs[f"{TOKENS[stream]}_out"] = tokens.advance()
        return self._unit(name, taken(self._engines.units[name], offered), outputs)

    def _segment(self, op: Segment, streams: dict[TokenStream, _Tokens]) -> BoundLaunch:
        """All units as one engine, whose tensors have the names of their units as prefixes."""
        offered = {TOKENS[stream]: tokens.now for stream, tokens in streams.items()}
        outputs: dict[str, Buffer] = {}
        stores = iter(op.stores)
        declared = enumerate(zip(self._names, self._units, strict=True))
        for index, (name, unit) in declared:
            offered |= {f"{name}.{of_unit}": b for of_unit, b in self._of_unit(index).items()}
            kept = self._features(unit, tuple(next(stores) for _ in unit.features))
            outputs |= {f"{name}.{feature}": buffer for feature, buffer in kept.items()}
        _, outputs["x_out"] = streams["image"].advance()
        engine = self._engines.segments[op.signature]
        return self._bound("segment", engine, taken(engine, offered), outputs)

    def _features(self, unit: Unit, stores: tuple[int | None, ...]) -> dict[str, Buffer]:
        """The slots that keep features of a unit, as its graph writes them, by output."""
        kept = {}
        for feature, store in zip(unit.features, stores, strict=True):
            if store is not None:
                slot = self._slot(feature.stream, store)
                rows, tokens, hidden = slot.shape
                kept[feature.output] = slot.view(rows * tokens, hidden)
        return kept

    def _of_unit(self, unit: int) -> dict[str, Buffer]:
        """The tensors that a unit may read in addition to x."""
        return {
            **{name: self._modulation_row(row) for name, row in self._rows_of_units[unit].items()},
            **self._of_size,
            **self._of_captions(self._unit_places[unit].block),
        }

    def _predict(
        self, op: Predict, x: Buffer, x_out: Buffer, gates: Buffer, coefficients: Buffer | None
    ) -> BoundLaunch:
        assert coefficients is not None
        inputs = {"x": x, "gates": gates, "coefficients": coefficients}
        outputs = {"x_out": x_out}
        for u, prediction in enumerate(op.predictions):
            for i, slot in enumerate(prediction.slots):
                inputs[f"g{u}_{i}"] = self._slot(op.stream, slot)
            if prediction.store is not None:
                outputs[f"g{u}"] = self._slot(op.stream, prediction.store)
        last = op.feature + len(op.predictions) - 1
        name = f"predict {op.feature}-{last}" + (f", {op.ahead} ahead" if op.ahead else "")
        name = "predict residual" if self._plan.schedule.level == "residual" else name
        return self._bound(name, self._engines.predict[op.signature], inputs, outputs)

    def _unit(
        self, name: str, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> BoundLaunch:
        return self._bound(name, self._engines.units[name], inputs, outputs)

    def _bound(
        self, name: str, engine: Engine, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> BoundLaunch:
        addresses = [(name, b.pointer, b.shape) for name, b in [*inputs.items(), *outputs.items()]]
        key = (id(engine), *addresses)
        if key not in self._launches:
            run = engine.bind(inputs, outputs, self._stream)
            self._launches[key] = BoundLaunch(name, run, inputs, outputs)
        return self._launches[key]
