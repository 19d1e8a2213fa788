"""Command line: one function per command.

Each function imports the code of its command when it is called, so that `--help` loads no heavy library. Its
docstring is the help text of the command.

Exit codes: 0 success, 1 internal error (with a traceback), 2 mistake of the user (one line), 130 after Ctrl-C, 141 when the
reader of the output is gone (`| head`).
"""

from __future__ import annotations

import argparse
import os
import platform
import select
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from flyp_saflex import __version__, recipe, runtime
from flyp_saflex.config import Config
from flyp_saflex.errors import UserError
from flyp_saflex.user_text import quoted

CLOSED_PIPE = 141
"""Exit code of a program whose output nobody reads any more, as a shell tells SIGPIPE."""
EPILOG = "Recipes: {}. Documentation of every option: flyp-saflex options [SECTION | WORD]; options by section: {}."
VERSIONS = {"torch": "torch", "open_clip": "open_clip_torch", "diffusers": "diffusers"}
"""Libraries that `--version` tells the versions of, with the names of their packages."""


def data(arguments: argparse.Namespace, config: Config) -> None:
    """Check a dataset: counts per split, class and domain, image sizes, unreadable files, duplicates across splits.

    With --materialise, write resized copies of its images once; training and evaluation then read the copies. With
    --verify-cache, compare the edits of the cache with the sha256 values of their manifest instead.
    """
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

    run(config, shard=shard, limit=arguments.limit, dry_run=arguments.dry_run)


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
    """Evaluate a run on every split of its dataset, optionally with WiSE-FT weights between pretrained and finetuned."""
    alphas = None if arguments.wise_alphas is None else parse_alphas(arguments.wise_alphas)
    from flyp_saflex.evaluation.evaluate import evaluate as run

    run(
        arguments.run,
        splits=arguments.split,
        wise_alphas=alphas,
        overrides=arguments.set,
        limit=arguments.limit,
        dry_run=arguments.dry_run,
    )


def report(arguments: argparse.Namespace) -> None:
    """Compare runs over seeds (mean, spread, n, paired differences) as text, or as a page with plots and gallery."""
    from flyp_saflex.reporting.report import report as run

    run(arguments.runs, out=arguments.out, form=arguments.format, baseline=arguments.baseline)


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


class VersionAction(argparse.Action):
    """Flag that prints the versions of this package and of its main libraries, none of which it imports, and stops."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print one line and exit."""
        found = [f"{name} {_version(package)}" for name, package in VERSIONS.items()]
        print(f"flyp-saflex {__version__} (Python {platform.python_version()}, {', '.join(found)})")
        parser.exit()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def parse_alphas(text: str) -> tuple[float, ...]:
    """Parse comma-separated alphas such as `0,0.5,1`.

    Raises:
        UserError: an entry is not a number in 0..1.
    """
    try:
        alphas = tuple(float(part) for part in text.split(","))
    except ValueError:
        alphas = (-1.0,)
    if any(not 0 <= alpha <= 1 for alpha in alphas):
        raise UserError(f"--wise-alphas {text}: expected numbers from 0 to 1 with commas between, for example 0,0.25,0.5,0.75,1")
    return alphas


def parse_shard(text: str) -> tuple[int, int]:
    """Parse a shard `i/n` into (index, count), with 0 <= i < n.

    Raises:
        UserError: the text has another form, or i is not below n.
    """
    index, _, count = text.partition("/")
    if index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return int(index), int(count)
    raise UserError(f"--shard {text}: expected i/n with i from 0 to n - 1, for example 0/4, 1/4, 2/4 and 3/4 for four jobs")


class Folder:
    """Type of arguments that name a folder: an empty text, as an unset shell variable gives, is refused."""

    def __init__(self, argument: str) -> None:
        self.argument = argument

    def __call__(self, text: str) -> Path:
        """Return the folder.

        Raises:
            UserError: the text is empty.
        """
        if not text.strip():
            raise UserError(f"{self.argument} '{text}': found an empty name, expected a folder: name one, for example runs/first")
        return Path(text)


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
    command = add(prompts, [with_recipe])
    command.add_argument("--force", action="store_true", help="overwrite an existing file")
    command = add(generate, [with_recipe])
    command.add_argument("--shard", default="0/1", metavar="I/N", help="make the I-th of N parts (job arrays), I from 0")
    add(filter, [with_recipe])
    add(train, [with_recipe])
    command = add(evaluate, [shared])
    command.add_argument("run", type=Folder("RUN"), metavar="RUN", help="run folder written by train")
    command.add_argument("--split", action="append", default=[], metavar="S", help="evaluate this split only; repeatable")
    command.add_argument("--wise-alphas", metavar="A,B,...", help="alphas of a WiSE-FT sweep, for example 0,0.25,0.5,0.75,1")
    command = add(compare, [with_recipe])
    command.add_argument("--shard", default="0/1", metavar="I/N", help="run the I-th of N parts (job arrays), I from 0")
    command = add(report, [])
    command.add_argument("runs", type=Folder("RUN"), nargs="+", metavar="RUN", help="run folders that have been evaluated")
    command.add_argument("--out", type=Folder("--out"), metavar="FILE", help="output file; FILE.html is a self-contained page")
    command.add_argument("--format", choices=("md", "csv", "json", "html"), default="md", help="default: as FILE ends, or md")
    command.add_argument("--baseline", metavar="NAME", help="recipe to compare the others with, paired by seed")
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
        if not _output_is_closed():
            raise  # a pipe between processes of ours
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # for what the interpreter flushes at its end
        os.close(nowhere)
        return CLOSED_PIPE


def _output_is_closed() -> bool:
    """Return whether the reader of the output is gone."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are told without being asked for
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = build_parser().parse_args(argv)
        runtime.keep_freed_memory()
        if hasattr(arguments, "recipe"):
            config = recipe.load(arguments.recipe, arguments.set)
            if arguments.print_config:
                print(recipe.dumps(config, comments=True), end="")
            else:
                arguments.handler(arguments, config)
        else:
            arguments.handler(arguments)
    except UserError as error:
        print(f"flyp-saflex: {quoted(str(error), sys.maxsize)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flyp-saflex: interrupted", file=sys.stderr)
        return 130
    return 0
