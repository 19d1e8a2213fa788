"""SAFLEX of an `nn.Module` classifier in any training loop, with the right parameters, losses and modes.

The validation gradient is that of the evaluated model (running statistics, no dropout). The augmented rows are differentiated as
the step sees them: where BatchNorm trains, a row's logits depend on the batch, so they are taken inside the joint batch of train
and augmented rows (`rows = "joint"`). Every pass runs on clones of the buffers, so no statistic moves.

Shapes: T train rows, A augmented rows, V validation rows, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from flyp_saflex.errors import ConfigError, nearest
from flyp_saflex.saflex.class_labels import class_labels, class_logits
from flyp_saflex.saflex.losses import VALIDATION_LOSSES
from flyp_saflex.saflex.modes import drops_at_random, evaluation_mode, trains_statistics
from flyp_saflex.saflex.saflex import Saflex

RowMode = Literal["auto", "joint", "eval"]
Dropout = Literal["refuse", "off"]
Function = Callable[[dict[str, Tensor]], Tensor]


class ModuleSaflex:
    """SAFLEX of one classifier, called once per training step.

    It reads the parameters and modes that the model has at each call, and changes neither, nor buffers, `.grad` and the random
    numbers of the loop.

    Args:
        model: takes a tensor of rows, returns logits [N, K], or one logit of a binary classifier, [N] or [N, 1].
        saflex: settings and state: `diagnostics`, `log_row()`, `state_dict()` ...; validation rows are what each call is given.
        head: name of the module whose parameters are the scope `head`; None: the last `nn.Linear`.
        rows: passes of augmented rows: `joint`: in one batch with the train rows, norms in the model's present mode; `eval`:
            in evaluation mode; `auto`: `joint` where batch statistics train.
        dropout: `refuse` a model that drops values at random in training, because the gains are not of the function that the
            step uses then; `off`: leave dropout out of the gains.

    Raises:
        ConfigError: unknown option; parameters that are lazy or not floating point; dropout; no head, or nothing trained in
            the scope; settings that need the trainer (evidence, permuted gains).
    """

    def __init__(
        self, model: nn.Module, saflex: Saflex, *, head: str | None = None, rows: RowMode = "auto", dropout: Dropout = "refuse"
    ) -> None:
        model = getattr(model, "_orig_mod", model)  # of torch.compile, which has no forward mode
        _check_choice("rows", rows, get_args(RowMode))
        _check_choice("dropout", dropout, get_args(Dropout))
        _check_settings(saflex)
        _check_parameters(model)
        self.model, self.saflex, self.rows, self.dropout = model, saflex, rows, dropout
        self._check_dropout()
        self.head = _find_head(model, head) if saflex.settings.scope == "head" or head is not None else None
        self._guessed = head is None
        self._num_classes = 0
        if not self.parameters:
            where = "the model" if saflex.settings.scope == "all" else f"the head '{self.head}'"
            raise ConfigError(f"for_module: no parameter of {where} is trained (requires_grad): the validation gradient is empty")

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Trained parameters of the settings' scope, by their names in the model."""
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        if self.saflex.settings.scope == "all":
            return dict(trained)
        of_head = {id(value) for value in self.model.get_submodule(self.head or "").parameters()}
        return {name: value for name, value in trained.items() if id(value) in of_head}

    def __call__(
        self, step: int, x_aug: Tensor, y_aug: Tensor, x_val: Tensor, y_val: Tensor, x_train: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return weights_A and labels_AK of the augmented rows; take the validation gradient first if it is due.

        Args:
            step: number of the optimiser step; the gradient is due every `refresh_every`.
            x_aug: augmented rows, of the shape that the model takes.
            y_aug: their labels: indices of any integer kind, [A] or [A, 1], or rows on the simplex [A, K].
            x_val: validation rows, all read when the gradient is due: a few hundred, drawn in turn, will do.
            y_val: their labels, indices.
            x_train: train rows of the same forward pass, for `joint`; None: the augmented rows are a batch of their own.

        Raises:
            ConfigError: labels that are not one class per row, or out of range; a model that returns no logits, whose last
                Linear layer is not its head, or that draws random numbers in training.
        """
        self._check_dropout()
        if not len(x_val):
            raise ConfigError("for_module: x_val has no rows: the validation gradient needs at least one")
        if not self._num_classes:
            self._num_classes = self._probe(x_val[:1])
        labels = class_labels(y_aug, self._num_classes, name="y_aug", num_rows=len(x_aug), device=x_aug.device, soft=True)
        parameters = self.parameters
        if self.saflex.settings.needs_gains and self.saflex.due(step):
            self.saflex.refresh(parameters, self.validation_loss_fn(x_val, y_val))
        if not len(x_aug) or not self.saflex.settings.needs_gains:
            dtype = next(iter(parameters.values())).dtype
            gains_AK = torch.zeros(len(x_aug), self._num_classes, dtype=dtype, device=x_aug.device)
            return self.saflex.solve(gains_AK, labels, agrees_A=torch.ones_like(gains_AK[:, 0], dtype=torch.bool))
        return self.saflex(self.rows_fn(x_aug, x_train), parameters, labels)

    def rows_fn(self, x_aug: Tensor, x_train: Tensor | None = None) -> Function:
        """Return the augmented rows' logits [A, K] as a function of the scope's parameters.

        Args:
            x_aug: as in a call, and so is `x_train`.
            x_train: see there.
        """
        joint = self.rows == "joint" or (self.rows == "auto" and trains_statistics(self.model))
        if not joint:
            return lambda parameters: self._logits(parameters, x_aug)
        x_all = x_aug if x_train is None else torch.cat([x_train, x_aug])
        return lambda parameters: self._logits(parameters, x_all, statistics=True)[len(x_all) - len(x_aug) :]

    def validation_loss_fn(self, x_val: Tensor, y_val: Tensor) -> Function:
        """Return the settings' validation loss, in evaluation mode, as a function of the scope's parameters.

        `validation_loss = "train"` is the cross entropy, which is what `joint_loss` trains on.
        """
        name = self.saflex.settings.validation_loss
        loss_of = VALIDATION_LOSSES["ce" if name == "train" else name]

        def loss_fn(parameters: dict[str, Tensor]) -> Tensor:
            logits_VK = self._logits(parameters, x_val)
            num_rows, num_classes = logits_VK.shape
            return loss_of(logits_VK, class_labels(y_val, num_classes, name="y_val", num_rows=num_rows, device=logits_VK.device))

        return loss_fn

    def _logits(self, parameters: dict[str, Tensor], inputs: Tensor, *, statistics: bool = False) -> Tensor:
        """Return logits at these parameters, all others constant, in evaluation mode, or with norms in their present mode."""
        with evaluation_mode(self.model, but_statistics=statistics):
            return class_logits(functional_call(self.model, self._state() | parameters, (inputs,)))

    def _state(self) -> dict[str, Tensor]:
        """Return the parameters without gradient, so that none outside of the scope is differentiated, and cloned buffers."""
        constants = {name: value.detach() for name, value in self.model.named_parameters()}
        return constants | {name: value.clone() for name, value in self.model.named_buffers()}

    def _check_dropout(self) -> None:
        if self.dropout == "off":
            return
        for name, module in self.model.named_modules():
            if module.training and drops_at_random(module):
                raise ConfigError(
                    f"for_module: the module '{name}' ({type(module).__name__}) drops values at random in training, so gains are "
                    'not those of the step: set its rate to 0, or pass dropout="off" to leave dropout out of the gains'
                )

    def _probe(self, x_1: Tensor) -> int:
        """Return the number of classes, from a pass in the model's present mode that must draw no random number."""
        devices = [x_1.device] if x_1.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            before = _random_states(x_1.device)
            logits = functional_call(self.model, self._state(), (torch.cat([x_1, x_1]),))  # BatchNorm refuses a single row
            drawn = any(not torch.equal(old, new) for old, new in zip(before, _random_states(x_1.device), strict=True))
        num_classes = class_logits(logits).shape[1]
        if drawn and self.dropout == "refuse":
            raise ConfigError(
                "for_module: the model draws random numbers in training (dropout in its forward?), so gains are not those of the "
                'step: remove it, or pass dropout="off" to take gains in evaluation mode'
            )
        head = self.model.get_submodule(self.head) if self.head is not None and self._guessed else None
        if isinstance(head, nn.Linear) and head.out_features != logits.numel() // len(logits):
            raise ConfigError(
                f"for_module: the last Linear layer '{self.head}' has {head.out_features} outputs, but the model gives "
                f"{num_classes} logits: name the module of the classes by head="
            )
        return num_classes


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"for_module: {name} = {value!r}: expected one of {', '.join(known)}{nearest(str(value), known)}")


def _check_parameters(model: nn.Module) -> None:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ConfigError(f"for_module: the model is wrapped in {type(model).__name__}: pass model.module")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ConfigError(f"for_module: parameter '{name}' is not initialised: run the model once before")
        if not parameter.is_floating_point():
            raise ConfigError(f"for_module: parameter '{name}' is {parameter.dtype}, expected floating point: make it a buffer")


def _check_settings(saflex: Saflex) -> None:
    settings = saflex.settings
    if settings.evidence or settings.weight_rule == "evidence":
        raise ConfigError(
            "for_module: evidence is taken by the trainer, of CLIP and cached edits: use a preset without, such as 'robust'"
        )
    if settings.permute_gains:
        raise ConfigError("for_module: saflex.permute_gains is a control experiment of the trainer: leave it out")


def _find_head(model: nn.Module, name: str | None) -> str:
    """Return the name of the head: the given one, or that of the last Linear layer in the order of registration."""
    modules = dict(model.named_modules())
    if name is not None:
        if name not in modules:
            raise ConfigError(f"for_module: head = {name!r}: the model has no such module{nearest(name, modules)}")
        return name
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError('for_module: the model has no Linear layer: name its last layer by head=, or pass scope="all"')
    return linear[-1]


def _random_states(device: torch.device) -> list[Any]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
