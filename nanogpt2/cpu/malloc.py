"""glibc's malloc: return free memory to the system, and keep large blocks apart while loading.

Without glibc these functions do nothing. `mallopt` sets thresholds of the whole process, so only a
program (sample.py) may call `large_blocks_apart`; the library calls `return_free` alone.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's numbers


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Load a model inside: malloc maps each large block separately and unmaps it when freed.

    By default, malloc moves large blocks to its heap once one was freed. There, the temporary
    blocks of loading would leave holes between the weights, which stay resident.
    """
    _call("mallopt", M_MMAP_THRESHOLD, 2**17)
    try:
        yield
    finally:
        # the largest thresholds that malloc would reach by itself
        _call("mallopt", M_MMAP_THRESHOLD, 2**25)
        _call("mallopt", M_TRIM_THRESHOLD, 2**26)


def return_free() -> None:
    """Return malloc's free memory to the system.

    malloc does not reuse the freed block of a matrix for the next one, so both would stay resident.
    """
    _call("malloc_trim", 0)


def _call(name: str, *numbers: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
    if function is not None:
        function(*numbers)
