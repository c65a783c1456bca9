"""Show a comparison of plans in a terminal with colors, as half blocks.

A character cell shows two pixels. Nothing is printed where there is no such terminal, such as in
the log of a CI job.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from comparison_picture import Comparison, Images
from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.segment import Segment
from rich.style import Style

GAP = 2  # pixels between images


def show_comparison(comparison: Comparison) -> None:
    """Print a line of text and a strip of images per plan, and the differences below them."""
    console = Console(highlight=False)
    if not console.is_terminal or console.color_system is None:
        return
    for row in comparison.rows:
        line = f"[bold]{row.title}[/]  {row.seconds:.2f} s"
        images = [row.images if row.images.shape[-1] == 3 else row.images.repeat(3, axis=-1)]
        if row is not comparison.rows[0]:
            images.append(comparison.differences(row))
            line += (
                f"  {comparison.speed_up(row):.1f} x as fast, below: difference "
                f"x {comparison.amplification} (relative L2 {row.error:.3f})"
            )
        console.print(line)
        console.print(_Blocks(strip(images)))


def strip(rows: list[Images]) -> npt.NDArray[np.uint8]:
    """Images side by side, with a row for each element: (H, W, 3)."""
    gapped = [np.pad(row, ((0, 0), (0, GAP), (0, GAP), (0, 0))) for row in rows]
    return np.concatenate([np.concatenate(list(row), axis=1) for row in gapped])


class _Blocks:
    """Pixels (H, W, 3) as a renderable of rich, as wide as the console or the pixels."""

    def __init__(self, pixels: npt.NDArray[np.uint8]) -> None:
        self.picture = Image.fromarray(pixels)

    def __rich_console__(self, console: Console, _: object) -> Iterator[Segment]:
        width = min(console.width, self.picture.width)
        height = round(width * self.picture.height / self.picture.width / 2) * 2
        pixels = np.asarray(self.picture.resize((width, height), Image.Resampling.BOX))
        for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
            for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
                yield Segment(
                    "▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below))
                )
            yield Segment.line()
