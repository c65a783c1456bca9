"""Print a picture in the terminal.

A character cell shows two pixels if colours work, else one.

python examples/show.py digits.png
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image

RAMP = " .:-=+*#%@"


def half_blocks(picture: Image.Image, width: int) -> str:
    """The picture as coloured half blocks, ``width`` cells wide."""
    height = max(2, round(width * picture.height / picture.width) // 2 * 2)
    pixels = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BOX))
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m▀"
            for a, b in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def characters(picture: Image.Image, width: int) -> str:
    """The picture's brightness as characters; white (the gaps of a grid) is left blank."""
    height = max(1, round(width * picture.height / picture.width / 2))
    pixels = np.asarray(picture.convert("L").resize((width, height), Image.Resampling.BOX)).astype(
        int
    )
    return "\n".join(
        "".join(RAMP[value * len(RAMP) // 256] for value in row).rstrip() for row in pixels
    )


def main(argv: Sequence[str] | None = None) -> int:
    (path,) = sys.argv[1:] if argv is None else argv
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    width = min(shutil.get_terminal_size((120, 40)).columns, 140)
    with Image.open(path) as picture:
        print((half_blocks if coloured else characters)(picture, width))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
