"""Schedulers of diffusers: the one that the recipe names, with the noise levels that the model was trained with."""

from __future__ import annotations

from typing import Any

from flyp_saflex.editing.pipeline_files import reason
from flyp_saflex.errors import ConfigError, nearest
from flyp_saflex.offline import EditorConfig

SEEDLESS = "DPMSolverSDEScheduler"
"""A scheduler whose noise does not come from the generators that the pipeline is given."""


def check_scheduler(diffusers: Any, name: str) -> None:
    """Check the name before anything is loaded; the empty string, the model's own scheduler, is valid.

    Raises:
        ConfigError: diffusers has no such class, or its noise does not follow the seeds.
    """
    known = [entry for entry in dir(diffusers) if entry.endswith("Scheduler") and not entry.startswith("Flax")]
    if name and name not in known:
        raise ConfigError(
            f"editor.scheduler = {name}: diffusers has no such class{nearest(name, known)} (for example DDIMScheduler, "
            "EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler)"
        )
    if name == SEEDLESS:
        raise ConfigError(
            f"editor.scheduler = {name} draws noise that does not depend on the seed of an edit, so edits could not be repeated: "
            "use EulerAncestralDiscreteScheduler or DPMSolverMultistepScheduler"
        )


def make_scheduler(diffusers: Any, own: Any, settings: EditorConfig) -> Any:
    """Return the scheduler of the recipe with the configuration of the model's own one.

    Raises:
        ConfigError: the scheduler does not fit the model.
    """
    fitting = {other.__name__ for other in own.compatibles} | {type(own).__name__}
    if "DDIMScheduler" in fitting:
        fitting |= {"LCMScheduler", "TCDScheduler"}  # for distilled models; diffusers lists them nowhere
    usable = ", ".join(sorted(fitting - {SEEDLESS}))
    if settings.scheduler not in fitting:
        raise ConfigError(
            f"editor.scheduler = {settings.scheduler} does not fit editor.model = {settings.model}, which comes with "
            f"{type(own).__name__}; use one of {usable}"
        )
    try:
        return getattr(diffusers, settings.scheduler).from_config(own.config)
    # schedulers refuse another one's configuration with any of these: an absent library, a value, a combination
    except (ImportError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"editor.scheduler = {settings.scheduler} cannot be made from editor.model = {settings.model}'s settings "
            f"({reason(error)}); use another one of {usable}"
        ) from error
