"""The process and the others of its run: memory that stays, signals, lost processes, progress in log files."""

from __future__ import annotations

import ctypes
import os
import re
import select
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from flyp_saflex.errors import RunError

if TYPE_CHECKING:
    from accelerate.state import PartialState

# From glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> bool:
    """Tell glibc to serve large blocks from the heap and to keep what is freed; return whether it was done.

    glibc returns every large tensor to the system when it is freed, and the next operation asks for it again, page by page: a
    quarter of a CPU run can be page faults (scripts/LOG.md). Does nothing on other systems, and nothing that MALLOC_*
    variables already set.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    largest = 2**31 - 1
    return bool(mallopt(M_MMAP_THRESHOLD, largest)) and bool(mallopt(M_TRIM_THRESHOLD, largest))


def process_state(timeout_s: float) -> PartialState:
    """Return accelerate's state of this process and the others of its run.

    Without GPU, accelerate lets each of several processes work alone, unless it is told that CPUs are meant: it is told here.

    Args:
        timeout_s: seconds that a process waits for the others.
    """
    from accelerate.state import PartialState

    flag = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    state = PartialState(cpu=flag, timeout=timedelta(seconds=timeout_s))
    if state.num_processes == 1 and state.device.type == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # read by everything of accelerate from here on
        PartialState._reset_state()
        state = PartialState(cpu=True, timeout=timedelta(seconds=timeout_s))
    return state


def single_process_note(environment: Mapping[str, str], arguments: Sequence[str]) -> str:
    """Return a note if `accelerate launch` was asked for several processes and started one; else the empty string.

    Its simple launcher then sets the address at which processes meet, but neither rank nor number of processes.

    Args:
        environment: variables of the process.
        arguments: of the command line.
    """
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    launched = "ACCELERATE_DYNAMO_BACKEND" in environment and "MASTER_ADDR" in environment and "MASTER_PORT" in environment
    if not launched or any(size in environment for size in sizes):
        return ""
    return (
        "accelerate launch was asked for several processes and started one, as it does where it finds no several GPUs; for N "
        f"processes on CPUs: torchrun --nproc-per-node N -m flyp_saflex {shlex.join(arguments)}"
    )


@contextmanager
def telling_lost_processes(advice: str) -> Iterator[None]:
    """Turn a failed exchange with another process into one line.

    Args:
        advice: the way to go on.

    Raises:
        RunError: another process of the run ended, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        text = re.sub(r"^\[\S*\] ", "", (str(error).strip() or type(error).__name__).splitlines()[0])[:200]
        if not re.search("(?i)gloo|nccl|ProcessGroup|TCPStore|connection (closed|reset)", str(error)):
            raise
        late = re.search("(?i)timed? ?out", text)
        what = "did not answer in time (train.process_timeout_s)" if late else "ended or cannot be reached"
        raise RunError(f"another process of this run {what}: {text}; {advice}") from error


class StopSignals:
    """Ctrl-C and SIGTERM while entered: the first only sets `requested`, the second interrupts at once.

    Outside of the main thread nothing is caught: the caller of the library handles signals there.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> StopSignals:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread
            pass
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class ProgressLines:
    """Progress of a long loop in a log file: lines on stderr at intervals, none on a terminal.

    Args:
        name: name of the work, with which a line begins.
        total: items of the whole work.
        done: items that were done before.
        unit: name of the items, in the plural.
        shown: false on processes that stay silent.
        every: seconds between lines.
    """

    def __init__(self, name: str, *, total: int, done: int, unit: str, shown: bool = True, every: float = 30.0) -> None:
        self.name, self.total, self.unit, self.every = name, total, unit, every
        self.shown = shown and not sys.stderr.isatty()
        self.started = self.told = time.monotonic()
        self.first = done

    def update(self, done: int, detail: str = "") -> None:
        """Write a line if one is due; the rate is that since the start, evaluations and checkpoints included."""
        now = time.monotonic()
        if not self.shown or now - self.told < self.every:
            return
        self.told = now
        rate = (done - self.first) / max(now - self.started, 1e-9)
        left = f", {duration((self.total - done) / rate)} left" if rate else ""
        self.say(f"{done} of {self.total} {self.unit}{detail and ', '}{detail}, {rate:.3g} {self.unit} a second{left}")

    def say(self, text: str) -> None:
        """Write a line now."""
        if self.shown:
            print(f"{self.name}: {text}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return a time as hours, minutes and seconds, `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def output_is_closed() -> bool:
    """Return whether the reader of the output is gone."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are told without being asked for
    return any(event & select.POLLERR for _, event in poll.poll(0))
