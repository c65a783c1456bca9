"""Graphs of a step outside the blocks: modulation, sums and differences of tokens, the sampler."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import ModelProto, parser

from goc_deploy.exporters.graphs.guidance import guidance_lines
from goc_deploy.exporters.graphs.head import head_inputs, head_lines, head_outputs
from goc_deploy.precision import DTYPE_OF_PRECISION, ELEMENT_TYPES, Precision
from goc_deploy.samplers import MAX_LAGS, SamplerTable
from goc_deploy.samplers.head import HeadForm
from goc_deploy.spec import ModelSpec

_HEADER = '<ir_version: 10, opset_import: ["" : 20], producer_name: "goc_deploy">\n'


def modulation_graph(spec: ModelSpec, precision: Precision) -> ModelProto:
    """Expand the modulation table of one step to the rows of the batch.

    Inputs: table (M, R, D), rows (B,) int64. Outputs: modulation (M, B, D).
    """
    dtype = _onnx_name(precision)
    return _parse(
        f"""modulation ({dtype}[M, R, {spec.hidden}] table, int64[B] rows)
            => ({dtype}[M, B, {spec.hidden}] modulation)
        {{ modulation = Gather<axis=1>(table, rows) }}"""
    )


def collect_graph(spec: ModelSpec, precision: Precision) -> ModelProto:
    """Add the accumulator of a collapsed step, whose predictions were made ahead.

    Inputs: x (B, T, D), accumulated (B, T, D). Outputs: x_out (B, T, D).
    """
    feature = f"{_onnx_name(precision)}[B, {token_dimension(spec)}, {spec.hidden}]"
    return _parse(
        f"""collect ({feature} x, {feature} accumulated) => ({feature} x_out)
        {{ x_out = Add(x, accumulated) }}"""
    )


def residual_graph(spec: ModelSpec, precision: Precision) -> ModelProto:
    """What all units of a step added to the tokens, for plans that predict the residual.

    Inputs: x (B, T, D), the tokens after all units, and start (B, T, D), those before them.
    Outputs: residual (B, T, D). The difference is computed in float32, for which every backend has
    a kernel.
    """
    feature = f"{_onnx_name(precision)}[B, {token_dimension(spec)}, {spec.hidden}]"
    return _parse(
        f"""residual ({feature} x, {feature} start) => ({feature} residual)
        {{
            wide_x = Cast<to=1>(x)
            wide_start = Cast<to=1>(start)
            difference = Sub(wide_x, wide_start)
            residual = CastLike(difference, x)
        }}"""
        if precision != "fp32"
        else f"""residual ({feature} x, {feature} start) => ({feature} residual)
        {{ residual = Sub(x, start) }}"""
    )


def token_dimension(spec: ModelSpec) -> int | str:
    """The number of tokens in a graph, or the name of that dimension if it is dynamic."""
    return "T" if spec.any_size or spec.streams[1:] else spec.tokens


def _onnx_name(precision: Precision) -> str:
    return ELEMENT_TYPES[DTYPE_OF_PRECISION[precision]].onnx_name


def sampler_graphs(spec: ModelSpec) -> dict[str, ModelProto]:
    """The sampler graphs that `goc_deploy.samplers.table.SamplerTable.graph` may name, by name."""
    graphs = {
        f"sampler_lag{lags}" if lags else "sampler": sampler_graph(spec, lags=lags)
        for lags in range(MAX_LAGS + 1)
    }
    return (
        {**graphs, "sampler_learned": sampler_graph(spec, learned=True)}
        if spec.learn_sigma
        else graphs
    )


def head_graph(spec: ModelSpec, precision: Precision, table: SamplerTable) -> ModelProto:
    """The sampler graph of a table that has a head."""
    assert table.head is not None
    return sampler_graph(
        spec,
        lags=table.lags,
        learned=table.learned_variance,
        head=table.head.form,
        precision=precision,
    )


def sampler_graph(
    spec: ModelSpec,
    *,
    lags: int = 0,
    learned: bool = False,
    head: HeadForm | None = None,
    precision: Precision = "fp32",
) -> ModelProto:
    """Classifier-free guidance per image and channel, then a row of the sampler table, in float32.

    ``guided = uncond + guidance * (cond - uncond)`` and
    ``latents_out = c0 * latents + c1 * guided + c2 * noise``. In between, ``guided`` is rescaled as
    `ModelSpec.guidance_norm` has it. With `ModelSpec.skip_guidance_layers`,
    ``skip_guidance * (cond - skipped)`` is added to ``guided`` before, and skipped_rows (N,) int64
    and skip_guidance (N, C) are inputs too.

    Inputs: latents (N, C, H, W), prediction (B, C_out, H, W), which is the model output, cond_rows
    and uncond_rows (N,) int64, guidance (N, C), coefficients (3 + ...,), noise (N, C, H, W), and
    estimate_1 ... (N, C, H, W). Outputs: latents_out (N, C, H, W), and with lags also estimate (N,
    C, H, W).

    Args:
        spec: sizes of the model.
        lags: number of earlier estimates that are read. If there are any, ``estimate = c3 * latents
            + c4 * guided`` is an output, and ``c5 * estimate_1 + c6 * estimate_2`` is added to
            ``latents_out``.
        learned: whether the noise is scaled by ``exp(c3 * variance)``. The variance is in the sigma
            channels of the conditional rows, which are ignored otherwise.
        head: form of the head whose correction is added to ``latents_out``, or None. Its inputs and
            outputs are those of `head_inputs` and `head_outputs`.
        precision: precision of the tokens that a head reads.
    """
    latents = _float_images(spec, "N", spec.channels)
    axes = range(2, 2 + len(spec.sample))
    earlier = [f"estimate_{lag}" for lag in range(1, lags + 1)]
    names = ["c0", "c1", "c2"] + ["spread"] * learned + ["e0", "e1"] * bool(lags)
    names += [f"w_{name}" for name in earlier]
    inputs = [f"{latents} {name}" for name in earlier]
    outputs = [f"{latents} {name}" for name in ("latents_out", *(["estimate"] if lags else []))]
    if head is not None:
        inputs += head_inputs(spec, precision, head)
        outputs += head_outputs(spec, precision, head)
    result = "latents_out" if head is None else "sampled"
    correction = [] if head is None else head_lines(spec, precision, head)
    guidance = guidance_lines(spec)
    return _parse(
        f"""sampler ({latents} latents,
            {_float_images(spec, "B", spec.output_channels)} prediction,
            int64[N] cond_rows, int64[N] uncond_rows,
            float[N, {spec.channels}] guidance, {guidance.inputs} float[{len(names)}] coefficients,
            {", ".join([f"{latents} noise", *inputs])}) =>
            ({", ".join(outputs)}) {guidance.initializers}
        {{
            first = Constant<value = int64[1] {{0}}>()
            channels = Constant<value = int64[1] {{{spec.channels}}}>()
            channel_axis = Constant<value = int64[1] {{1}}>()
            pixel_axes = Constant<value = int64[{len(axes)}] {{{", ".join(map(str, axes))}}}>()
            epsilon = Slice(prediction, first, channels, channel_axis)
            cond = Gather<axis=0>(epsilon, cond_rows)
            uncond = Gather<axis=0>(epsilon, uncond_rows)
            {guidance.lines}
            {", ".join(names)} = Split<num_outputs={len(names)}>(coefficients)
            from_latents = Mul(c0, latents)
            from_model = Mul(c1, guided)
            {_scaled_noise(spec, learned=learned)}
            deterministic = Add(from_latents, from_model)
            {_with_history(earlier, result)}
            {" ".join(correction)}
        }}"""
    )


def _float_images(spec: ModelSpec, rows: str, channels: int) -> str:
    """The type of latents or model outputs in a graph."""
    sample = ("F", "H", "W")[-len(spec.sample) :] if spec.any_size else spec.sample
    return f"float[{rows}, {channels}, {', '.join(map(str, sample))}]"


def _scaled_noise(spec: ModelSpec, *, learned: bool) -> str:
    """The lines of the sampler that scale the noise, with the learned variance or without it."""
    if not learned:
        return "from_noise = Mul(c2, noise)"
    return f"""last = Constant<value = int64[1] {{{2 * spec.channels}}}>()
            variances = Slice(prediction, channels, last, channel_axis)
            variance = Gather<axis=0>(variances, cond_rows)
            exponent = Mul(spread, variance)
            factor = Exp(exponent)
            scaled_noise = Mul(factor, noise)
            from_noise = Mul(c2, scaled_noise)"""


def _with_history(earlier: Sequence[str], result: str) -> str:
    """The last lines of the sampler: the new estimate, and the sum over the earlier estimates."""
    if not earlier:
        return f"{result} = Add(deterministic, from_noise)"
    lines = [
        "e_latents = Mul(e0, latents)",
        "e_model = Mul(e1, guided)",
        "estimate = Add(e_latents, e_model)",
    ]
    total = "deterministic"
    for name in earlier:
        lines += [
            f"from_{name} = Mul(w_{name}, {name})",
            f"with_{name} = Add({total}, from_{name})",
        ]
        total = f"with_{name}"
    return "\n".join([*lines, f"{result} = Add({total}, from_noise)"])


def _parse(text: str) -> ModelProto:
    model = parser.parse_model(_HEADER + text)
    onnx.checker.check_model(model, full_check=True)
    return model
