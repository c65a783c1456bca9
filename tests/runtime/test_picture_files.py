from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from goc_deploy.errors import ConflictError
from goc_deploy.runtime.picture_files import PictureFiles, finished_pictures

LABELS = [3, 1, 2, 0, 4]
RECORDS = [{"seed": 7, "image": i, "label": label} for i, label in enumerate(LABELS)]
IMAGES = np.arange(5 * 4 * 4, dtype=np.uint8).reshape(5, 4, 4, 1)


def drawn(output: Path, until: int = 5, error: type[BaseException] | None = None) -> None:
    with PictureFiles(output, LABELS, RECORDS) as files:
        for first in range(0, until, 2):
            files.add(first, IMAGES[first : min(first + 2, until)])
        if error:
            raise error


def test_a_directory_gets_each_picture_at_once_with_what_it_was_made_from(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path / "a" / "b", 4, KeyboardInterrupt)
    paths = sorted((tmp_path / "a" / "b").iterdir())
    assert [path.name for path in paths] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    with Image.open(paths[2]) as picture:
        np.testing.assert_array_equal(np.asarray(picture), IMAGES[2, ..., 0])
        assert picture.info["goc_deploy"] == '{"image": 2, "label": 2, "seed": 7}'


@pytest.mark.parametrize("name", ["a/s.png", "a/s.npz"])
def test_a_single_file_is_whole_or_absent(name: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        drawn(tmp_path / name, 4, KeyboardInterrupt)
    assert list(tmp_path.iterdir()) == []
    drawn(tmp_path / name)
    assert [path.name for path in (tmp_path / "a").iterdir()] == [Path(name).name]


def test_the_adm_file_has_three_channels_and_labels(tmp_path: Path) -> None:
    drawn(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as found:
        assert found["arr_0"].shape == (5, 4, 4, 3)
        np.testing.assert_array_equal(found["arr_0"][..., 2:], IMAGES)
        np.testing.assert_array_equal(found["arr_1"], LABELS)


def test_finished_pictures_are_counted_up_to_the_first_gap(tmp_path: Path) -> None:
    assert finished_pictures(tmp_path / "new", RECORDS) == 0
    drawn(tmp_path / "new")
    assert finished_pictures(tmp_path / "new", RECORDS) == 5
    (tmp_path / "new" / "0002.png").unlink()
    assert finished_pictures(tmp_path / "new", RECORDS) == 2


def test_pictures_of_something_else_are_refused(tmp_path: Path) -> None:
    drawn(tmp_path / "x")
    other = [{**record, "seed": 8} for record in RECORDS]
    with pytest.raises(ConflictError, match=r"0000.png was made with seed 7, not 8"):
        finished_pictures(tmp_path / "x", other)
    Image.new("L", (4, 4)).save(tmp_path / "x" / "0001.png")
    with pytest.raises(ConflictError, match=r"0001.png does not tell what it was made from"):
        finished_pictures(tmp_path / "x", RECORDS)
    (tmp_path / "x" / "0001.png").write_bytes(b"half")
    with pytest.raises(ConflictError, match=r"0001.png cannot be read"):
        finished_pictures(tmp_path / "x", RECORDS)


@pytest.mark.parametrize(
    ("place", "damage"),
    [
        (slice(8, 12), bytes(4)),  # length of the first chunk
        (slice(16, 24), b"\x00\x0f\xff\xff" * 2),  # width and height
        (slice(0, 8), b"no image"),
    ],
)
def test_a_damaged_picture_is_refused(place: slice, damage: bytes, tmp_path: Path) -> None:
    with PictureFiles(tmp_path / "series", [0], [{"seed": 1}]) as files:
        files.add(0, np.zeros((1, 4, 4, 1), np.uint8))
    path = tmp_path / "series" / "0000.png"
    content = bytearray(path.read_bytes())
    content[place] = damage
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(ConflictError, match=r"0000.png cannot be read \(.*remove it, and run"):
        finished_pictures(tmp_path / "series", [{"seed": 1}])
