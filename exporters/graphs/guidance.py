"""Guidance beyond the classifier-free one, as lines of the sampler graph."""

from __future__ import annotations

from dataclasses import dataclass

from goc_deploy.spec import ModelSpec

LEAST_SQUARE = 1e-30  # of a token that is all zeros
GUIDED = "guided"  # what the other lines of the sampler read


@dataclass(frozen=True, slots=True)
class GuidanceLines:
    """Parts of the sampler graph that make ``guided`` (N, C, H, W) of the model output.

    Attributes:
        inputs: more inputs of the graph.
        initializers: its initializers.
        lines: the lines, from ``epsilon`` (B, C, H, W), ``cond`` and ``uncond`` (N, C, H, W) and
            ``guidance`` (N, C).
    """

    inputs: str
    initializers: str
    lines: str


def guidance_lines(spec: ModelSpec) -> GuidanceLines:
    """Classifier-free guidance, then what a model adds to it or makes of it."""
    initializers, combined, rescaling = rescaled_guidance(spec)
    inputs, classifier_free, skipping = skip_layer_guidance(spec, combined)
    lines = [
        "difference = Sub(cond, uncond)",
        "weight = Unsqueeze(guidance, pixel_axes)",
        "correction = Mul(weight, difference)",
        f"{classifier_free} = Add(uncond, correction)",
        skipping,
        rescaling,
    ]
    return GuidanceLines(inputs, initializers, "\n".join(lines))


def rescaled_guidance(spec: ModelSpec) -> tuple[str, str, str]:
    """The lines that rescale the guided output of a model.

    Each token of it, C * patch * patch values, gets the norm of that of the conditional output. An
    image without guidance, whose two outputs are one, is not changed. Without a `guidance_norm`
    there are no lines.

    Returns:
        The initializers; the name of the output before it is rescaled; and the lines, from it and
        ``cond`` (N, C, H, W) to ``guided`` (N, C, H, W), float32.

    Source: the loop of diffusers' ``QwenImagePipeline``.
    """
    if spec.guidance_norm == "none":
        return "", GUIDED, ""
    factors = [1] * (len(spec.latents) - 1) + [spec.patch] * 2
    sizes = ", ".join(map(str, factors))
    sides = f"<float[{len(factors)}] sides = {{{sizes}}}>"
    lines = [
        "cond_squares = Mul(cond, cond)",
        "combined_squares = Mul(combined, combined)",
        "cond_sums = ReduceSum(cond_squares, channel_axis)",
        "combined_sums = ReduceSum(combined_squares, channel_axis)",
        "pixel_sums = Concat<axis=1>(cond_sums, combined_sums)",
        *_summed("pixel_sums", "row_sums", len(factors) - 2, spec.patch),
        *_summed("row_sums", "token_sums", len(factors) - 1, spec.patch),
        f"least = Constant<value_float = {LEAST_SQUARE}>()",
        "token_squares = Max(token_sums, least)",
        "kept_square, square = Split<axis=1, num_outputs=2>(token_squares)",
        "squared_ratio = Div(kept_square, square)",
        "token_ratio = Sqrt(squared_ratio)",
        'ratio = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric", '
        'nearest_mode = "floor">(token_ratio, , sides)',
        f"{GUIDED} = Mul(combined, ratio)",
    ]
    return sides, "combined", "\n".join(lines)


def skip_layer_guidance(spec: ModelSpec, result: str) -> tuple[str, str, str]:
    """The lines that add skip-layer guidance; none without `ModelSpec.skip_guidance_layers`.

    Args:
        spec: sizes of the model.
        result: name of the sum (N, C, H, W).

    Returns:
        The inputs: ``skipped_rows`` (N,), the row of each image without the skipped blocks, and
        ``skip_guidance`` (N, C) float32. The name of the output that classifier-free guidance makes
        (N, C, H, W). The lines from it, ``epsilon`` (B, C, H, W) and ``cond`` to ``result``.

    Source: the loop of diffusers' ``StableDiffusion3Pipeline``.
    """
    if not spec.skip_guidance_layers:
        return "", result, ""
    inputs = f"int64[N] skipped_rows, float[N, {spec.channels}] skip_guidance,"
    lines = [
        "skipped = Gather<axis=0>(epsilon, skipped_rows)",
        "skip_difference = Sub(cond, skipped)",
        "skip_weight = Unsqueeze(skip_guidance, pixel_axes)",
        "skip_correction = Mul(skip_weight, skip_difference)",
        f"{result} = Add(classifier_free, skip_correction)",
    ]
    return inputs, "classifier_free", "\n".join(lines)


def _summed(source: str, target: str, axis: int, count: int) -> list[str]:
    """Sums of ``count`` adjacent values along an axis, from slices that are ``count`` apart."""
    lines = [
        f"{target}_axis = Constant<value = int64[1] {{{axis}}}>()",
        f"{target}_step = Constant<value = int64[1] {{{count}}}>()",
        f"{target}_end = Constant<value = int64[1] {{{2**62}}}>()",
    ]
    total = ""
    for i in range(count):
        part = f"{target}_part_{i}"
        lines += [
            f"{part}_start = Constant<value = int64[1] {{{i}}}>()",
            f"{part} = Slice({source}, {part}_start, {target}_end, {target}_axis, {target}_step)",
        ]
        if total:
            lines.append(f"{part}_sum = Add({total}, {part})")
            part = f"{part}_sum"
        total = part
    return [*lines, f"{target} = Identity({total})"]
