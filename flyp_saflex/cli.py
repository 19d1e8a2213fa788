"""Command line: one function per command.

Each function imports the code of its command when it is called, so that `--help` loads no heavy library. Its
docstring is the help text of the command.

Exit codes: 0 success, 1 internal error (with a traceback), 2 mistake of the user (one line), 130 after Ctrl-C, 141 when the
reader of the output is gone (`| head`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flyp_saflex import extras, recipe, runtime
from flyp_saflex.arguments import Folder, VersionAction, parse_alphas, parse_shard
from flyp_saflex.config import Config
from flyp_saflex.errors import UserError
from flyp_saflex.tables import AVERAGES
from flyp_saflex.user_text import quoted

CLOSED_PIPE = 141
"""Exit code of a program whose output nobody reads any more, as a shell tells SIGPIPE."""
EPILOG = "Recipes: {}. Documentation of every option: flyp-saflex options [SECTION | WORD]; options by section: {}."


def data(arguments: argparse.Namespace, config: Config) -> None:
    """Check a dataset: counts per split, class and domain, image sizes, unreadable files, duplicates across splits.

    With --materialise, write resized copies of its images once; training and evaluation then read the copies. With
    --verify-cache, compare the edits of the cache with the sha256 values of their manifest instead; with --verify, the archive
    of iWildCam with its digest and official split sizes.
    """
    if arguments.verify is not None:
        from flyp_saflex.data.wilds_archive import verify

        verify(arguments.verify, config.data)
        return
    if arguments.verify_cache:
        from flyp_saflex.storage.verify_cache import verify_cache

        verify_cache(config)
        return
    from flyp_saflex.data.describe import describe

    describe(config, limit=arguments.limit, dry_run=arguments.dry_run, materialise=arguments.materialise)


def prompts(arguments: argparse.Namespace, config: Config) -> None:
    """Caption training images, summarise their domains, and write edit prompts to prompts/DATASET.NAME.toml."""
    from flyp_saflex.prompting.prompts import prompts as run

    run(config, force=arguments.force, limit=arguments.limit, dry_run=arguments.dry_run)


def generate(arguments: argparse.Namespace, config: Config) -> None:
    """Edit the training images with a diffusion model into the augment cache; run the command again to resume."""
    shard = parse_shard(arguments.shard)
    from flyp_saflex.editing.generate import generate as run

    parts = {"pilot": arguments.pilot, "plan_file": arguments.plan}
    run(config, shard=shard, limit=arguments.limit, dry_run=arguments.dry_run, **parts)


def plan(arguments: argparse.Namespace) -> None:
    """Print which edits of a run were kept, per text and class, and write a plan that generate --plan follows."""
    from flyp_saflex.editing.plan_run import plan as run

    run(arguments.run, arguments.out, floor=arguments.floor, explore=arguments.explore)


def filter(arguments: argparse.Namespace, config: Config) -> None:
    """Score the edits of the cache with ALIA's semantic and confidence filters; no edit is deleted."""
    from flyp_saflex.filtering.filter import filter_edits

    filter_edits(config, limit=arguments.limit, dry_run=arguments.dry_run)


def train(arguments: argparse.Namespace, config: Config) -> None:
    """Finetune a model, and write checkpoints, metrics and the model to a run folder."""
    from flyp_saflex.training.train import train as run

    path = arguments.run_dir or Path("runs") / f"{config.recipe}-seed{config.seed}"
    run(config, path, resume=arguments.resume, limit=arguments.limit, dry_run=arguments.dry_run)


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate a run on every split of its dataset, optionally with WiSE-FT weights; or the average of several runs."""
    alphas = None if arguments.wise_alphas is None else parse_alphas(arguments.wise_alphas)
    shared = {"wise_alphas": alphas, "overrides": arguments.set, "limit": arguments.limit, "dry_run": arguments.dry_run}
    if arguments.average:
        if arguments.on or arguments.wilds_submission or arguments.out is None:
            raise UserError("--average needs --out DIR, and goes without --on and --wilds-submission: evaluate DIR for those")
        from flyp_saflex.evaluation.average_runs import evaluate_average

        evaluate_average(arguments.runs, arguments.average, arguments.out, splits=arguments.split, **shared)
        return
    if len(arguments.runs) > 1 or arguments.out is not None:
        raise UserError("evaluate: several runs and --out go with --average NAME; without it give one run per command")
    if arguments.on:
        if arguments.split or arguments.wilds_submission:
            raise UserError("--on tests other sets: it goes without --split and --wilds-submission; give two commands")
        from flyp_saflex.evaluation.other_sets import evaluate_on

        evaluate_on(arguments.runs[0], arguments.on, **shared)
        return
    from flyp_saflex.evaluation.evaluate import evaluate as run

    run(arguments.runs[0], splits=arguments.split, wilds_submission=arguments.wilds_submission, **shared)


def predict(arguments: argparse.Namespace) -> None:
    """Write classes and calibrated probabilities of any images: a folder, a table of paths, or files; run again to resume."""
    from flyp_saflex.predicting.predict_images import PredictOptions, predict_images

    options = PredictOptions(
        out=arguments.out,
        top_k=arguments.top_k,
        embeddings=arguments.embeddings,
        issues=arguments.issues,
        calibrate_on=arguments.calibrate_on,
        wise_alpha=arguments.wise_alpha,
    )
    predict_images(
        arguments.run, arguments.images, options, overrides=arguments.set, limit=arguments.limit, dry_run=arguments.dry_run
    )


def export(arguments: argparse.Namespace) -> None:
    """Write the model of a run for open_clip, transformers or ONNX, with a model card; --push uploads it."""
    from flyp_saflex.exporting.export_run import export_run

    export_run(
        arguments.run,
        to=arguments.to,
        out=arguments.out,
        push_to=arguments.push,
        licence=arguments.licence,
        alpha=arguments.wise_alpha,
        overrides=arguments.set,
    )


def report(arguments: argparse.Namespace) -> None:
    """Compare runs over seeds (mean, spread, n, paired differences) as text, or as a page with plots and gallery."""
    from flyp_saflex.reporting.report import report as run

    run(arguments.runs, out=arguments.out, form=arguments.format, baseline=arguments.baseline, published=arguments.published)


def compare(arguments: argparse.Namespace, config: Config) -> None:
    """Say whether edits are worth having: run the conditions of [compare] with every seed, and report."""
    shard = parse_shard(arguments.shard)
    from flyp_saflex.comparison.compare import compare as run

    path = arguments.run_dir or Path("runs") / f"{config.recipe}-compare"
    run(config, path, shard=shard, limit=arguments.limit, dry_run=arguments.dry_run)


def demo(arguments: argparse.Namespace) -> None:
    """Run the whole method in minutes on synthetic images, without download or GPU."""
    from flyp_saflex.demo.demo import demo as run

    run(arguments.out, seeds=arguments.seeds)


def options(arguments: argparse.Namespace) -> None:
    """Explain options: name, type, default and meaning. Without SECTION or WORD, list the sections and their options."""
    from flyp_saflex.option_docs import describe

    print(describe(arguments.word))


def build_parser() -> argparse.ArgumentParser:
    """Build the argument parser of all commands."""
    epilog = EPILOG.format(", ".join(recipe.shipped()), ", ".join(recipe.SECTIONS))
    parser = argparse.ArgumentParser(
        prog="flyp-saflex",
        description="Finetune CLIP with FLYP, make augmented data safe with SAFLEX, evaluate out of distribution.",
        epilog=epilog,
    )
    parser.add_argument("--version", action=VersionAction, nargs=0, help="print the versions of flyp-saflex and its libraries")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="set an option; repeatable")
    shared.add_argument("--limit", type=int, metavar="N", help="use at most N images of each split (for a quick test)")
    shared.add_argument("--dry-run", action="store_true", help="run all checks, then stop")

    with_recipe = argparse.ArgumentParser(add_help=False, parents=[shared])
    with_recipe.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or the path of a .toml file")
    with_recipe.add_argument(
        "--run-dir", type=Folder("--run-dir"), metavar="DIR", help="folder of the run (default: runs/RECIPE-seedN)"
    )
    with_recipe.add_argument("--resume", action="store_true", help="resume the interrupted run in the folder")
    with_recipe.add_argument("--print-config", action="store_true", help="print every option with its meaning, then stop")

    def add(handler: object, parents: list[argparse.ArgumentParser]) -> argparse.ArgumentParser:
        name, doc = handler.__name__, (handler.__doc__ or "").strip()  # type: ignore[attr-defined]
        end = epilog if with_recipe in parents else None
        command = commands.add_parser(name, parents=parents, help=doc, description=doc, epilog=end)
        command.set_defaults(handler=handler)
        return command

    command = add(demo, [])
    command.add_argument("--out", type=Folder("--out"), default=Path("demo"), metavar="DIR", help="output folder (default: demo)")
    command.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat everything with N seeds (default: 1)")
    command = add(data, [with_recipe])
    command.add_argument(
        "--materialise", action="store_true", help="write resized copies into data.materialised; run again to resume"
    )
    command.add_argument("--verify-cache", action="store_true", help="compare the cache's images with the sha256 of their rows")
    command.add_argument("--verify", type=Path, metavar="ARCHIVE", help="check iWildCam's archive: digest and split sizes")
    command = add(prompts, [with_recipe])
    command.add_argument("--force", action="store_true", help="overwrite an existing file")
    command = add(generate, [with_recipe])
    command.add_argument("--shard", default="0/1", metavar="I/N", help="make the I-th of N parts (job arrays), I from 0")
    command.add_argument("--pilot", type=int, metavar="N", help="make N edits, evenly over classes, texts and strengths")
    command.add_argument("--plan", type=Folder("--plan"), metavar="FILE", help="make editor.budget edits as plan says")
    command = add(plan, [])
    command.add_argument("run", type=Folder("RUN"), metavar="RUN", help="run folder written by train")
    command.add_argument("--out", type=Folder("--out"), metavar="FILE", help="plan file (default: RUN/plan.json)")
    command.add_argument("--floor", type=float, default=0.1, metavar="F", help="least useful share of a cell (default: 0.1)")
    command.add_argument("--explore", type=float, default=0.1, metavar="E", help="part spread evenly (default: 0.1)")
    add(filter, [with_recipe])
    add(train, [with_recipe])
    command = add(evaluate, [shared])
    command.add_argument("runs", type=Folder("RUN"), nargs="+", metavar="RUN", help="run folder written by train")
    command.add_argument("--split", action="append", default=[], metavar="S", help="evaluate this split only; repeatable")
    command.add_argument("--wise-alphas", metavar="A,B,...", help="alphas of a WiSE-FT sweep, for example 0,0.25,0.5,0.75,1")
    command.add_argument(
        "--average", default="", metavar="NAME", help=f"average the runs' weights: {', '.join(AVERAGES)}; needs --out"
    )
    command.add_argument("--out", type=Folder("--out"), metavar="DIR", help="new run folder of the average")
    command.add_argument(
        "--on",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="test another set before and after finetuning: imagenet-v2, -r, -a, -sketch, -val, objectnet, or class folders",
    )
    command.add_argument(
        "--wilds-submission", action="store_true", help="write the prediction files of WILDS' leaderboard (iwildcam)"
    )
    command = add(predict, [shared])
    command.add_argument("run", type=Folder("RUN"), metavar="RUN", help="run folder written by train")
    command.add_argument(
        "images",
        type=Folder("IMAGES"),
        nargs="+",
        metavar="IMAGES",
        help="folder, .csv/.tsv/.parquet of paths, or images",
    )
    command.add_argument(
        "--out",
        type=Folder("--out"),
        default=Path("predictions.csv"),
        metavar="FILE",
        help="table, .csv or .parquet (default: predictions.csv)",
    )
    command.add_argument("--top-k", type=int, default=5, metavar="K", help="classes per image, most likely first (default: 5)")
    command.add_argument(
        "--embeddings", type=Folder("--embeddings"), metavar="FILE", help="write image features, .npz or .parquet"
    )
    command.add_argument(
        "--issues", type=Folder("--issues"), metavar="FILE", help="write likely label errors of labelled images, .csv or .parquet"
    )
    command.add_argument(
        "--calibrate-on",
        default="",
        metavar="S",
        help="select split for the temperature (default: the run's, where its data is there); none: no temperature",
    )
    command.add_argument("--wise-alpha", type=float, default=1.0, metavar="A", help="alpha of the WiSE-FT weights (default: 1)")
    command = add(export, [])
    command.add_argument("run", type=Folder("RUN"), metavar="RUN", help="run folder written by train")
    command.add_argument("--to", required=True, metavar="FORMAT", help="open_clip, transformers or onnx")
    command.add_argument("--out", type=Folder("--out"), required=True, metavar="DIR", help="new folder of the exported model")
    command.add_argument("--push", default="", metavar="hf://USER/NAME", help="upload the folder to the Hugging Face Hub")
    command.add_argument("--licence", default="", metavar="ID", help="licence for the model card, for example apache-2.0")
    command.add_argument("--wise-alpha", type=float, default=1.0, metavar="A", help="alpha of the WiSE-FT weights (default: 1)")
    command.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="set an option; repeatable")
    command = add(compare, [with_recipe])
    command.add_argument("--shard", default="0/1", metavar="I/N", help="run the I-th of N parts (job arrays), I from 0")
    command = add(report, [])
    command.add_argument("runs", type=Folder("RUN"), nargs="+", metavar="RUN", help="run folders that have been evaluated")
    command.add_argument("--out", type=Folder("--out"), metavar="FILE", help="output file; FILE.html is a self-contained page")
    command.add_argument(
        "--format", choices=("md", "csv", "json", "tex", "html"), default="md", help="default: as FILE ends, or md"
    )
    command.add_argument("--baseline", metavar="NAME", help="recipe to compare the others with, paired by seed")
    command.add_argument("--published", action="store_true", help="add published figures on the same data, marked as literature")
    command = add(options, [])
    command.add_argument("word", nargs="?", default="", metavar="SECTION | WORD", help="section, option, or word to look for")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # here, not at the interpreter's end, where a closed pipe cannot be caught
    except BrokenPipeError:
        if not runtime.output_is_closed():
            raise  # a pipe between processes of ours
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # for what the interpreter flushes at its end
        os.close(nowhere)
        return CLOSED_PIPE


def _told(error: UserError) -> int:
    print(f"flyp-saflex: {quoted(str(error), sys.maxsize)}", file=sys.stderr)
    return 2


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = build_parser().parse_args(argv)
        runtime.keep_freed_memory()
        if note := runtime.single_process_note(os.environ, sys.argv[1:] if argv is None else argv):
            print(f"note: {note}", file=sys.stderr)
        if hasattr(arguments, "recipe"):
            config = recipe.load(arguments.recipe, arguments.set)
            if arguments.print_config:
                print(recipe.dumps(config, comments=True), end="")
            else:
                arguments.handler(arguments, config)
        else:
            arguments.handler(arguments)
    except ModuleNotFoundError as error:
        refused = extras.explained(error, f"flyp-saflex {arguments.command}")
        if refused is None:
            raise
        return _told(refused)
    except UserError as error:
        return _told(error)
    except KeyboardInterrupt:
        print("flyp-saflex: interrupted", file=sys.stderr)
        return 130
    return 0
