"""The launches of a plan on addresses: computed units, predictions and sums."""

from __future__ import annotations

from collections.abc import Mapping

from goc_deploy.blocks import TokenStream, Unit
from goc_deploy.compiler import (
    Accumulate,
    Collect,
    Compute,
    Launch,
    Plan,
    Predict,
    Residual,
    Segment,
)
from goc_deploy.protocols import Buffer, taken
from goc_deploy.runtime.bound import BoundLaunch
from goc_deploy.runtime.buffers import Buffers, captions_of_block
from goc_deploy.runtime.model_engines import Launches
from goc_deploy.runtime.modulation_binding import ModulationBinding
from goc_deploy.runtime.request import Batch
from goc_deploy.runtime.stream_buffers import StreamBuffers
from goc_deploy.spec import SECOND_SET, ModelSpec

# Names of the tensors in graphs:
TOKENS: Mapping[TokenStream, str] = {"image": "x", "text": "text", "reference": "reference"}


def graph_of_step(plan: Plan, step: int, name: str) -> str:
    """Name of a graph of the model with the weights that compute a step."""
    return SECOND_SET + name if plan.schedule.in_second_set(step) else name


class Tokens:
    """The tokens of a stream during a step, which launches write to two buffers in turn."""

    def __init__(self, start: Buffer, first: Buffer, second: Buffer) -> None:
        self.now, self._next, self._after = start, first, second

    def advance(self) -> tuple[Buffer, Buffer]:
        """The tokens before and after a launch."""
        before, self.now = self.now, self._next
        self._next, self._after = self._after, self._next
        return before, self.now


class BlockBinding:
    """Binds the launches of a plan for a batch shape.

    Args:
        launches: binds engines to addresses.
        spec: sizes of the model for the samples of the batch.
        plan: the plan.
        buffers: the memory of the session.
        batch: shape of the run.
        modulation: where the modulation is.
        of_size: what tells graphs the size of a sample, by the name of the input.
    """

    def __init__(
        self,
        launches: Launches,
        spec: ModelSpec,
        plan: Plan,
        buffers: Buffers,
        batch: Batch,
        modulation: ModulationBinding,
        of_size: Mapping[str, Buffer],
    ) -> None:
        self._launches, self._spec, self._plan, self._buffers = launches, spec, plan, buffers
        self._batch, self._modulation, self._of_size = batch, modulation, of_size
        self._shapes: Mapping[TokenStream, tuple[int, ...]] = {
            stream: (batch.rows, spec.tokens_of(stream), spec.hidden) for stream in TOKENS
        }
        self._feature = self._shapes["image"]
        self._names, self._units = spec.unit_names, spec.declared_units
        self._unit_places = spec.unit_places
        self._rows_of_units = [spec.modulation.of_unit(unit) for unit in range(spec.units)]

    def streams(self) -> dict[TokenStream, Tokens]:
        """The tokens of each stream at the start of a step."""
        buffers = self._buffers
        even, odd = (tokens.view(*self._feature) for tokens in buffers.tokens)
        first = even if buffers.start is None else buffers.start.view(*self._feature)
        streams: dict[TokenStream, Tokens] = {"image": Tokens(first, odd, even)}
        for stream, other in buffers.others.items():
            shape = self._shapes[stream]
            turns = (tokens.view(*shape) for tokens in other.tokens)
            streams[stream] = Tokens(other.start.view(*shape), *turns)
        return streams

    def update(
        self,
        step: int,
        op: Launch,
        streams: dict[TokenStream, Tokens],
        coefficients: Buffer | None,
    ) -> BoundLaunch:
        """A launch of a plan, which writes to the next tokens of the streams that it changes."""
        if isinstance(op, Predict) and op.ahead:
            return self._predict_ahead(step, op, coefficients)
        if isinstance(op, Accumulate):
            return self._accumulate(step, op, coefficients)
        if isinstance(op, Residual):
            return self._residual(op, streams["image"].now)
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
        return self._launches.unit("collect", inputs, {"x_out": x_out})

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
            gate = self._modulation.gates_of_step(step + tap.ahead, op.feature, 1)
            accumulator = self._accumulator(op.stream, tap.accumulator)
            inputs[f"gate{index}"] = gate.view(rows, hidden)
            inputs |= {} if tap.starts else {f"a{index}": accumulator}
            outputs[f"a{index}_out"] = accumulator
        name = f"accumulate {op.feature}, {len(op.taps)} taps"
        return self._launches.predict(name, op.signature, inputs, outputs)

    def _predict_ahead(self, step: int, op: Predict, coefficients: Buffer | None) -> BoundLaunch:
        """Predict for a later step, into its accumulator; feature 0 starts it.

        All predictions for a step are made during one step, so the gates have as many rows as it.
        """
        zeros, accumulator = self._buffers.zeros, self._accumulator("image", op.ahead - 1)
        assert zeros is not None
        x = accumulator if op.feature else zeros.view(*self._feature)
        gates = self._modulation.gates_of_step(step + op.ahead, op.feature, len(op.predictions))
        return self._predict(op, x, accumulator, gates, coefficients)

    def _residual(self, op: Residual, x: Buffer) -> BoundLaunch:
        """Keep what all units added to the tokens of the step."""
        assert self._buffers.start is not None
        inputs = {"x": x, "start": self._buffers.start.view(*self._feature)}
        return self._launches.unit("residual", inputs, {"residual": self._slot("image", op.store)})

    def _compute(self, step: int, op: Compute, streams: dict[TokenStream, Tokens]) -> BoundLaunch:
        name = graph_of_step(self._plan, step, self._names[op.unit])
        unit = self._units[op.unit]
        offered, outputs = self._of_unit(op.unit), self._features(unit, op.stores)
        changed = {feature.stream for feature in unit.features}
        for stream, tokens in streams.items():
            offered[TOKENS[stream]] = tokens.now
            if stream in changed:
                _, outputs[f"{TOKENS[stream]}_out"] = tokens.advance()
        engine = self._launches.engines.units[name]
        return self._launches.engine(name, engine, taken(engine, offered), outputs)

    def _segment(self, op: Segment, streams: dict[TokenStream, Tokens]) -> BoundLaunch:
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
        engine = self._launches.engines.segments[op.signature]
        return self._launches.engine("segment", engine, taken(engine, offered), outputs)

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
            **{name: self._modulation.row(row) for name, row in self._rows_of_units[unit].items()},
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
        return self._launches.predict(name, op.signature, inputs, outputs)

    def _gates(self, op: Predict) -> Buffer:
        """The gates (count, B, D) of a launch that predicts in place; ones for a residual."""
        rows, hidden = self._batch.rows, self._spec.hidden
        if self._plan.schedule.level == "residual":
            assert self._buffers.ones is not None
            return self._buffers.ones.view(1, rows, hidden)
        return self._modulation.row(self._spec.modulation.gate(op.feature), len(op.predictions))

    def _of_captions(self, block: int) -> dict[str, Buffer]:
        """The tensors of the captions that a branch of a block may read."""
        batch, buffers = self._batch, self._buffers.captions
        if buffers is None:
            return {}
        rows = buffers.rows.view(batch.rows)
        return captions_of_block(
            self._spec, batch.captions, block, buffers.keys_values, buffers.bias, rows
        )
