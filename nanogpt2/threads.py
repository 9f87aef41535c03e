"""The threads of a program on a CPU: how many there may be, and how long they wait for each other.

Standard library only: the scripts call `wait_briefly` before torch loads. Only a program may call
`wait_briefly` and `settle`: they hold for the whole process.
"""

import os
from contextlib import suppress
from math import ceil
from pathlib import Path

# a container's limit: microseconds of processor time, or "max", in a period of microseconds
CONTAINER_LIMIT = Path("/sys/fs/cgroup/cpu.max")
# how often a waiting thread of GNU's OpenMP looks before it sleeps: some 50 microseconds, longer
# than the gaps between a step's operations. Its own 300,000 burn the processor that the awaited
# thread needs, where other programs are busy.
LOOKS = 4000
fixed = False  # True where the user has asked for a number of threads


def allowed() -> int:
    """Return the number of processors that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    with suppress(OSError, ValueError, ZeroDivisionError):
        time, period = CONTAINER_LIMIT.read_text().split()
        count = min(count, ceil(int(time) / int(period)))
    return max(1, count)


def wait_briefly() -> None:
    """Let OpenMP's threads sleep soon. Call before torch loads; what the user has set stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(LOOKS))


def settle(asked: int | None, present: int) -> int:
    """Return the threads to use: those asked for, or the present number within `allowed`.

    present: torch's own choice, which follows OMP_NUM_THREADS but no container's limit.
    """
    global fixed
    fixed = asked is not None
    return asked or min(present, allowed())
