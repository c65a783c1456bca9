"""The part of a sampler graph that applies a head, see `goc_deploy.samplers.head_features`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from goc_deploy.precision import DTYPE_OF_PRECISION, ELEMENT_TYPES, Precision
from goc_deploy.samplers.head import HeadForm
from goc_deploy.spec import ModelSpec

EPSILON = "1e-6"  # `goc_deploy.samplers.head_features.NORM_EPSILON`


def head_inputs(spec: ModelSpec, precision: Precision, form: HeadForm) -> list[str]:
    """The inputs that a head adds to a sampler graph, as ONNX text.

    They are head (F, P), output_1 ... (B, C_out, H, W): the model outputs of earlier computed
    steps, newest first. If the form reads tokens, also x (B, T, D), the tokens before the final
    layer, and tokens_1 ... (B, T, D), the normalised tokens of earlier computed steps.
    """
    output = f"float[B, {', '.join(map(str, spec.prediction))}]"
    inputs = [f"float[{form.width(spec)}, {form.cell_values(spec)}] head"]
    inputs += [f"{output} output_{age}" for age in range(1, form.outputs + 1)]
    if form.reads_tokens:
        names = ["x", *(f"tokens_{age}" for age in range(1, form.tokens + 1))]
        inputs += [f"{_tokens(spec, precision)} {name}" for name in names]
    return inputs


def head_outputs(spec: ModelSpec, precision: Precision, form: HeadForm) -> list[str]:
    """The outputs that a head adds: tokens (B, T, D), normalised, if later steps read them."""
    return [f"{_tokens(spec, precision)} tokens"] if form.tokens else []


def head_lines(spec: ModelSpec, precision: Precision, form: HeadForm) -> list[str]:
    """Nodes that add the correction to ``sampled``, which makes ``latents_out``.

    The constant 1 among the features is not a tensor: its weights are added to the product.
    """
    lines, names = _image_features(spec, form), ["image_features"]
    if form.reads_tokens:
        lines += _token_features(spec, precision, form)
        names += ["token_features"]
    if form.features == "squares":
        lines += ["token_squares = Mul(token_features, token_features)"]
        names += ["token_squares"]
    lines += [f"features = Concat<axis=-1>({', '.join(names)})"]
    return [*lines, *_product(spec, form), *_latents_of_cells(spec, form)]


def _tokens(spec: ModelSpec, precision: Precision) -> str:
    name = ELEMENT_TYPES[DTYPE_OF_PRECISION[precision]].onnx_name
    return f"{name}[B, {spec.tokens}, {spec.hidden}]"


def _image_features(spec: ModelSpec, form: HeadForm) -> list[str]:
    """The cells of the latents and of the conditional and unconditional model outputs."""
    outputs = ["prediction", *(f"output_{age}" for age in range(1, form.outputs + 1))]
    count, image = len(outputs), spec.latents
    images = 1 + 2 * count
    lines = [
        f"joined_outputs = Concat<axis=1>({', '.join(outputs)})",
        _shape("split_shape", [0, count, *spec.prediction]),
        "split_outputs = Reshape(joined_outputs, split_shape)",
        "output_axis = Constant<value = int64[1] {2}>()",
        "epsilons = Slice(split_outputs, first, channels, output_axis)",
        *_both_sides("epsilons", "output_sides", [0, count, 1, *image], [0, 2 * count, *image]),
        _shape("one_image", [0, 1, *image]),
        "as_image = Reshape(latents, one_image)",
        "images = Concat<axis=1>(as_image, output_sides)",
    ]
    if form.features == "scalar":
        return [
            *lines,
            _shape("values_shape", [0, images, math.prod(spec.latents)]),
            "values = Reshape(images, values_shape)",
            "image_features = Transpose<perm=[0, 2, 1]>(values)",
        ]
    rows, columns = spec.axes
    return [
        *lines,
        _shape("patches_shape", [0, images, spec.channels, rows, spec.patch, columns, spec.patch]),
        "patches = Reshape(images, patches_shape)",
        "by_token = Transpose<perm=[0, 3, 5, 1, 4, 6, 2]>(patches)",
        _shape("by_token_shape", [0, spec.tokens, images * form.cell_values(spec)]),
        "image_features = Reshape(by_token, by_token_shape)",
    ]


def _token_features(spec: ModelSpec, precision: Precision, form: HeadForm) -> list[str]:
    """The normalised tokens of this step and of earlier ones, of both sides."""
    names, lines = ["normal"], []
    for age in range(1, form.tokens + 1):
        names.append(f"wide_tokens_{age}")
        lines.append(f"wide_tokens_{age} = Cast<to=1>(tokens_{age})")
    count, tokens = len(names), spec.tokens
    # All tokens of a step side by side: (B, T, count * D), then (B, T, count, D).
    return [
        "wide_x = Cast<to=1>(x)",
        f"ones = Constant<value = float[{spec.hidden}] {{{', '.join(['1'] * spec.hidden)}}}>()",
        f"normal = LayerNormalization<axis=-1, epsilon={EPSILON}>(wide_x, ones)",
        *([f"tokens = Cast<to={_element(precision)}>(normal)"] if form.tokens else []),
        *lines,
        f"joined_tokens = Concat<axis=2>({', '.join(names)})",
        *_both_sides(
            "joined_tokens",
            "token_features",
            [0, tokens, count, 1, spec.hidden],
            [0, tokens, 2 * count * spec.hidden],
            axis=3,
        ),
    ]


def _element(precision: Precision) -> int:
    return ELEMENT_TYPES[DTYPE_OF_PRECISION[precision]].onnx


def _both_sides(
    source: str, target: str, spread: Sequence[int], joined: Sequence[int], axis: int = 2
) -> list[str]:
    """Pick the conditional and unconditional rows of a tensor, alternating along an axis."""
    sides = [f"{source}_{side}" for side in ("cond", "uncond")]
    lines = [_shape(f"{source}_spread", spread), _shape(f"{source}_joined", joined)]
    for name in sides:
        lines += [
            f"{name}_rows = Gather<axis=0>({source}, {name.rpartition('_')[2]}_rows)",
            f"{name} = Reshape({name}_rows, {source}_spread)",
        ]
    return [
        *lines,
        f"{source}_sides = Concat<axis={axis}>({', '.join(sides)})",
        f"{target} = Reshape({source}_sides, {source}_joined)",
    ]


def _product(spec: ModelSpec, form: HeadForm) -> list[str]:
    """The features times the head, as cells.

    With ``scaled``, the head has the weights of the features, then those of the features times the
    scale. Both are applied in one product, side by side, and the second is scaled afterwards.
    """
    values, width = form.cell_values(spec), form.width(spec)
    lines = ["columns = Identity(head)"]
    if form.scaled:
        width //= 2
        lines = [
            _shape("halves_shape", [2, width, values]),
            "halves = Reshape(head, halves_shape)",
            "side_by_side = Transpose<perm=[1, 0, 2]>(halves)",
            _shape("columns_shape", [width, 2 * values]),
            "columns = Reshape(side_by_side, columns_shape)",
        ]
    lines += [
        "weighted, constant = Split<axis=0>(columns, parts)",
        "product = MatMul(features, weighted)",
    ]
    lines.insert(0, _shape("parts", [width - 1, 1]))
    if not form.scaled:
        return [*lines, "cells = Add(product, constant)"]
    return [
        *lines,
        "both = Add(product, constant)",
        "plain, by_scale = Split<axis=-1, num_outputs=2>(both)",
        "zeroth = Constant<value = int64[1] {0}>()",
        "first_guidance = Gather<axis=1>(guidance, zeroth)",
        "last_axis = Constant<value = int64[1] {2}>()",
        "scale = Unsqueeze(first_guidance, last_axis)",
        "scaled = Mul(scale, by_scale)",
        "cells = Add(plain, scaled)",
    ]


def _latents_of_cells(spec: ModelSpec, form: HeadForm) -> list[str]:
    """Cells as latents, added to those of the sampler."""
    (rows, columns), patch, lines = spec.axes, spec.patch, []
    source = "cells"
    if form.features != "scalar":
        lines = [
            _shape("tokens_shape", [0, rows, columns, patch, patch, spec.channels]),
            "token_patches = Reshape(cells, tokens_shape)",
            "pixels = Transpose<perm=[0, 5, 1, 3, 2, 4]>(token_patches)",
        ]
        source = "pixels"
    return [
        *lines,
        _shape("latents_shape", [0, *spec.latents]),
        f"head_correction = Reshape({source}, latents_shape)",
        "latents_out = Add(sampled, head_correction)",
    ]


def _shape(name: str, sizes: Sequence[int]) -> str:
    values = ", ".join(map(str, sizes))
    return f"{name} = Constant<value = int64[{len(sizes)}] {{{values}}}>()"
