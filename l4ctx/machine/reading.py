"""How fast this machine reads a file that is not in memory. Imports no torch."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

SAMPLE_BYTES, LEAST_BYTES = 2**28, 2**26
POPULATE_READ = 22
"""Advice to madvise, on Linux: returns when the pages are there."""


def reading_rate(file: Path) -> float | None:
    """Bytes a second of reading part of the file after dropping it from memory.

    None for small files, and where the system neither drops nor reads on request.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < LEAST_BYTES or not hasattr(os, "posix_fadvise"):
                return None
            length = min(SAMPLE_BYTES, size)
            start = (size - length) // 2 // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            os.posix_fadvise(stream.fileno(), start, length, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_READ, offset=start) as mapped:
                began = time.perf_counter()
                mapped.madvise(POPULATE_READ)
                return length / max(time.perf_counter() - began, 1e-9)
    except (OSError, ValueError, AttributeError):
        return None
