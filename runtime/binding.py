"""A plan bound to addresses: the engine and the memory of every launch, before the step loop."""

from __future__ import annotations

import math

from goc_deploy.compiler import Plan
from goc_deploy.protocols import Buffer, Stream, taken
from goc_deploy.runtime.block_binding import BlockBinding, graph_of_step
from goc_deploy.runtime.bound import BoundLaunch, BoundPlan, BoundStep
from goc_deploy.runtime.buffers import Buffers, keys_values_shape
from goc_deploy.runtime.constants import aligned_size
from goc_deploy.runtime.head_binding import HeadBinding
from goc_deploy.runtime.model_engines import Engines, Launches
from goc_deploy.runtime.modulation_binding import ModulationBinding
from goc_deploy.runtime.request import Batch
from goc_deploy.runtime.skip_binding import SkipBinding
from goc_deploy.size_inputs import size_shapes
from goc_deploy.spec import ModelSpec


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
        self._engines, self._spec, self._plan, self._buffers = engines, spec, plan, buffers
        self._batch, self._stream, self._launches = batch, stream, Launches(engines, stream)
        self.modulation: ModulationBinding = ModulationBinding(
            buffers.modulation, spec, plan, batch, earlier.modulation if earlier else None
        )
        self._latents_shape = (batch.images, *spec.latents)
        self._of_size = {
            name: buffers.of_size[name].view(*shape) for name, shape in size_shapes(spec).items()
        }
        self._blocks = BlockBinding(
            self._launches, spec, plan, buffers, batch, self.modulation, self._of_size
        )
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
        computes_table = step % buffers.modulation.chunk == 0 or switches
        if computes_table and not self._engines.holds_table(self._plan):
            before.append(self._conditioning(step))
            if self._batch.skip_steps and self._skips is not None:
                table, steps = buffers.modulation.table, self.modulation.table_steps(step)
                before.append(self._skips.close_gates(table, steps, self._stream))
        fetched = self.modulation.lookahead.fetched[step]
        before += [self._pick_gates(step, later) for later in fetched]
        streams = self._blocks.streams()
        start = (*self._start(step), self._embed(step, streams["image"].now))
        ops = zip(self._plan.launches[step], buffers.coefficients[step], strict=True)
        updates = [self._blocks.update(step, op, streams, numbers) for op, numbers in ops]
        x, prediction = streams["image"].now, self._prediction(step)
        shift = self.modulation.row(spec.modulation.final_shift)
        scale = self.modulation.row(spec.modulation.final_scale)
        inputs = {"x": self._along_axes(x), "shift": shift, "scale": scale}
        final = self._launches.unit(
            self._of_set(step, "final"), inputs, {"prediction": self._in_patches(prediction)}
        )
        end = (final, self._sampler(step, prediction, x))
        return BoundStep(tuple(before), start, tuple(updates), end)

    def _of_set(self, step: int, name: str) -> str:
        """Name of a graph of the model with the weights that compute a step."""
        return graph_of_step(self._plan, step, name)

    def _embed(self, step: int, x: Buffer) -> BoundLaunch:
        """Turn the latents into the tokens x (B, T, D)."""
        offered = {
            "latents": self._in_patches(self._latents(step)),
            "rows": self._buffers.rows.images.view(self._batch.rows),
            **self._of_size,
        }
        name = self._of_set(step, "embed")
        inputs = taken(self._engines.units[name], offered)
        return self._launches.unit(name, inputs, {"x": self._along_axes(x)})

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
        used = self.modulation.used(step)
        target = self.modulation.row(used.start, len(used))
        return [self._pick_rows(step % self._buffers.modulation.chunk, used, target)]

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
            "cond_rows": buffers.rows.cond_rows.view(images),
            "uncond_rows": buffers.rows.uncond_rows.view(images),
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
        return self._launches.unit(table.graph, inputs, outputs)

    def _guidance(self, step: int) -> Buffer:
        """The guidance weights (N, C) of the set of weights that computes a step."""
        shape = (self._batch.images, self._spec.channels)
        second = self._plan.schedule.in_second_set(step)
        return self._buffers.guidance.view(*shape, start=math.prod(shape) if second else 0)

    def _conditioning(self, step: int) -> BoundLaunch:
        """Fill the modulation table for a chunk and the later steps whose gates it fetches."""
        rows, labels = self._buffers.rows, self._batch.labels
        offered = {
            "timesteps": self.modulation.timesteps(step),
            "guidance": self._buffers.embedded_guidance,
            **self._of_size,
        }
        if rows.pooled is None:
            offered["labels"] = rows.labels.view(labels)
        else:
            offered["pooled"] = rows.pooled.view(labels, self._spec.pooled_channels)
        name = self._of_set(step, "conditioning")
        inputs = taken(self._engines.units[name], offered)
        return self._launches.unit(name, inputs, {"table": self.modulation.table(step)})

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
            shape = (self._batch.rows, spec.tokens_of("text"), spec.hidden)
            outputs["text"] = self._buffers.text.start.view(*shape)
        name = self._of_set(step, "captions")
        return self._launches.unit(name, taken(self._engines.units[name], offered), outputs)

    def _references(self, step: int) -> BoundLaunch:
        """Turn the patches of the reference images into tokens, as often as `_captions`."""
        batch, spec, buffers = self._batch, self._spec, self._buffers
        shape = (batch.rows, spec.tokens_of("reference"), spec.hidden)
        assert buffers.patches is not None
        assert buffers.reference is not None
        patches = buffers.patches.view(batch.images, shape[1], spec.patch_values)
        inputs = {"patches": patches, "rows": buffers.rows.images.view(batch.rows)}
        outputs = {"reference": buffers.reference.start.view(*shape)}
        return self._launches.unit(self._of_set(step, "references"), inputs, outputs)

    def _pick_gates(self, step: int, later: int) -> BoundLaunch:
        """Expand the gates of a later step."""
        gates, place = self._spec.modulation.gates, self.modulation.table_steps(step).index(later)
        target = self.modulation.gates_of_step(later, 0, len(gates))
        return self._pick_rows(place, gates, target)

    def _pick_rows(self, place: int, used: range, target: Buffer) -> BoundLaunch:
        rows = self._buffers.rows.label_rows.view(self._batch.rows)
        inputs = {"table": self.modulation.table_rows(place, used), "rows": rows}
        return self._launches.unit("modulation", inputs, {"modulation": target})
