from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goc_deploy.errors import UsageError
from goc_deploy.runtime.adm import adm_writer, open_adm, with_channels


def images(count: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 5, 4, channels)).astype(np.uint8)


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(1, 9), st.sampled_from([1, 3])
)
@settings(max_examples=25)
def test_what_is_written_in_batches_is_read_in_batches_by_us_and_by_numpy(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], at_a_time: int, channels: int
) -> None:
    path = tmp_path_factory.mktemp("adm") / "samples.npz"
    whole = images(sum(sizes), channels)
    with adm_writer(path, len(whole), 5, 4) as writer:
        first = 0
        for size in sizes:
            writer.add(whole[first : first + size], tuple(range(first, first + size)))
            first += size
    expected = np.broadcast_to(whole, (len(whole), 5, 4, 3))
    with np.load(path) as found:
        np.testing.assert_array_equal(found["arr_0"], expected)
        np.testing.assert_array_equal(found["arr_1"], np.arange(len(whole)))
    file = open_adm(path)
    assert file.shape == (len(whole), 5, 4, 3)
    parts = list(file.batches(at_a_time))
    assert max(map(len, parts)) <= at_a_time
    np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with adm_writer(tmp_path / "x.npz", 4, 5, 4) as writer:
            writer.add(images(2), (0, 1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(tmp_path.iterdir())


def test_reference_batches_with_statistics_and_compressed_files_are_read(tmp_path: Path) -> None:
    statistics = {
        "mu": np.zeros(3),
        "sigma": np.eye(3, dtype=np.float32),
        "mu_s": np.ones(2),
        "sigma_s": np.eye(2),
    }
    np.savez(tmp_path / "only.npz", **statistics)
    only = open_adm(tmp_path / "only.npz")
    assert only.shape is None
    assert only.statistics is not None
    assert only.spatial_statistics is not None
    assert only.spatial_statistics.mean.tolist() == [1, 1]
    np.savez_compressed(tmp_path / "both.npz", arr_0=images(3, 3), **statistics)
    both = open_adm(tmp_path / "both.npz")
    np.testing.assert_array_equal(next(both.batches(9)), images(3, 3))
    assert both.statistics is not None


def test_files_of_another_form_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for arrays, message in (
        ({"arr_0": images(2).astype(np.float32)}, r"arr_0 is float32 \[2, 5, 4, 1\]"),
        ({"arr_0": images(2, 4)}, "expected uint8"),
        ({"arr_0": images(2)[0]}, "expected uint8"),
        ({"arr_0": np.asfortranarray(images(2, 3))}, "expected uint8"),
        ({"other": np.zeros(1)}, "holds other; an ADM file has arr_0"),
        ({"mu": np.array([object()]), "sigma": np.eye(1)}, "cannot be read"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(UsageError, match=message):
            open_adm(path)
    path.write_text("text")
    with pytest.raises(UsageError, match="cannot be read as an"):
        open_adm(path)
    with pytest.raises(UsageError, match="cannot be read as an"):
        open_adm(tmp_path / "missing.npz")


def test_damage_behind_the_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, arr_0=images(50, 3))
    content = bytearray(path.read_bytes())
    content[1500] ^= 255
    path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read"):
        list(open_adm(path).batches(10))


def test_grey_pictures_survive_three_channels() -> None:
    grey = images(3)
    np.testing.assert_array_equal(with_channels(with_channels(grey, 3), 1), grey)
    assert with_channels(grey, 1) is grey
