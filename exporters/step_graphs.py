"""Graphs of a step that belong to no block: modulation rows, collecting predictions, guidance and the sampler update."""

from __future__ import annotations

import onnx
from onnx import ModelProto, parser

from goc_deploy.spec import ModelSpec

_HEADER = '<ir_version: 10, opset_import: ["" : 20], producer_name: "goc_deploy">\n'
_TYPES = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}


def modulation_graph(spec: ModelSpec, precision: str) -> ModelProto:
    """Pick the rows of one step's modulation table for the batch.

    Inputs: table (M, R, D), rows (B,) int64. Outputs: modulation (M, B, D).
    """
    dtype = _TYPES[precision]
    return _parse(
        f"""modulation ({dtype}[M, R, {spec.hidden}] table, int64[B] rows) => ({dtype}[M, B, {spec.hidden}] modulation)
        {{ modulation = Gather<axis=1>(table, rows) }}"""
    )


def collect_graph(spec: ModelSpec, precision: str) -> ModelProto:
    """Add what was predicted for a whole step ahead of time.

    Inputs: x (B, T, D), accumulated (B, T, D). Outputs: x_out (B, T, D).
    """
    feature = f"{_TYPES[precision]}[B, {spec.tokens}, {spec.hidden}]"
    return _parse(
        f"collect ({feature} x, {feature} accumulated) => ({feature} x_out) {{ x_out = Add(x, accumulated) }}"
    )


def sampler_graph(spec: ModelSpec) -> ModelProto:
    """Classifier-free guidance per channel, then one row of the sampler table, in float32.

    ``guided = uncond + guidance * (cond - uncond)``; ``latents_out = c0 * latents + c1 * guided + c2 * noise``.

    Inputs: latents (N, C, H, W), prediction (B, C_out, H, W), cond_rows and uncond_rows (N,) int64, guidance (C,),
    coefficients (3,), noise (N, C, H, W). Outputs: latents_out. Learned sigma channels are ignored.
    """
    latents = f"float[N, {spec.channels}, {spec.side}, {spec.side}]"
    return _parse(
        f"""sampler ({latents} latents, float[B, {spec.output_channels}, {spec.side}, {spec.side}] prediction,
            int64[N] cond_rows, int64[N] uncond_rows, float[{spec.channels}] guidance, float[3] coefficients,
            {latents} noise) => ({latents} latents_out)
        {{
            first = Constant<value = int64[1] {{0}}>()
            channels = Constant<value = int64[1] {{{spec.channels}}}>()
            channel_axis = Constant<value = int64[1] {{1}}>()
            per_channel = Constant<value = int64[4] {{1, {spec.channels}, 1, 1}}>()
            epsilon = Slice(prediction, first, channels, channel_axis)
            cond = Gather<axis=0>(epsilon, cond_rows)
            uncond = Gather<axis=0>(epsilon, uncond_rows)
            difference = Sub(cond, uncond)
            weight = Reshape(guidance, per_channel)
            correction = Mul(weight, difference)
            guided = Add(uncond, correction)
            c0, c1, c2 = Split<num_outputs=3>(coefficients)
            from_latents = Mul(c0, latents)
            from_model = Mul(c1, guided)
            from_noise = Mul(c2, noise)
            deterministic = Add(from_latents, from_model)
            latents_out = Add(deterministic, from_noise)
        }}"""
    )


def _parse(text: str) -> ModelProto:
    model = parser.parse_model(_HEADER + text)
    onnx.checker.check_model(model, full_check=True)
    return model
