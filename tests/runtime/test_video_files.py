"""Videos as files: every frame in order, complete or absent, and refusals by name."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from goc_deploy.errors import EnvironmentUnsupportedError, UsageError
from goc_deploy.runtime.video_files import video_path, write_video

# Flat frames, which survive compression.
FRAMES = np.broadcast_to(
    np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [128, 128, 128], [0, 0, 0]], np.uint8)[
        :, None, None
    ],
    (5, 16, 24, 3),
)


def test_a_webp_has_every_frame_and_its_time(tmp_path: Path) -> None:
    write_video(tmp_path / "a" / "clip.webp", FRAMES, fps=16)
    with Image.open(tmp_path / "a" / "clip.webp") as clip:
        frames = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(clip)]
        assert clip.info["loop"] == 0
    assert np.abs(np.stack(frames).astype(int) - FRAMES).max() < 12
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["clip.webp"]


def test_a_folder_has_a_picture_per_frame(tmp_path: Path) -> None:
    write_video(tmp_path / "clip", FRAMES[..., :1])
    paths = sorted((tmp_path / "clip").iterdir())
    assert [path.name for path in paths] == [f"000{i}.png" for i in range(5)]
    with Image.open(paths[3]) as frame:
        np.testing.assert_array_equal(np.asarray(frame), FRAMES[3, ..., 0])


def test_an_mp4_has_every_frame_and_its_rate(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="av comes with the video extra")
    write_video(tmp_path / "clip.mp4", FRAMES, fps=12.5)
    with av.open(str(tmp_path / "clip.mp4")) as clip:
        assert clip.streams.video[0].average_rate == 12.5
        frames = [f.to_ndarray(format="rgb24") for f in clip.decode(video=0)]
    assert np.abs(np.stack(frames).astype(int) - FRAMES).max() < 12
    with pytest.raises(UsageError, match="an even width and height, got 23x16; write a"):
        write_video(tmp_path / "odd.mp4", FRAMES[:, :, 1:])
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(EnvironmentUnsupportedError, match=r"install 'goc_deploy\[video\]', or wri"):
        write_video(tmp_path / "clip.mp4", FRAMES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (FRAMES.astype(np.float32), 16, r"frames must be .* uint8, got \(5, 16, 24, 3\) float32"),
        (FRAMES[0], 16, r"got \(16, 24, 3\) uint8"),
        (FRAMES[:0], 16, "a video needs frames and up to 1000 of them per second, got 0 at 16"),
        (FRAMES, 0, "got 5 at 0"),
        (FRAMES, float("nan"), "got 5 at nan"),
    ],
)
def test_what_is_no_video_is_refused(
    tmp_path: Path, frames: np.ndarray, fps: float, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        write_video(tmp_path / "clip.webp", frames, fps)


def test_videos_of_a_series_are_numbered() -> None:
    assert video_path(Path("a/clip.mp4"), 0, 1) == Path("a/clip.mp4")
    assert video_path(Path("a/clip.mp4"), 3, 12) == Path("a/clip-0003.mp4")
    assert video_path(Path("a/clip"), 3, 12) == Path("a/clip-0003")
