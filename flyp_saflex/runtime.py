"""Memory allocator settings of the process: freed memory is kept for the next tensor.

By default glibc returns every large tensor to the system when it is freed, and the next operation requests the memory
again, page by page: page faults can take a quarter of the time of a CPU run (measured in scripts/LOG.md). On other systems,
and where the environment sets MALLOC_* variables, nothing changes.
"""

from __future__ import annotations

import ctypes
import os
import sys

# From glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> bool:
    """Make glibc serve large blocks from the heap and keep freed memory.

    Returns:
        Whether the settings were changed.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    largest = 2**31 - 1
    return bool(mallopt(M_MMAP_THRESHOLD, largest)) and bool(mallopt(M_TRIM_THRESHOLD, largest))
