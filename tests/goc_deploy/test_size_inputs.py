"""Positions: the tables that diffusers computes, and the laws of turned queries and keys."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goc_deploy.size_inputs import rotary_angles, sine_table, size_shapes, size_tensors
from goc_deploy.spec import ModelSpec, Positions

COUNTS = st.integers(1, 6)


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
@pytest.mark.parametrize(("rows", "columns", "stretch"), [(4, 4, 1.0), (3, 7, 2.0), (9, 2, 0.5)])
def test_a_table_is_that_of_diffusers(rows: int, columns: int, stretch: float) -> None:
    embeddings = pytest.importorskip(
        "diffusers.models.embeddings", reason="diffusers comes with the judges extra"
    )
    theirs = embeddings.get_2d_sincos_pos_embed(
        48, (rows, columns), base_size=4, interpolation_scale=stretch, output_type="pt"
    )
    ours = sine_table(48, rows, columns, 4, stretch).reshape(-1, 48)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
@pytest.mark.parametrize(("rows", "columns"), [(4, 7), (9, 9), (1, 2)])
def test_a_sample_shows_the_middle_of_a_table_as_in_diffusers(rows: int, columns: int) -> None:
    embeddings = pytest.importorskip(
        "diffusers.models.embeddings", reason="diffusers comes with the judges extra"
    )
    theirs = embeddings.PatchEmbed(12, 12, 2, 4, 24, pos_embed_max_size=9)
    spec = ModelSpec(
        1, 24, 3, 96, 2, (rows, columns), 4, 10, False,
        positions=Positions("sine", stretch=9 / 6, table=9), max_grid=(9, 9),
    )  # fmt: skip
    expected = theirs.cropped_pos_embed(2 * rows, 2 * columns)[0].numpy()
    found = size_tensors(spec)["positions"]
    assert found.shape == size_shapes(spec)["positions"]
    np.testing.assert_allclose(found.reshape(-1, 24), expected, atol=1e-6)


@given(st.tuples(COUNTS, COUNTS, COUNTS), st.data())
def test_products_depend_on_distances_alone(
    axes: tuple[int, int, int], data: st.DataObject
) -> None:
    """Turning a query and a key by their positions leaves a function of the difference."""
    angles = rotary_angles(list(map(np.arange, axes)), (4, 2, 2), 10_000.0).reshape(*axes, 4)
    places = [tuple(data.draw(st.integers(0, n - 1)) for n in axes) for _ in range(2)]
    a, b = places
    distance = np.array(a) - np.array(b)
    whole = distance @ np.stack([angles_of_axis(i) for i in range(3)])
    np.testing.assert_allclose(angles[a] - angles[b], whole, atol=1e-9)


def angles_of_axis(axis: int) -> np.ndarray:
    """The angle of each pair for one step along an axis."""
    places = [np.arange(2 if i == axis else 1) for i in range(3)]
    return rotary_angles(places, (4, 2, 2), 10_000.0)[1]


def test_tensors_have_the_announced_shapes() -> None:
    image = ModelSpec(
        1, 48, 3, 96, 2, (3, 5), 4, 10, False, told_size=64,
        positions=Positions("sine", base=4), max_grid=(6, 6),
    )  # fmt: skip
    video = ModelSpec(
        1, 48, 3, 96, 2, (2, 3, 5), 4, 10, False,
        positions=Positions("rotary", widths=(8, 4, 4)), max_grid=(2, 6, 6),
    )  # fmt: skip
    streams = replace(
        video, grid=(3, 5), max_grid=(6, 6), caption_tokens=7,
        positions=Positions("rotary", widths=(8, 4, 4), turns_text=True),
    )  # fmt: skip
    for spec in (image, video, streams):
        shapes = {name: values.shape for name, values in size_tensors(spec).items()}
        assert shapes == size_shapes(spec)
    # A side of 4 tokens, 8 latent pixels, has 64 pixels; 3 and 5 tokens have 48 and 80.
    assert size_tensors(image)["told_size"].tolist() == [48, 80]


@pytest.mark.filterwarnings("ignore")  # of diffusers about itself
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("grid", [(3, 5), (4, 4), (7, 2)])
def test_text_follows_the_image_as_in_diffusers(grid: tuple[int, int], *, centered: bool) -> None:
    """`QwenEmbedRope`, whose image has one frame, with rows and columns from the middle or not."""
    theirs = pytest.importorskip(
        "diffusers.models.transformers.transformer_qwenimage",
        reason="diffusers comes with the judges extra",
    )
    widths = (4, 6, 6)
    of_image, of_text = theirs.QwenEmbedRope(10_000, list(widths), scale_rope=centered)(
        [(1, *grid)], max_txt_seq_len=7
    )
    spec = ModelSpec(
        1, 48, 3, 96, 2, grid, 4, 0, False, caption_tokens=7, max_grid=grid,
        positions=Positions("rotary", widths=widths, centered=centered, turns_text=True),
    )  # fmt: skip
    found = size_tensors(spec)
    for prefix, angles in (("", of_image), ("text_", of_text)):
        for part, name in ((angles.real, "cos"), (angles.imag, "sin")):
            np.testing.assert_allclose(found[prefix + name], part.numpy(), atol=2e-6)


def test_text_has_positions_on_an_axis_of_its_own() -> None:
    positions = Positions("rotary", widths=(4, 6, 6, 8), turns_text=True, text_axis=True)
    spec = ModelSpec(
        1, 48, 2, 96, 2, (3, 5), 4, 0, False, caption_tokens=7, positions=positions, max_grid=(3, 5)
    )
    tensors = size_tensors(spec)
    assert {name: values.shape for name, values in tensors.items()} == size_shapes(spec)
    np.testing.assert_array_equal(tensors["text_sin"][:, :8], 0)
    np.testing.assert_array_equal(tensors["sin"][:, 8:], 0)
    along = rotary_angles([np.arange(7)], (8,), positions.theta)
    np.testing.assert_allclose(tensors["text_sin"][:, 8:], np.sin(along), atol=1e-6)
