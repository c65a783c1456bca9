"""The picture of `compare.py`: a card with a row of images per plan and a row of differences.

It is drawn at twice its size on the page, for sharp text, on a white card with round corners, so
that it fits pages of any color.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Images = npt.NDArray[np.uint8]

# All lengths are pixels of the file; a page shows the file at half its size.
WIDTH, MARGIN, RADIUS = 1760, 56, 24
LABELS, GAP, ROW_GAP, PLAN_GAP = 320, 16, 12, 48
TITLE, TIME, TEXT, NOTE = 40, 60, 30, 26
INK, MUTED, ACCENT, CARD, BORDER = "#1f2328", "#656d76", "#26517a", "#ffffff", "#d0d7de"
DIFFERENT = np.array([178, 58, 72])  # the color of a large difference; none is white
VIDEOS = 5  # dimensions
FRAME_MS, LAST_FRAME_MS = 160, 800
LARGEST_SHARE = 99.5  # percentile of the differences that the amplification keeps below the maximum


@dataclass(frozen=True, slots=True)
class Row:
    """What a plan made.

    Attributes:
        title: its name for readers.
        seconds: of all images.
        images: (N, H, W, 1 or 3) uint8, or (N, F, H, W, 3) of videos.
        error: relative L2 distance of its latents to those of the first plan.
    """

    title: str
    seconds: float
    images: Images
    error: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rows of plans on the same noise; the first is the reference.

    Attributes:
        rows: at least one.
        captions: one per image, or none.
        note: how the times were measured.
        amplified: the amplification of the differences, or None for the one that suits them.
    """

    rows: tuple[Row, ...]
    captions: tuple[str, ...]
    note: str
    amplified: int | None = None

    @property
    def frames(self) -> list[Comparison]:
        """The comparison of each frame of videos, all with one amplification; itself of images."""
        if self.rows[0].images.ndim < VIDEOS:
            return [self]
        return [
            replace(
                self,
                rows=tuple(replace(row, images=row.images[:, i]) for row in self.rows),
                amplified=self.amplification,
            )
            for i in range(self.rows[0].images.shape[1])
        ]

    @property
    def amplification(self) -> int:
        """The power of two that makes the differences visible and keeps nearly all unclipped."""
        if self.amplified is not None:
            return self.amplified
        largest = max(
            (
                float(np.percentile(_distance(row, self.rows[0]), LARGEST_SHARE))
                for row in self.rows
            ),
            default=0.0,
        )
        return 2 ** max(0, math.floor(math.log2(255 / largest))) if largest else 1

    def differences(self, row: Row) -> Images:
        """The amplified differences of a row from the first: (N, H, W, 3), white where equal."""
        shares = np.minimum(_distance(row, self.rows[0]) * (self.amplification / 255), 1)[..., None]
        return np.asarray(255 - shares * (255 - DIFFERENT), np.uint8)

    def speed_up(self, row: Row) -> float:
        return self.rows[0].seconds / row.seconds


def _distance(row: Row, reference: Row) -> npt.NDArray[np.int64]:
    """Largest difference of the channels of each pixel, 0..255: images without channels."""
    return np.abs(row.images.astype(np.int64) - reference.images).max(axis=-1)


def save(comparison: Comparison, path: Path) -> None:
    """Write the card of images, or of videos as an animation (.webp, of half the size)."""
    cards = [draw(frame) for frame in comparison.frames]
    if len(cards) > 1:
        cards = [card.reduce(2) for card in cards]
    cards[0].save(
        path,
        save_all=len(cards) > 1,
        append_images=cards[1:],
        duration=[FRAME_MS] * (len(cards) - 1) + [LAST_FRAME_MS],
        loop=0,
        optimize=True,
    )


def draw(comparison: Comparison) -> Image.Image:
    """Draw the card of images, with a transparent corner outside its round ones."""
    count = len(comparison.rows[0].images)
    size = (WIDTH - 2 * MARGIN - LABELS - (count - 1) * GAP) // count
    captions = [textwrap.wrap(text, max(1, size * 2 // TEXT)) for text in comparison.captions]
    lines = max((len(caption) for caption in captions), default=0)
    top = MARGIN + lines * (TEXT + 6) + (20 if lines else 0)
    others = len(comparison.rows) - 1
    bottom = top + size + others * (PLAN_GAP + 2 * size + ROW_GAP)
    card = Image.new("RGBA", (WIDTH, bottom + PLAN_GAP + NOTE + MARGIN - 12), (0, 0, 0, 0))
    pen = ImageDraw.Draw(card)
    pen.rounded_rectangle((0, 0, WIDTH - 1, card.height - 1), RADIUS, CARD, BORDER, 2)
    for i, caption in enumerate(captions):
        middle = MARGIN + LABELS + i * (size + GAP) + size // 2
        first = lines - len(caption)
        for line, text in enumerate(caption, first):
            place = (middle, MARGIN + line * (TEXT + 6))
            pen.text(place, text, MUTED, _font(TEXT), anchor="ma")
    for row in comparison.rows:
        _paste(card, row.images, size, top)
        _describe(pen, comparison, row, top)
        top += size
        if row is not comparison.rows[0]:
            top += ROW_GAP
            _paste(card, comparison.differences(row), size, top)
            middle = top + size // 2
            told = f"difference x {comparison.amplification}"
            pen.text((MARGIN, middle - 2), told, MUTED, _font(TEXT), anchor="ls")
            told = f"relative L2 {row.error:.3f}"
            pen.text((MARGIN, middle + 8), told, MUTED, _font(TEXT), anchor="la")
            top += size
        top += PLAN_GAP
    pen.text((MARGIN, top), comparison.note, MUTED, _font(NOTE))
    return card


def _describe(pen: ImageDraw.ImageDraw, comparison: Comparison, row: Row, top: int) -> None:
    pen.text((MARGIN, top), row.title, INK, _font(TITLE))
    pen.text((MARGIN, top + TITLE + 14), f"{row.seconds:.2f} s", ACCENT, _font(TIME))
    if row is not comparison.rows[0]:
        told = f"{comparison.speed_up(row):.1f} x as fast"
        pen.text((MARGIN, top + TITLE + TIME + 32), told, ACCENT, _font(TEXT))


def _paste(card: Image.Image, images: Images, size: int, top: int) -> None:
    for i, image in enumerate(images):
        pixels = image if image.shape[-1] == 3 else image.repeat(3, axis=-1)
        picture = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
        left = MARGIN + LABELS + i * (size + GAP)
        card.paste(picture, (left, top))
        box = (left - 1, top - 1, left + size, top + size)
        ImageDraw.Draw(card).rectangle(box, outline=BORDER)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which every machine has."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
