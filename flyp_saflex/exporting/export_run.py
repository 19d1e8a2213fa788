"""Export of a run's model to a folder that other tools read: `flyp-saflex export RUN --to FORMAT --out DIR`.

The folder holds the model, classes.json, a model card and, of a run with a linear head, head.safetensors. It appears under its
name when it is complete. A new format is a function and a line in `FORMATS`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flyp_saflex.clip.model import save_clip
from flyp_saflex.errors import ConfigError, RunError, nearest
from flyp_saflex.evaluation.evaluate import check_start
from flyp_saflex.evaluation.load_run import classes_of, load_clip_run, open_run, own_data
from flyp_saflex.exporting import usage
from flyp_saflex.exporting.hub import push, repository
from flyp_saflex.exporting.model_card import model_card
from flyp_saflex.exporting.onnx_graph import check_onnx, save_onnx
from flyp_saflex.exporting.transformers_clip import check_architecture, save_transformers
from flyp_saflex.storage.files import write_json
from flyp_saflex.tasks.clip_task import ClipTask

HEAD = "head.safetensors"


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of exported models."""

    library: str
    """`library_name` of the Hub."""
    save: Callable[[ClipTask, Path], None]
    """Writes the model into an empty folder."""
    usage: str
    """Python that loads it and classifies an image."""
    head_usage: str = ""
    """The same with the linear head that lies beside the model."""
    check: Callable[[], None] = lambda: None
    """Checks that the packages that it needs are there."""
    check_task: Callable[[ClipTask], None] = lambda task: None
    """Checks that the format has the model's architecture, before a folder is made."""
    has_head: bool = False
    """Whether the model itself gives class logits."""


FORMATS: Mapping[str, Format] = {
    "open_clip": Format(
        library="open_clip",
        save=lambda task, folder: save_clip(task.clip, folder),
        usage=usage.OPEN_CLIP,
        head_usage=usage.OPEN_CLIP_HEAD,
    ),
    "transformers": Format(
        library="transformers",
        save=lambda task, folder: save_transformers(task.clip, folder),
        usage=usage.TRANSFORMERS,
        head_usage=usage.TRANSFORMERS_HEAD,
        check_task=lambda task: check_architecture(task.clip.config),
    ),
    "onnx": Format(
        library="onnx",
        save=lambda task, folder: save_onnx(task, folder / "model.onnx"),
        usage=usage.ONNX,
        check=check_onnx,
        has_head=True,
    ),
}


def export_run(
    run: Path,
    *,
    to: str,
    out: Path,
    push_to: str = "",
    licence: str = "",
    alpha: float = 1.0,
    overrides: Sequence[str] = (),
) -> Path:
    """Write the model of a run in another tool's format, and return the folder.

    Args:
        run: folder that `train` wrote.
        to: a name in `FORMATS`.
        out: a folder that does not exist yet, or is empty.
        push_to: `hf://USER/NAME` to upload it to; empty: nowhere.
        licence: identifier for the model card; empty: unknown.
        alpha: WiSE-FT's alpha of the weights.
        overrides: `section.field=value`, applied to the run's recipe.

    Raises:
        ConfigError: an unknown format, a folder in use, an address of another form, or a package that is missing.
        RunError: no usable run, a folder that cannot be written, or an upload that failed.
        ModelError: an architecture that the format lacks.
    """
    run, out = Path(run), Path(out)
    if to not in FORMATS:
        raise ConfigError(f"--to {to}: expected one of {', '.join(FORMATS)}{nearest(to, FORMATS)}")
    form = FORMATS[to]
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already, expected a new or empty folder; name another or remove it")
    if not licence.isprintable() or set(licence) & set(":#'\"[]{}"):
        raise ConfigError(f"--licence {licence!a}: expected an identifier of the Hub, for example apache-2.0 or cc-by-4.0")
    repo_id = repository(push_to) if push_to else ""
    form.check()
    config = open_run(run, tuple(overrides))
    if alpha != 1:
        check_start(config, (alpha,))
    classes = classes_of(run, *own_data(run, config))
    task = load_clip_run(run, config, classes, alpha=alpha)
    form.check_task(task)
    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        form.save(task, new)
        _write_head(task, new, form)
        write_json(
            new / "classes.json",
            {
                "class_names": list(classes.class_names),
                "templates": list(classes.templates),
                "preprocess": task.clip.config["preprocess_cfg"],
            },
        )
        beside = task.network.head is not None and not form.has_head
        told = {"library": form.library, "usage": form.head_usage if beside else form.usage, "licence": licence}
        card = model_card(run, config, classes, **told, alpha=alpha, has_head=beside or form.has_head)
        (new / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            out.rmdir()
        new.rename(out)
    except OSError as error:
        raise RunError(f"--out {out} cannot be written: {error.strerror or error}; choose another folder") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if repo_id:
        print(f"uploaded to {push(out, repo_id)} (a new repository is private)")
    return out


def _write_head(task: ClipTask, folder: Path, form: Format) -> None:
    """Write a linear head beside a model that gives embeddings only: logits = embeddings @ weight.T + bias."""
    if task.network.head is None or form.has_head:
        return
    from safetensors.torch import save_file

    state = {name: value.detach().cpu().contiguous() for name, value in task.network.head.state_dict().items()}
    save_file(state, folder / HEAD)
    print(f"note: the run has a linear head: {HEAD} holds it (logits = embedding of length one @ weight.T + bias)")
