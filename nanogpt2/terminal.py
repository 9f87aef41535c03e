"""What a person at the terminal meets: progress, notes and signals. The only module that draws.

This file does not know what is being made.
"""

import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from tqdm import tqdm


def note(text: str) -> None:
    """Print a line for the person, on stderr: stdout is for results."""
    tqdm.write(text, file=sys.stderr)


def write(text: str) -> None:
    """Print text on stdout at once; what its encoding lacks becomes ?."""
    encoding = sys.stdout.encoding
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)


class Progress:
    """A bar on stderr with speed and time left; only the evaluations where that is no terminal."""

    def __init__(self, total: int, done: int, unit: str) -> None:
        self._bar = tqdm(total=total, initial=done, unit=unit, disable=not sys.stderr.isatty())

    def show(self, figures: Mapping[str, Any]) -> None:
        """Count one more as done, with its loss and speed; an evaluation keeps its line."""
        loss, speed = f"loss {figures['loss']:.4f}", f"{figures['tokens_per_second']:,.0f} tokens/s"
        if "val_loss" in figures:
            note(f"step {figures['step']}: {loss}, val_loss {figures['val_loss']:.4f}")
        self._bar.set_postfix_str(f"{loss}, {speed}", refresh=False)
        self._bar.update()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


class Signals:
    """Keeps SIGINT and SIGTERM for later: `received` is the first one's number; a second exits."""

    def __init__(self) -> None:
        self.received: int | None = None
        _on_signals(self._receive)

    def _receive(self, number: int) -> None:
        if self.received is not None:
            sys.exit(128 + number)
        self.received = number
        note("stopping after this step; once more stops at once")


def exit_on_signals() -> None:
    """Let SIGINT end the process with 130 and SIGTERM with 143, and a closed pipe silently."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    _on_signals(lambda number: sys.exit(128 + number))


def _on_signals(action: Callable[[int], Any]) -> None:
    def handle(number: int, frame: FrameType | None) -> None:
        action(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
