"""Writing the frames of a video to a file, or to a folder of pictures."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from goc_deploy.disk import written
from goc_deploy.errors import EnvironmentUnsupportedError, UsageError
from goc_deploy.options import FRAMES_PER_SECOND, MAX_FRAMES_PER_SECOND
from goc_deploy.runtime.images import picture, pil_images
from goc_deploy.runtime.picture_files import picture_path

WEBP_QUALITY = 90
MP4_QUALITY = "18"  # CRF of H.264: visually lossless


def write_video(output: Path, frames: np.ndarray, fps: float = FRAMES_PER_SECOND) -> None:
    """Write a video.

    ``.mp4`` is H.264 and needs the extra ``video``; ``.webp`` is an animation that repeats. Any
    other name is a directory of ``0000.png``, ``0001.png``, .... A file appears complete or not at
    all, and so does each picture of a directory.

    Args:
        output: path of the file or directory.
        frames: (F, H, W, 1 or 3) uint8. An ``.mp4`` needs an even height and width.
        fps: frames per second.

    Raises:
        UsageError: the frames or ``fps`` are out of range.
        EnvironmentUnsupportedError: the extra ``video`` is not installed, or has no H.264.
        ConflictError, ResourceError: the system refuses to write.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] not in (1, 3):
        raise UsageError(
            f"frames must be (F, H, W, 1 or 3) uint8, got {frames.shape} {frames.dtype}"
        )
    if not len(frames) or not 0 < fps <= MAX_FRAMES_PER_SECOND:
        raise UsageError(
            f"a video needs frames and up to {MAX_FRAMES_PER_SECOND:g} of them per second, got "
            f"{len(frames)} at {fps!r:.60}"
        )
    suffix = output.suffix.lower()
    if suffix == ".mp4":
        _write_mp4(output, frames, fps)
    elif suffix == ".webp":
        first, *others = pil_images(frames)
        with written(output) as temporary:
            first.save(
                temporary,
                "WEBP",
                save_all=True,
                append_images=others,
                duration=_durations(len(frames), fps),
                loop=0,
                quality=WEBP_QUALITY,
            )
    else:
        for i, frame in enumerate(frames):
            with written(picture_path(output, i, len(frames))) as temporary:
                picture(frame).save(temporary, "PNG")


def check_video_output(output: Path) -> None:
    """Check, before frames are drawn, that this environment can write them.

    Raises:
        EnvironmentUnsupportedError: the extra ``video`` is not installed.
    """
    if output.suffix.lower() == ".mp4":
        _pyav(output)


def video_path(output: Path, index: int, total: int) -> Path:
    """The path of a video of a series: ``output`` itself if it is the only one.

    ``clip.mp4`` becomes ``clip-0000.mp4``, ``clip-0001.mp4``, ...
    """
    if total == 1:
        return output
    return output.with_name(f"{output.stem}-{index:0{max(4, len(str(total - 1)))}d}{output.suffix}")


def _durations(frames: int, fps: float) -> list[int]:
    """Milliseconds of each frame, whole numbers whose sum does not drift."""
    ends = [round(1000 * i / fps) for i in range(frames + 1)]
    return [max(1, after - now) for now, after in pairwise(ends)]


def _pyav(output: Path) -> Any:
    try:
        import av
    except ImportError as cause:
        raise EnvironmentUnsupportedError(
            f"writing {output} needs PyAV, which is not installed; run: "
            "pip install 'goc_deploy[video]', or write a .webp"
        ) from cause
    return av


def _write_mp4(output: Path, frames: np.ndarray, fps: float) -> None:
    av = _pyav(output)
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise UsageError(
            f"{output}: an .mp4 needs an even width and height, got {width}x{height}; write a "
            ".webp, or another size"
        )
    with written(output) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        try:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        except ValueError as cause:
            raise EnvironmentUnsupportedError(
                f"writing {output}: this PyAV has no H.264 encoder ({cause}); install the wheel "
                "from PyPI, or write a .webp"
            ) from cause
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": MP4_QUALITY}
        for frame in frames:
            _encode(container, stream, av.VideoFrame.from_ndarray(_rgb(frame), format="rgb24"))
        _encode(container, stream, None)


def _encode(container: Any, stream: Any, frame: Any) -> None:
    """Encode a frame, or what is left if it is None."""
    for packet in stream.encode(frame):
        container.mux(packet)


def _rgb(frame: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(frame, (*frame.shape[:2], 3)))
