"""The devices of this machine: their names and their memory, and torch's settings for them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from nanogpt2 import threads as processors
from nanogpt2.memory import total_memory


def choose_device(name: str, threads: int | None = None) -> str:
    """Return the device to run on, and set this program's threads. `auto` is cuda, else cpu.

    threads: by default torch's own number, within the processors that this process may use.
    Raises ValueError for a device that this machine lacks.
    """
    torch.set_num_threads(processors.settle(threads, torch.get_num_threads()))
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if present["cuda"] else "cpu"
    if not present.get(name, True):
        raise ValueError(f"{name!r} is not on this machine")
    return name


def memory_of(device: str | torch.device) -> int:
    """Return the total memory of a device, in bytes, used or free; of a CPU, this process's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return total_memory()


@contextmanager
def as_usual(device: torch.device | str) -> Iterator[None]:
    """Keep out the caller's autocast, default dtype and default device; restore them afterwards.

    device: the model's.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(torch.device(device).type, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield
