"""The process: memory that stays, and signals that stop it after the step in flight."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

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
