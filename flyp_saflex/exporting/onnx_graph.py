"""Image tower and class head as an ONNX graph: images to class logits and embeddings.

Shapes: N images, S side in pixels, D embedding, K classes.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from flyp_saflex.clip.image_tower import ImageTower
from flyp_saflex.extras import require
from flyp_saflex.tasks.clip_task import ClipTask

OPSET = 18
NEEDED = ("onnx", "onnxscript")


class ImageClassifier(nn.Module):
    """Prepared images [N, 3, S, S] to logits [N, K] and embeddings [N, D] of length one."""

    columns_DK: Tensor
    bias: Tensor

    def __init__(self, task: ClipTask) -> None:
        super().__init__()
        self.visual = task.clip.model.visual
        self.tower = ImageTower(self.visual)
        columns_KD, scale, bias = task.class_head()
        self.register_buffer("columns_DK", (scale * columns_KD).T.contiguous())
        self.register_buffer("bias", bias.expand(len(columns_KD)).clone())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and embeddings."""
        embeddings_ND = normalize(self.tower(images), dim=-1)
        return embeddings_ND @ self.columns_DK + self.bias, embeddings_ND


def check_onnx() -> None:
    """Check that what torch's ONNX exporter needs is installed.

    Raises:
        ConfigError: it is not.
    """
    require("--to onnx", *NEEDED)


def save_onnx(task: ClipTask, path: Path) -> None:
    """Write the graph, opset 18, with any number of images per call.

    Args:
        task: model and classes.
        path: the file.

    Raises:
        ConfigError: a package is missing.
    """
    check_onnx()
    module = ImageClassifier(task).eval().cpu()
    size = task.clip.image_size_px
    example = torch.zeros(2, 3, size, size)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporter tells every operator that it has no translation for and does not need
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter, about its own use of torch
            torch.onnx.export(
                module,
                (example,),
                str(path),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits", "embeddings"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                external_data=False,
                verbose=False,
            )
    finally:
        logging.disable(disabled)
