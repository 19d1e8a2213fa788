"""ControlNet inputs: edges of a source (Canny), and the location of a ControlNet's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from flyp_saflex.editing.pipeline_files import HUB_ID, digest, reason
from flyp_saflex.errors import ModelError

USUAL_CONTROLNET = "lllyasviel/sd-controlnet-canny"
LOW, HIGH = 100, 200
"""Thresholds on the gradient's L1 norm of 8-bit grey values, those of the ControlNet model card."""


def canny(image: Image.Image) -> Image.Image:
    """Return the edges of an image, white on black, as RGB (Canny 1986, without smoothing, as OpenCV's `Canny`)."""
    grey_HW = np.asarray(image.convert("L"), dtype=np.int32)
    x_HW, y_HW = (ndimage.sobel(grey_HW, axis=axis, mode="nearest") for axis in (1, 0))
    norm_HW = np.abs(x_HW) + np.abs(y_HW)
    # Thinning: a pixel stays where its gradient is the largest along the gradient's direction, in four classes of 45 degrees.
    direction_HW = np.round(np.arctan2(y_HW, x_HW) / (np.pi / 4)).astype(int) % 4
    padded = np.pad(norm_HW, 1)
    height, width = grey_HW.shape
    thin_HW = np.zeros_like(norm_HW, dtype=bool)
    for direction, (down, right) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]
        behind = padded[1 - down : 1 - down + height, 1 - right : 1 - right + width]
        thin_HW |= (direction_HW == direction) & (norm_HW > behind) & (norm_HW >= ahead)
    weak_HW = thin_HW & (norm_HW > LOW)
    parts_HW, _ = ndimage.label(weak_HW, structure=np.ones((3, 3)))  # weak edges stay where they touch a strong one
    strong = np.unique(parts_HW[weak_HW & (norm_HW > HIGH)])
    edges_HW = np.isin(parts_HW, strong[strong > 0])
    return Image.fromarray((edges_HW * 255).astype(np.uint8)).convert("RGB")


def load_controlnet(diffusers: Any, name: str, dtype: Any) -> tuple[Any, dict[str, str]]:
    """Load a ControlNet from a folder or from the hub; return (model, {"controlnet": name @ version}).

    Raises:
        ModelError: neither a folder nor to be had from the hub, or no ControlNet.
    """
    folder, options = Path(name).expanduser(), {"dtype": dtype}
    try:
        if folder.is_dir():
            known, version = folder.resolve().name, digest(folder)
        elif HUB_ID.fullmatch(name):
            known, (_, version) = name, diffusers.ControlNetModel.load_config(name, return_commit_hash=True)
            options["revision"] = version
        else:
            raise ModelError(f"editor.controlnet = {name}: there is no such folder, and it is no hub id; check the spelling")
        model = diffusers.ControlNetModel.from_pretrained(folder if folder.is_dir() else name, **options)
        return model, {"controlnet": f"{known}@{version}"}
    except ModelError:
        raise
    except Exception as error:  # the hub's client and diffusers raise a dozen types
        raise ModelError(
            f"editor.controlnet = {name} cannot be loaded ({reason(error)}): give a folder or hub id of a ControlNetModel, for "
            f"example {USUAL_CONTROLNET}"
        ) from error
