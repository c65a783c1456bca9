"""Render the emoji of captions.json into pictures.npz.

The source is the npm package of Fluent Emoji's flat style.

npm pack @iconify-json/fluent-emoji-flat@1.2.6
pip install resvg-py
python examples/emoji/render_pictures.py iconify-json-fluent-emoji-flat-1.2.6.tgz
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from captions import read_captions
from PIL import Image

HERE = Path(__file__).resolve().parent
ICONS = "package/icons.json"
OVERSAMPLING = 4


def read_icons(package: Path) -> dict[str, Any]:
    """The icon set in an npm package of iconify."""
    with tarfile.open(package) as archive:
        member = archive.extractfile(ICONS)
        if member is None:
            raise ValueError(f"{package}: {ICONS} is not a file")
        return dict(json.load(member))


def svg(icons: Mapping[str, Any], name: str) -> str:
    """One icon as a document of its own."""
    size = f'viewBox="0 0 {icons["width"]} {icons["height"]}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{icons["icons"][name]["body"]}</svg>'


def rendered(document: str, side: int) -> npt.NDArray[np.uint8]:
    """(side, side, 3) uint8 on white."""
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_string=document, width=side * OVERSAMPLING, background="#ffffff"
    )
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(
            image.convert("RGB").resize((side, side), Image.Resampling.BOX), dtype=np.uint8
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "package", type=Path, help=".tgz from npm pack @iconify-json/fluent-emoji-flat"
    )
    parser.add_argument("--side", type=int, default=48, help="pixels (default %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE / "pictures.npz")
    args = parser.parse_args(argv)
    icons = read_icons(args.package)
    names = list(read_captions())
    absent = [name for name in names if name not in icons["icons"]]
    if absent:
        parser.error(f"{args.package} has no {', '.join(absent)}; take the version of the README")
    pictures = np.stack([rendered(svg(icons, name), args.side) for name in names])
    np.savez_compressed(args.out, images=pictures, names=np.array(names))
    print(f"{args.out}: {len(names)} pictures of {args.side}x{args.side}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
