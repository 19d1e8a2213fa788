"""Network of two views of each image, with every view's other views as its proxy classes (Eq. 12).

    images -> trunk -> pooled_NF -> projection -> embeddings_ND -> logits_NC = cosines / temperature, C = N - 1

Column j of row i is view j, or view j + 1 from j = i on: a view is no proxy class of itself.

Shapes: N views of all processes, V validation pairs, C = N - 1 columns, F pooled width, D embedding.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from flyp_saflex.saflex.losses import at_least_float32, nt_xent_partners, view_logits
from flyp_saflex.tasks.label_space import Gather, LabelSpace, Rows, ValidationSpace, augmented_rows
from flyp_saflex.tasks.network import Network, Outputs


class ViewOutputs(Outputs):
    """Outputs whose columns are the rows themselves."""

    __slots__ = ()

    def logits(self, images_ND: Tensor | None = None, columns_C: Tensor | None = None) -> Tensor:
        """Return the logits [N, N - 1] of views over the other views, in float32 under autocast too.

        Args:
            images_ND: embeddings of all processes' views; None: this pass's own.
            columns_C: unused: columns are all other views, in order.
        """
        images_ND = self.images_ND if images_ND is None else images_ND
        with torch.autocast(images_ND.device.type, enabled=False):
            return self.scale * view_logits(images_ND, 1.0)


class ViewNetwork(Network):
    """A trunk with a projection of two linear layers (SimCLR, arXiv 2002.05709).

    Args:
        trunk: images -> pooled features [N, F].
        width: F.
        projection: D.
        temperature: of the logits.
    """

    relates_rows: ClassVar[bool] = True

    def __init__(self, trunk: nn.Module, width: int, projection: int, temperature: float) -> None:
        super().__init__(trunk)
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection))
        self.temperature = temperature

    def pool(self, hidden: Tensor) -> Tensor:
        """Return pooled features [N, F] of images, or [V, 2, F] of pairs [V, 2, 3, S, S]."""
        assert self.trunk is not None
        pairs = hidden.ndim == 5
        pooled = self.trunk(hidden.flatten(0, 1) if pairs else hidden)
        return pooled.unflatten(0, hidden.shape[:2]) if pairs else pooled

    def project(self, pooled_NF: Tensor) -> Tensor:
        """Return embeddings [N, D]; of pairs [2V, D], all first views before all second ones."""
        if pooled_NF.ndim == 3:
            pooled_NF = pooled_NF.transpose(0, 1).flatten(0, 1)
        return at_least_float32(self.projection(pooled_NF))

    def forward(self, inputs: Tensor, tokens_CL: Tensor | None = None, from_pooled: bool = False) -> ViewOutputs:
        """Embed views, or pairs of them.

        Args:
            inputs: images [N, 3, S, S], pairs [V, 2, 3, S, S], or their pooled features with `from_pooled`.
            tokens_CL: unused.
            from_pooled: start behind the pooling: the head scope of SAFLEX.
        """
        pooled_NF = inputs if from_pooled else self.pool(inputs)
        images_ND = self.project(pooled_NF)
        scale = images_ND.new_tensor(1 / self.temperature)
        return ViewOutputs(pooled_NF, images_ND, images_ND, scale, images_ND.new_zeros(()))

    def relate(self, images_ND: Tensor) -> Tensor:
        """Return the logits [N, N - 1] of embeddings."""
        return view_logits(images_ND, self.temperature)


def view_space(rows: Rows, gather: Gather) -> LabelSpace:
    """Return every view's other views as its proxy classes.

    A process holds T training views, then the second views of the same images in the same order.

    Args:
        rows: this process's rows.
        gather: concatenation over processes.
    """
    num_train = rows.num_train
    assert len(rows.labels_N) == 2 * num_train, "every image has two views"
    augmented_N = augmented_rows(rows, gather)
    places_N = torch.arange(len(augmented_N), device=augmented_N.device)
    partners_N = places_N + torch.where(augmented_N, -num_train, num_train)
    columns_C = places_N[:-1]
    upstream_NC = one_hot(partners_N - (partners_N > places_N).long(), len(columns_C)).float()
    return LabelSpace(columns_C, columns_C, columns_C, _no_tokens(), upstream_NC, augmented_N)


def pair_space(num_pairs: int, device: torch.device) -> ValidationSpace:
    """Return the label space of V pairs, all first views before all second ones."""
    columns_C = torch.arange(2 * num_pairs - 1, device=device)
    return ValidationSpace(_no_tokens(), columns_C, one_hot(nt_xent_partners(num_pairs, device), len(columns_C)).float())


def _no_tokens() -> Tensor:
    return torch.empty(0, 0, dtype=torch.long)
