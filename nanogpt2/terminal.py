"""What a person at the terminal meets: progress, notes and signals. The only module that draws.

This file does not know what is being made.
"""

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from tqdm import tqdm


def note(text: str) -> None:
    """Print a line for the person, on stderr: stdout is for results."""
    tqdm.write(text, file=sys.stderr)


def progress(total: int, done: int, unit: str) -> "tqdm[Any]":
    """A bar on stderr with speed and time left; where stderr is no terminal, a line every minute."""
    interval = 0.1 if sys.stderr.isatty() else 60.0
    return tqdm(
        total=total, initial=done, unit=unit, mininterval=interval, maxinterval=interval, leave=True
    )


class Signals:
    """SIGINT and SIGTERM, kept for later: `received` is the number of the first; a second one exits."""

    def __init__(self) -> None:
        self.received: int | None = None
        _on_signals(self._receive)

    def _receive(self, number: int) -> None:
        if self.received is not None:
            sys.exit(128 + number)
        self.received = number
        note("stopping after this step; once more stops at once")


def exit_on_signals() -> None:
    """Let SIGINT end the process with 130 and SIGTERM with 143, without a traceback."""
    _on_signals(lambda number: sys.exit(128 + number))


def _on_signals(action: Callable[[int], Any]) -> None:
    def handle(number: int, frame: FrameType | None) -> None:
        action(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
