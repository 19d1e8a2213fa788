"""Copy-paste: the object's box of one training image on the background of another, with a feathered edge.

    area of the pasted box / area of the background  =  that of the object in its own image x 0.8 .. 1.25
    place: anywhere in the central square; over the background's own object, and large enough to cover it, where its box is known

The label is that of the pasted object. After Cut, Paste and Learn (arXiv 1708.01642) and Copy-Paste (arXiv 2012.07177), with
boxes instead of masks: a rim of the old background comes along.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from flyp_saflex.errors import ConfigError, DataError
from flyp_saflex.images.decode import stored_size
from flyp_saflex.images.picture import Picture
from flyp_saflex.images.preprocessing import size_with_shorter
from flyp_saflex.images.reader import ImageReader
from flyp_saflex.records import Sample, labels_of

SCALES = (0.8, 1.25)
"""Range of the random factor of the area."""
LARGEST = 0.9
"""Largest side of the pasted box, as a part of the central square."""
FEATHER = 0.06
"""Width of the feathered edge, as a part of the box's shorter side."""
TRIES = 10
"""Backgrounds that are tried where some cannot be read."""


class CopyPaste:
    """Reader of augmented rows: the object of a sample on another training image.

    A row depends on its sample and its seed alone. A sample without a box is read as it is.

    Args:
        samples: training images.
        reader: of images.
        image_size_px: side of the square that the model takes.
        same_class: take backgrounds of the sample's own class only.

    Raises:
        ConfigError: no training image has a box, or there is no other background for a class.
    """

    def __init__(self, samples: Sequence[Sample], reader: ImageReader, image_size_px: int, *, same_class: bool) -> None:
        self.samples, self.reader, self.image_size_px = samples, reader, image_size_px
        boxed = [sample.box is not None for sample in samples]
        self.num_without = boxed.count(False)
        if self.num_without == len(samples):
            raise ConfigError(
                "augment.upstream = copy-paste needs the objects' boxes, but no training image has one: set data.boxes to a JSON "
                "file of a detector, or data.box_columns (cub has its own)"
            )
        self._of_class: dict[int, list[int]] = {}
        for place, label in enumerate(labels_of(samples)):
            self._of_class.setdefault(label if same_class else 0, []).append(place)
        self._same_class = same_class
        if alone := [label for label, places in self._of_class.items() if len(places) < 2]:
            raise ConfigError(
                f"augment.paste: class {alone[0]} has one training image, so its object has no other background: set "
                "augment.paste=any"
            )

    def read(self, item: Sample, seed: int) -> Picture:
        """Return the picture of a row.

        Raises:
            DataError: the sample cannot be read, its box lies outside of it, or no background can be read.
        """
        if item.box is None:
            return self.reader.read(item)
        generator = np.random.default_rng(seed)
        own = self.reader.picture(item.image, box=item.box)
        width, height = stored_size(item.image)
        share = own.size[0] * own.size[1] / (width * height) * float(generator.uniform(*SCALES))
        place = generator.random(2)
        ground, covered = self._background(item, generator)
        square = min(ground.size)
        box = _target(own.size, share * ground.width * ground.height, square, covered)
        if covered is None:
            corner = [
                (side - square) / 2 + float(at) * (square - part) for side, at, part in zip(ground.size, place, box, strict=True)
            ]
        else:
            middle = ((covered[0] + covered[2]) / 2, (covered[1] + covered[3]) / 2)
            corner = [
                min(max(centre - part / 2, 0), side - part) for centre, part, side in zip(middle, box, ground.size, strict=True)
            ]
        ground.paste(own.resized(*box), (round(corner[0]), round(corner[1])), feathered(*box))
        return Picture.of(ground)

    def _background(
        self, item: Sample, generator: np.random.Generator
    ) -> tuple[Image.Image, tuple[float, float, float, float] | None]:
        """Return another training image at the model's size, and the edges of its own object in it."""
        places = self._of_class[item.label if self._same_class else 0]
        start, last = int(generator.integers(len(places))), ""
        for offset in range(min(len(places), TRIES)):
            other = self.samples[places[(start + offset) % len(places)]]
            if other.sample_id == item.sample_id:
                continue
            try:
                picture = self.reader.read(other)
                size = size_with_shorter(picture.size, self.image_size_px)
                ground = picture.resized(*size).copy()
                return ground, _edges(other, picture.size, ground.size)
            except DataError as error:
                last = str(error)
        raise DataError(f"no background for {item.sample_id} can be read: {last}")


def feathered(width: int, height: int) -> Image.Image:
    """Return a mask: 255 inside, falling to 0 at the edge."""
    rim = max(1, round(FEATHER * min(width, height)))
    mask = Image.new("L", (width, height), 0)
    if width > 2 * rim and height > 2 * rim:
        ImageDraw.Draw(mask).rectangle((rim, rim, width - rim - 1, height - rim - 1), fill=255)
        return mask.filter(ImageFilter.GaussianBlur(rim / 2))
    return Image.new("L", (width, height), 255)


def _edges(sample: Sample, size: tuple[int, int], new_size: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """Return left, top, right, bottom of a sample's box after resizing; None without a box, or if the image was turned."""
    if sample.box is None or stored_size(sample.image) != size:
        return None
    left, top, width, height = sample.box
    x, y = new_size[0] / size[0], new_size[1] / size[1]
    return left * x, top * y, (left + width) * x, (top + height) * y


def _target(
    size: tuple[int, int], area: float, square: int, covered: tuple[float, float, float, float] | None
) -> tuple[int, int]:
    """Return width and height of the pasted box: of this area, or larger to cover another box, within the square."""
    factor = (area / (size[0] * size[1])) ** 0.5
    if covered is not None:
        needed = max((covered[2] - covered[0]) / size[0], (covered[3] - covered[1]) / size[1])
        factor = max(factor, needed * (1 + 2 * FEATHER))  # the rim is half transparent
    factor = min(factor, LARGEST * square / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
