"""Contact sheets: a grid of pictures with a text under each.

Pillow only. Every picture is fitted into a square cell: small ones are enlarged by a whole factor so that their pixels stay
visible, large ones are shrunk. A row may be shorter than the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from flyp_saflex.errors import DataError, RunError
from flyp_saflex.storage.files import atomic_write

CELL_PX = {192: 192, 10**9: 256}
"""Side of a cell, by the longest side of any picture up to which it holds."""
GAP_PX, FONT_PX, MAX_LINES = 8, 12, 4
MAX_SIDE_PX = 65_000  # JPEG ends at 65,535
PAPER, INK, EMPTY = (250, 250, 248), (30, 30, 30), (225, 225, 222)


@dataclass(frozen=True, slots=True)
class Tile:
    """One picture of a sheet.

    Attributes:
        image: the picture; None leaves its cell grey (an edit that was rejected, say).
        text: what is written under it, wrapped to at most four lines.
    """

    image: Image.Image | None
    text: str = ""


def contact_sheet(rows: Sequence[Sequence[Tile]], path: Path) -> None:
    """Write a sheet, one row of tiles under the other; the same tiles give the same file.

    Args:
        rows: the tiles; empty rows, and rows beyond what a JPEG can hold, are left out. No tile at all: an empty page.
        path: a `.jpg` or `.png`, replaced at once; its folder is made if missing.

    Raises:
        DataError: the file cannot be written.
    """
    sheet = draw_sheet(rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "wb") as file:
            sheet.save(file, format="PNG" if path.suffix.lower() == ".png" else "JPEG", quality=90)
    except (OSError, RunError) as error:
        cause = error.__cause__ if isinstance(error, RunError) else error
        reason = getattr(cause, "strerror", None) or cause
        raise DataError(f"contact sheet {path} cannot be written: {reason}; free disk space") from None


def draw_sheet(rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """Return the sheet that `contact_sheet` writes."""
    images = [tile.image for row in rows for tile in row if tile.image is not None]
    longest = max((max(image.size) for image in images), default=1)
    cell = next(cell for largest, cell in CELL_PX.items() if longest <= largest)
    font = ImageFont.load_default(FONT_PX)
    step = cell + GAP_PX
    rows = [row for row in rows if row][: MAX_SIDE_PX // (step + MAX_LINES * _line_px(font) + GAP_PX)]
    texts = [[_wrap(tile.text, cell, font) for tile in row[: MAX_SIDE_PX // step]] for row in rows]
    text_px = [max((len(lines) for lines in row), default=0) * _line_px(font) for row in texts]
    width = GAP_PX + step * max((len(row) for row in texts), default=1)
    sheet = Image.new("RGB", (width, GAP_PX + sum(step + height + GAP_PX for height in text_px)), PAPER)
    pen = ImageDraw.Draw(sheet)
    top = GAP_PX
    for tiles, lines, height in zip(rows, texts, text_px, strict=True):
        for column, (tile, text) in enumerate(zip(tiles, lines, strict=False)):
            left = GAP_PX + column * step
            if tile.image is None:
                pen.rectangle((left, top, left + cell - 1, top + cell - 1), fill=EMPTY)
            else:
                picture = fit(tile.image, cell)
                sheet.paste(picture, (left + (cell - picture.width) // 2, top + (cell - picture.height) // 2))
            for number, line in enumerate(text):
                pen.text((left, top + cell + 3 + number * _line_px(font)), line, fill=INK, font=font)
        top += step + height + GAP_PX
    return sheet


def fit(image: Image.Image, side_px: int) -> Image.Image:
    """Return an RGB picture whose longer side is at most `side_px`; small ones are enlarged by a whole factor."""
    factor = side_px // max(image.size)
    if factor >= 1:
        return image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = side_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _line_px(font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> int:
    top, bottom = font.getbbox("Ag")[1::2]
    return round(bottom - top) + 4


def _wrap(text: str, width_px: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """Break a text into lines of at most `width_px`, in words where possible; what does not fit ends in dots."""
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow without FreeType: its bitmap font knows Latin 1 only
        text = text.encode("latin-1", "replace").decode("latin-1")
    lines: list[str] = []
    left = [word for word in text.split() if word]
    line = ""
    while left and len(lines) <= MAX_LINES:
        word = left.pop(0)
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width_px:
            line = longer
        elif line:
            lines.append(line)
            left.insert(0, word)
            line = ""
        else:  # one word is too long: break it
            part = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width_px)
            lines.append(word[:part])
            left[:0] = [word[part:]] if word[part:] else []
    lines += [line] if line else []
    if len(lines) > MAX_LINES:
        last = lines[MAX_LINES - 1]
        while last and font.getlength(f"{last} ...") > width_px:
            last = last[:-1]
        lines = [*lines[: MAX_LINES - 1], f"{last.rstrip()} ..."]
    return lines
