"""This machine's processor, as far as compiled and measured things depend on it; their folder.

Standard library only.
"""

import platform
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cache_folder() -> Path | None:
    """Return the folder of all that is measured or compiled; None for a user without a home."""
    try:
        return Path.home() / ".cache" / "nanogpt2"
    except RuntimeError:
        return None


def processor_name() -> str:
    """Return the processor's name."""
    return _field("model name", "Model") or platform.processor() or platform.machine()


def processor_flags() -> str:
    """Return the processor's name and instruction sets."""
    return f"{processor_name()} {platform.machine()} {_field('flags', 'Features')}"


@cache
def is_intel() -> bool:
    """Tell whether Intel made the processor: PyTorch's own library, MKL, is fastest on those."""
    return _field("vendor_id") == "GenuineIntel"


def _field(*names: str) -> str:
    """Return the first of these fields of /proc/cpuinfo; empty where there is none."""
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            if line.startswith(names):
                return line.partition(":")[2].strip()
    return ""
