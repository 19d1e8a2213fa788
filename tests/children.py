"""Commands in processes of their own that need not import the package again: children of a server that holds it already.

A started Python takes ten seconds and more to import what a run needs, which is most of what a test of two processes or of a
kill costs. These children are real processes all the same: they can be killed, have ranks and talk over gloo. One test,
of `evaluate`, starts its processes by `torch.distributed.run`, as users do.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CPU_ONLY = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["flyp_saflex.cli", "flyp_saflex.training.train", "flyp_saflex.evaluation.evaluate", "transformers"]
)


@dataclass
class Child:
    """A command of the package in a process of its own."""

    process: multiprocessing.process.BaseProcess
    out: Path
    err: Path

    @property
    def stdout(self) -> str:
        return self.out.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self.err.read_text(encoding="utf-8")

    @property
    def returncode(self) -> int | None:
        """Exit status; -N: ended by signal N; None: it runs."""
        return self.process.exitcode

    def wait(self, timeout: float = 280) -> int:
        """Return the exit status; after `timeout` seconds the process is killed and the test fails."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"not ended after {timeout:g} s: {self.stdout[-1000:]}{self.stderr[-1000:]}")
        return self.process.exitcode

    def wait_for(self, condition, timeout: float = 240) -> None:
        """Wait until a condition holds while the command runs."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.returncode is None, self.stdout + self.stderr
            assert time.monotonic() < end, f"nothing happened: {self.stdout[-1000:]}{self.stderr[-1000:]}"
            time.sleep(0.02)

    def send_signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


def start(words: Sequence[str], folder: Path, *, name: str = "child", environment: Mapping[str, str] = CPU_ONLY) -> Child:
    """Start `flyp-saflex WORDS`; what it prints goes to folder/NAME.out and NAME.err."""
    out, err = folder / f"{name}.out", folder / f"{name}.err"
    arguments = (list(words), os.environ | environment, os.getcwd(), str(out), str(err))
    process = _SERVER.Process(target=_run, args=arguments, daemon=False)
    for path in (out, err):
        path.write_bytes(b"")
    process.start()
    return Child(process, out, err)


def run(words: Sequence[str], folder: Path) -> Child:
    """Run a command to its end."""
    child = start(words, folder)
    child.wait()
    return child


def start_ranks(words: Sequence[str], folder: Path, *, count: int = 2) -> list[Child]:
    """Start a command on several processes that share its work, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": f"{count}", "LOCAL_WORLD_SIZE": f"{count}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    ranks = [CPU_ONLY | world | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} for rank in range(count)]
    return [start(words, folder, name=f"rank{rank}", environment=own) for rank, own in enumerate(ranks)]


def run_ranks(words: Sequence[str], folder: Path, *, count: int = 2, expected: int = 0) -> tuple[str, str]:
    """Run a command on several processes to its end; return what they printed to stdout and to stderr."""
    children = start_ranks(words, folder, count=count)
    try:
        codes = [child.wait() for child in children]
    finally:
        for child in children:
            child.process.kill()  # of those that have ended nothing is left to kill
    out, err = ("".join(texts) for texts in ([child.stdout for child in children], [child.stderr for child in children]))
    assert codes == [expected] * count, f"{codes}: {out}{err}"
    return out, err


def with_overrides(*words: str, overrides: Sequence[str]) -> list[str]:
    """Return words with `--set` before every override."""
    return [*words, *(part for override in overrides for part in ("--set", override))]


def _run(words: list[str], environment: dict[str, str], folder: str, out: str, err: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for path, number in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    from flyp_saflex.cli import main

    sys.exit(main(words))
