"""Provenance chapter of the page: runs with times and devices, configurations, environments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flyp_saflex.reporting.html import (
    NOTHING,
    Markup,
    cell,
    details,
    element,
    join,
    listed_file,
    listing,
    paragraph,
    section,
    table,
)
from flyp_saflex.reporting.plots import glyph
from flyp_saflex.reporting.runs import Run, by_recipe
from flyp_saflex.reporting.seeds import differing

MACHINE = ("python", "platform", "processor", "cpu_count", "device", "processes")


def provenance_chapter(runs: Sequence[Run], baseline: str) -> Markup:
    """Return the chapter of runs and times, configurations and environments."""
    names = list(by_recipe(runs))
    header = ["run", "seed", "steps", "training", "per step", "evaluation", "device", "commit"]
    lines = []
    for run in runs:
        env = run.environment
        seconds, steps = (value if isinstance(value := env.get(name), (int, float)) else None for name in ("seconds", "steps"))
        per_step = f"{1000 * seconds / steps:.0f} ms" if seconds and steps else NOTHING
        lines.append(
            [
                join([Markup(glyph(names.index(run.recipe))), run.path], " "),
                run.seed,
                NOTHING if steps is None else steps,
                duration(seconds),
                per_step,
                duration(_evaluation_seconds(env)),
                _device(env),
                cell(str(env.get("commit") or NOTHING)[:10], class_="code"),
            ]
        )
    parts: list[object] = [table("Runs and times", header, lines)]
    parts += [element("h3", "Configurations"), *_configurations(runs, baseline)]
    parts += [element("h3", "Environments"), *_environments(runs)]
    return section("provenance", "What was run", *parts)


def duration(seconds: Any) -> str:
    """Return a duration as text (`48 s`, `5 h 20 min`); a dash if it is unknown."""
    if not isinstance(seconds, (int, float)):
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _evaluation_seconds(env: Mapping[str, Any]) -> float | None:
    stages = env.get("stage_seconds")
    parts = stages.get("evaluation") if isinstance(stages, dict) else None
    seconds = [value for value in parts.values() if isinstance(value, (int, float))] if isinstance(parts, dict) else []
    return sum(seconds) if seconds else None


def _device(env: Mapping[str, Any]) -> str:
    device = str(env.get("device") or env.get("processor") or NOTHING)
    device = "CPU" if device == "cpu" else device
    processes = env.get("processes", 1)
    return f"{processes} processes, {device}" if processes != 1 else device


def _configurations(runs: Sequence[Run], baseline: str) -> list[Markup]:
    groups = by_recipe(runs)
    reference = groups[baseline][0]
    parts = []
    for recipe, (run, *_) in groups.items():
        summary = join([recipe, element("span", f"config.toml of seed {run.seed}", class_="muted")], " ")
        inside: list[object] = []
        if run is not reference and run.config is not None and reference.config is not None:
            changed = [element("code", line) for line in differing(reference.config, run.config)]
            inside.append(paragraph(f"Differs from {baseline} in:" if changed else f"As {baseline}."))
            inside.append(listing(changed))
        inside.append(listed_file(run.config_text or "config.toml is missing", f"config.toml of {recipe}, seed {run.seed}"))
        parts.append(details(summary, *inside))
    return parts


def _environments(runs: Sequence[Run]) -> list[Markup]:
    """Return every distinct environment once, with its runs."""
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for run in runs:
        env = run.environment
        shown = {name: env[name] for name in MACHINE if env.get(name) is not None}
        packages = env.get("packages")
        shown |= packages if isinstance(packages, dict) else {}
        shown["commit"] = env.get("commit") or "not a checkout"
        groups.setdefault(repr(shown), (shown if env else {}, []))[1].append(f"{run.recipe}, seed {run.seed}")
    parts = []
    for number, (shown, names) in enumerate(groups.values(), start=1):
        who = names[0] if len(names) == 1 else f"{len(names)} runs"
        if not shown:
            parts.append(paragraph(f"{who}: no env.json."))
            continue
        lines = [[name, value] for name, value in shown.items()]
        inside = [table(f"Environment {number}, of {who}", ["what", "value"], lines, class_="left")]
        if len(groups) > 1 and len(names) > 1:
            inside.insert(0, paragraph("; ".join(names), class_="note"))
        versions = ", ".join(f"{name} {shown[name]}" for name in ("flyp-saflex", "torch", "python") if name in shown)
        parts.append(details(f"{who}: {versions}" if versions else who, *inside))
    return parts
