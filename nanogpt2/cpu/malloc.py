"""Where malloc is glibc's: have it keep little that is free, for a process that only generates.

This file does not know what the memory is for.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's numbers


@contextmanager
def pages_of_their_own() -> Iterator[None]:
    """Have large blocks get pages of their own inside.

    Once a large one was freed malloc puts the next ones on its heap. What loading uses for a moment
    would leave holes there, between the weights, and they fill up again while text is made.
    """
    _call("mallopt", M_MMAP_THRESHOLD, 2**17)
    try:
        yield
    finally:
        # the most that it would come to by itself
        _call("mallopt", M_MMAP_THRESHOLD, 2**25)
        _call("mallopt", M_TRIM_THRESHOLD, 2**26)


def return_free() -> None:
    """Give the system what malloc holds free.

    It does not put a matrix where another one of its size was, and would keep room for both.
    """
    _call("malloc_trim", 0)


def _call(name: str, *numbers: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
    if function is not None:
        function(*numbers)
