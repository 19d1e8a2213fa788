"""Several processes: accelerator, gathering of features with gradient, one averaging of gradients per step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn

from flyp_saflex.config import Config
from flyp_saflex.errors import ConfigError
from flyp_saflex.runtime import process_state
from flyp_saflex.tasks.task import Processes
from flyp_saflex.training.batch_statistics import can_share


def processes_of(accelerator: Accelerator) -> Processes:
    """Return the communication of tensors in a step: none in a single process."""
    if accelerator.num_processes == 1:
        return Processes()
    return Processes(
        gather=accelerator.gather,
        gather_features=lambda features: gather_features(features, accelerator),
        rank=accelerator.process_index,
        count=accelerator.num_processes,
    )


def gather_features(features_ND: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the features of all processes, with gradient to this one's rows.

    Every process computes the loss of the whole batch. Text features are encoded everywhere, so their gradient is whole on
    each process; image features reach it through their own process only. The local gradient is multiplied by the number
    of processes, so that averaging over processes gives the gradient of a single process for both.
    """
    count = accelerator.num_processes
    scaled_ND = features_ND + (count - 1) * (features_ND - features_ND.detach())
    parts = list(accelerator.gather(features_ND.detach()).chunk(count))
    parts[accelerator.process_index] = scaled_ND
    return torch.cat(parts)


def statistics_note(network: nn.Module, config: Config, num_processes: int) -> list[str]:
    """Return a note where norms make several processes train otherwise than one; nothing where they do not."""
    own = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not can_share(module)
    ]
    if num_processes == 1 or config.train.freeze_batchnorm or not own:
        return []
    rows = config.train.batch_size // num_processes // config.train.accumulation
    return [
        f"{len(own)} norms (first: {own[0]}) normalise each process's own rows ({rows} training rows), so {num_processes} "
        "processes do not train what one trains; the main process's running statistics are kept. One process, or "
        "train.freeze_batchnorm=true, avoids it"
    ]


@contextmanager
def synchronised(accelerator: Accelerator, model: Any, *, last: bool) -> Iterator[None]:
    """Average gradients over processes in the last backward pass of a step only."""
    if last:
        yield
    else:
        with accelerator.no_sync(model):
            yield


def make_accelerator(config: Config, path: Path) -> Accelerator:
    """Return the accelerator: device, precision, processes, tracker.

    Raises:
        ConfigError: precision or tracker that this machine does not have, or rows that cannot be shared evenly.
    """
    options = config.train
    tracker = None if options.tracker == "none" else options.tracker
    process_state(options.process_timeout_s)
    AcceleratorState._reset_state()  # a run earlier in this process may have had another precision; keeps the processes
    try:
        accelerator = Accelerator(
            mixed_precision=options.precision,
            log_with=tracker,
            project_dir=str(path),
            dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"train.precision = {options.precision}, train.tracker = {options.tracker}: {str(error).splitlines()[0]}; "
            "choose another, or install the tracker (pip install 'flyp-saflex[tracking]')"
        ) from error
    rows = (options.batch_size, round(config.augment.per_train * options.batch_size) if config.augment.upstream else 0)
    share = accelerator.num_processes * options.accumulation
    if any(count % share for count in rows):
        raise ConfigError(
            f"{rows[0]} training and {rows[1]} augmented rows per step cannot be shared by "
            f"{accelerator.num_processes} processes x "
            f"{options.accumulation} parts: change train.batch_size, augment.per_train or train.accumulation"
        )
    return accelerator


def device_name(device: torch.device) -> str:
    """Return the name of a device for reports: that of the GPU, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
