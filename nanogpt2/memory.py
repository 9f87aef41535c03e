"""Memory: how much this process may use, how much it used, and which errors mean that it ran out.

Standard library only: torch may not even load in too little memory. This file does not know devices
other than the CPU.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path

try:
    import resource
except ImportError:
    # Windows has no resource
    resource = None  # type: ignore[assignment]

# torch has no exception class for a full CPU memory: these stand in the messages of its allocator,
# of oneDNN, of C++, of the loader of shared libraries and of threads, which need stacks
SAID_OF_MEMORY = (
    "out of memory",
    "enough memory",
    "t allocate memory",
    "annot allocate memory",
    "failed to allocate",
    "bad_alloc",
    "could not create a ",
    "t start new thread",
    "failed to map segment",
)
# a container's limit, beside the machine's memory
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error means that memory ran out, whichever library raised it."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    # torch's class, without importing torch
    by_class = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    known = isinstance(error, (RuntimeError, ImportError, OSError))
    return by_class or (known and any(words in str(error) for words in SAID_OF_MEMORY))


def out_of_memory_line(error: BaseException) -> str:
    """Describe an error of `is_out_of_memory` in one line; a message of ours stays as it is."""
    if str(error).startswith("out of memory"):
        return str(error)
    return (
        f"out of memory: this process may use {total_memory() / 1e9:,.1f} GB; try a smaller model, "
        "batch or text"
    )


def total_memory() -> int:
    """Return the bytes that this process may use: the machine's, or a lower limit (ulimit -v)."""
    sizes = [2**63]
    if hasattr(os, "sysconf"):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if resource is not None:
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        sizes += [] if limit == resource.RLIM_INFINITY else [limit]
    # "max" without a limit
    with suppress(OSError, ValueError):
        sizes.append(int(CONTAINER_LIMIT.read_text()))
    return min(sizes)


def peak_memory() -> int:
    """Return the peak memory of this process in bytes; 0 where the system does not count it."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage's peak includes the parent process's
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
