"""Keep freed memory in the process: a quarter of a CPU run can be page faults otherwise (floor 0; no torch).

glibc returns every large tensor to the system when it is freed, and the next operation asks for it again, page by page.
The measurement is in scripts/LOG.md. Does nothing on other systems, and nothing that MALLOC_* variables already set.
"""

from __future__ import annotations

import ctypes
import os
import sys

# From glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> bool:
    """Tell glibc to serve large blocks from the heap and to keep what is freed; return whether it was done."""
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    largest = 2**31 - 1
    return bool(mallopt(M_MMAP_THRESHOLD, largest)) and bool(mallopt(M_TRIM_THRESHOLD, largest))
