"""LoRA (arXiv 2106.09685): trained low-rank updates beside frozen weight matrices, W + (alpha / rank) B A.

A is drawn as a linear layer's weight, B starts at zero, so that the model starts as it was. The update is a parametrization of
the weight (`torch.nn.utils.parametrize`): whatever reads the weight, open_clip's blocks or ours, reads the sum. `plain_state`
gives the sums under the plain names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flyp_saflex.errors import ModelError, nearest

ALL = "all"
"""Target that stands for every layer."""
IN_PROJ = "in_proj"
"""Target of the one matrix that gives query, key and value in `nn.MultiheadAttention`."""


class LowRank(nn.Module):
    """Parametrization W -> W + (alpha / rank) B A.

    Args:
        weight: the matrix [out, in].
        rank: of the update, at most that of the matrix.
        alpha: its scale is alpha / rank.
    """

    def __init__(self, weight: Tensor, *, rank: int, alpha: float) -> None:
        super().__init__()
        rows, columns = weight.shape
        rank = min(rank, rows, columns)
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, columns, dtype=weight.dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, dtype=weight.dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the updated matrix."""
        return weight + self.scale * (self.lora_B @ self.lora_A)


def add_lora(
    towers: dict[str, nn.Module], *, rank: int, alpha: float, targets: Sequence[str] = (ALL,), fixed: frozenset[int] = frozenset()
) -> int:
    """Add LoRA to the linear layers of towers, in place; return the number of matrices.

    Args:
        towers: modules by a name for people.
        rank: of every update.
        alpha: see `LowRank`.
        targets: last parts of names of layers (`c_fc`), `in_proj`, or `all`.
        fixed: identities of parameters that are frozen anyway and get no update.

    Raises:
        ModelError: a tower without a layer of these names; says the names that it has.
    """
    number = 0
    for tower, module in towers.items():
        layers = list(_layers(module))
        chosen = [layer for layer in layers if ALL in targets or layer[0] in targets]
        if not chosen:
            known = sorted({name for name, *_ in layers})
            hint = nearest(targets[0], known) if targets else ""
            raise ModelError(
                f"train.lora_targets = {', '.join(targets)}: the {tower} tower ({type(module).__name__}) has no such linear "
                f"layer, found {', '.join(known) or 'none at all'}{hint}: change train.lora_targets, or set "
                f"train.freeze_{tower}=true"
            )
        for _, owner, name in chosen:
            weight = getattr(owner, name)
            if id(weight) not in fixed:
                parametrize.register_parametrization(owner, name, LowRank(weight, rank=rank, alpha=alpha))
                number += 1
    return number


def is_adapter(name: str) -> bool:
    """Return whether a parameter's name is that of an update."""
    return name.endswith((".lora_A", ".lora_B"))


@torch.no_grad()
def plain_state(model: nn.Module) -> dict[str, Any]:
    """Return the state with every updated matrix merged under its plain name, in the order of the state."""
    state: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        owner, separator, rest = name.partition("parametrizations.")
        if not separator:
            state[name] = value
        elif rest.endswith(".original"):
            weight = rest.removesuffix(".original")
            state[owner + weight] = getattr(model.get_submodule(owner.removesuffix(".")), weight)
    return state


def is_attention(module: Any) -> bool:
    """Return whether a module is `nn.MultiheadAttention` itself, with or without LoRA."""
    kind = type(module)
    return kind is nn.MultiheadAttention or (parametrize.is_parametrized(module) and kind.__base__ is nn.MultiheadAttention)


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield target name, owner and attribute of every matrix that an update may go beside."""
    for name, part in module.named_modules():
        if isinstance(part, nn.MultiheadAttention) and part.in_proj_weight is not None:
            yield IN_PROJ, part, "in_proj_weight"
        elif isinstance(part, nn.Linear):
            yield name.rpartition(".")[2], part, "weight"
