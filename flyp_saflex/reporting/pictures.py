"""Pictures of the page: thumbnails as data URIs, and the images of a run's dataset by their sample_id."""

from __future__ import annotations

import base64
import io
import warnings
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageOps

from flyp_saflex.errors import DataError, UserError
from flyp_saflex.images.decode import Place, formats, open_image
from flyp_saflex.records import Sample
from flyp_saflex.reporting.runs import Run

SIZE_PX = 144
"""Longest side of a thumbnail; smaller images stay as they are."""
NO_CONFIG = "config.toml cannot be read, so it is not known where the images are."


def thumbnail(path: Place, size_px: int = SIZE_PX) -> str:
    """Return a small WebP of an image as a data URI; the empty string if the image cannot be read."""
    try:
        with warnings.catch_warnings(), open_image(path) as file, Image.open(file, formats=formats()) as image:
            warnings.simplefilter("ignore")  # odd metadata is no reason to have no picture
            image.draft("RGB", (2 * size_px, 2 * size_px))
            small = ImageOps.exif_transpose(image).convert("RGB")
            small.thumbnail((size_px, size_px))
            buffer = io.BytesIO()
            small.save(buffer, format="WEBP", quality=80)
    except (DataError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def sample_thumbnail(sample: Sample | None) -> str:
    """Return the thumbnail of a sample; the empty string for none, and for a row of a table."""
    return thumbnail(sample.image) if sample and not isinstance(sample.item, int) else ""


def samples_of(run: Run) -> tuple[dict[str, Sample], str]:
    """Return the samples of a run's dataset by sample_id, and a remark where the dataset cannot be read.

    The paths are those in the run's configuration.
    """
    from flyp_saflex.data.registry import load_dataset

    if run.config is None:
        return {}, NO_CONFIG
    data = run.config.data
    there = replace(
        data,
        root=resolve(data.root, run.path),
        prompts=resolve(data.prompts, run.path),
        table=data.table and resolve(data.table, run.path),
    )
    try:
        dataset = load_dataset(there, seed=run.seed, check_files=False)
    except (UserError, OSError) as error:
        return {}, f"The dataset cannot be read, so the source images are not shown: {error}"
    return {sample.sample_id: sample for split in dataset.splits.values() for sample in split.samples}, ""


def resolve(path: str, run: Path) -> str:
    """Return a path of a run's configuration as it is read from the current folder.

    A relative path starts at the folder where training was started. If it does not exist from the current folder, the parents
    of the run's folder are tried, the nearest first.
    """
    if not path or Path(path).is_absolute() or Path(path).exists():
        return path
    return next((str(above / path) for above in run.resolve().parents if (above / path).exists()), path)
