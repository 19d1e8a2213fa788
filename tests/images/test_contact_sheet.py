"""Contact sheets: every tile is where it belongs, texts can be read and stay under their picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flyp_saflex.errors import DataError
from flyp_saflex.images.contact_sheet import GAP_PX, INK, MAX_SIDE_PX, PAPER, Tile, _wrap, contact_sheet, draw_sheet, fit


def plain(size: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.mark.parametrize(("side", "cell"), [(64, 192), (512, 256), (1, 192)])
def test_each_picture_is_in_its_cell(side: int, cell: int):
    colours = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200)]]
    sheet = draw_sheet([[Tile(plain((side, side), colour)) for colour in row] for row in colours])
    step = cell + GAP_PX
    assert sheet.width == GAP_PX + 2 * step
    assert sheet.getpixel((GAP_PX + cell // 2, GAP_PX + cell // 2)) == (200, 0, 0)
    assert sheet.getpixel((GAP_PX + step + cell // 2, GAP_PX + cell // 2)) == (0, 200, 0)
    assert sheet.getpixel((GAP_PX + cell // 2, GAP_PX + step + GAP_PX + cell // 2)) == (0, 0, 200)
    assert sheet.getpixel((GAP_PX + step + cell // 2, GAP_PX + step + GAP_PX + cell // 2)) == PAPER


def test_the_text_is_under_its_own_picture():
    image = plain((64, 64), (9, 200, 9))
    pixels = np.asarray(draw_sheet([[Tile(image), Tile(image, "put the deer in the snow")]])).astype(int)
    dark = np.argwhere(np.abs(pixels - INK).sum(axis=2) < 60)
    assert len(dark) > 50, "the letters are dark on light paper"
    assert dark[:, 0].min() >= GAP_PX + 192, "not over the picture"
    assert dark[:, 1].min() >= GAP_PX + 192 + GAP_PX, "under the second picture, not the first"


def test_long_texts_wrap_and_end_in_dots():
    from PIL import ImageFont

    font = ImageFont.load_default(12)
    for text in ("w" * 400, "put the deer in the snow " * 30, "grün 雪 " * 60):
        lines = _wrap(text, 192, font)
        assert len(lines) == 4
        assert lines[-1].endswith("...")
        assert all(font.getlength(line) <= 192 for line in lines)
    assert _wrap("", 192, font) == []
    assert _wrap("put the white-lipped peccary in the snow", 192, font) == ["put the white-lipped peccary in the", "snow"]


def test_small_pictures_keep_their_pixels_and_shapes_are_kept():
    tiny = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    assert np.array_equal(np.asarray(fit(tiny, 6))[::3, ::3], np.asarray(tiny))
    assert fit(plain((400, 100), (0, 0, 0)), 200).size == (200, 50)
    assert fit(plain((5000, 1), (0, 0, 0)), 200).size == (200, 1)
    assert fit(Image.new("L", (3, 3)), 9).mode == "RGB"


def test_missing_pictures_empty_rows_and_too_many_rows(tmp_path: Path):
    assert draw_sheet([]).size[0] > 0
    assert draw_sheet([[], [Tile(None, "rejected: monochrome")]]).getpixel((100, 120)) != PAPER
    assert draw_sheet([[Tile(plain((1, 1), (0, 0, 0)))]] * 400).height <= MAX_SIDE_PX
    contact_sheet([], tmp_path / "new" / "empty.jpg")
    with Image.open(tmp_path / "new" / "empty.jpg") as image:
        image.load()


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_the_file_is_the_same_twice_and_nothing_else_is_left(name: str, tmp_path: Path):
    rows = [[Tile(plain((64, 48), (10, 20, 30)), "source"), Tile(plain((64, 48), (90, 20, 30)), "in the snow")]]
    contact_sheet(rows, tmp_path / name)
    first = (tmp_path / name).read_bytes()
    contact_sheet(rows, tmp_path / name)
    assert (tmp_path / name).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with Image.open(tmp_path / name) as image:
        assert image.format == ("PNG" if name.endswith("png") else "JPEG")


def test_a_sheet_that_cannot_be_written_says_so(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"contact sheet .* cannot be written: .*; free disk space"):
        contact_sheet([], tmp_path / "file" / "a.jpg")
