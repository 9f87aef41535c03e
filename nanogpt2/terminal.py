"""What a person at the terminal meets: streams, progress, notes, signals. The only module to draw.

This file does not know what is being made.
"""

import io
import math
import os
import shutil
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


def prepare() -> None:
    """Make the standard streams and signals safe: what a script does first.

    SIGINT ends the process with 130 and SIGTERM with 143, a closed pipe silently.
    """
    _open_streams()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    _on_signals(lambda number: sys.exit(128 + number))


def _open_streams() -> None:
    """Open what is closed, and have standard error never fail.

    A closed stream's number would go to the next file opened, and what is printed would end up
    there: it becomes /dev/null. A run is worth more than its notes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # the lowest number that is free is this stream's own
            number = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    file = _Unfailing(sys.stderr.fileno(), "w", closefd=False)
    sys.stderr = io.TextIOWrapper(
        file, sys.stderr.encoding, "backslashreplace", line_buffering=True, write_through=True
    )


class _Unfailing(io.FileIO):
    """A file that drops what it cannot take."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


@contextmanager
def checked_output() -> Iterator[None]:
    """Make a standard output that is closed or full one line of error and exit code 1.

    For what is of no use without its output. `prepare` comes inside: it opens what is closed.
    """
    try:
        if sys.stdout is None:
            raise OSError("standard output is closed")
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        # what could not be written is not tried again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


_speaks = True


def speak(aloud: bool) -> None:
    """Say things from now on, or nothing but errors: one of several processes speaks for all."""
    global _speaks
    _speaks = aloud


def note(text: str) -> None:
    """Print a line for the person, on stderr: stdout is for results. An empty one is nothing."""
    if not (_speaks and text):
        return
    # above the bar, if there is one; tqdm is loaded when one is first drawn
    tqdm = sys.modules.get("tqdm")
    (tqdm.tqdm.write if tqdm else print)(text, file=sys.stderr)


def write(text: str) -> None:
    """Print text on stdout at once; what its encoding lacks becomes ?.

    Raises OSError where stdout cannot take it; what is printed after that goes nowhere.
    """
    if not _speaks:
        return
    encoding = sys.stdout.encoding
    try:
        print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)
    except OSError as error:
        # what is left in the buffer would be tried again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "standard output") from None


class Progress:
    """A bar on stderr with speed and time left; only the evaluations where that is no terminal."""

    def __init__(self, total: int, done: int, unit: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total, initial=done, unit=unit, disable=not (_speaks and sys.stderr.isatty())
        )

    def show(self, figures: Mapping[str, Any]) -> None:
        """Count one more as done, with its loss and speed; an evaluation keeps its line."""
        shown = f"loss {figures['loss']:.4f}"
        evaluated = [f"{k} {v:.4f}" for k, v in figures.items() if k.startswith("val_")]
        if evaluated:
            note(f"step {figures['step']}: " + ", ".join([shown, *evaluated]))
        shown += f", {figures['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in figures:
            shown += f", mfu {figures['mfu']:.0%}, {figures['memory'] / 1e9:.1f} GB"
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update()

    def advance(self, count: int) -> None:
        """Count some more as done."""
        self._bar.update(count)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


class Signals:
    """Keeps SIGINT and SIGTERM for later: `received` is the first one's number; a second exits.

    A pipe whose reader has gone ends nothing any more.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        _on_signals(self._receive)

    def _receive(self, number: int) -> None:
        if self.received is not None:
            sys.exit(128 + number)
        self.received = number
        note("finishing what is under way; once more stops at once")


def _on_signals(action: Callable[[int], Any]) -> None:
    def handle(number: int, frame: FrameType | None) -> None:
        action(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


# ---- text that is drawn


class Screen:
    """Text on stdout as it is made, and behind it, on a terminal, a tail that may still change."""

    def __init__(self) -> None:
        self._line = ""  # what stands on the last line, without the tail

    def write(self, text: str) -> None:
        """Print what is certain; the tail goes."""
        self.tail("")
        write(text)
        self._line = (self._line + text).rpartition("\n")[2]

    def redraws(self) -> bool:
        """True where stdout is a terminal."""
        return sys.stdout.isatty()

    def tail(self, text: str) -> None:
        """Draw what is not certain yet, dimmed, as far as the line has room."""
        if not self.redraws():
            return
        columns = shutil.get_terminal_size().columns
        # a long line has wrapped: only its last row can be drawn again, a full one has no room
        taken = _width(self._line) % columns
        if self._line and taken == 0:
            return
        shown = ""
        for char in text.replace("\n", "⏎"):
            if _width(shown + char) > columns - 1 - taken or not char.isprintable():
                break
            shown += char
        row = _last(self._line, taken)
        write(f"\r{row}\x1b[K" + (f"\x1b[2m{shown}\x1b[0m" if shown else ""))


def _width(text: str) -> int:
    """Columns that a text takes: wide characters take two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)


def _last(line: str, width: int) -> str:
    """The end of a line that takes this many columns."""
    size = 0
    while size < len(line) and _width(line[len(line) - size :]) < width:
        size += 1
    return line[len(line) - size :]


def paint(text: str, share: float) -> str:
    """Colour a text's background from red (0) over yellow to green (1)."""
    share = min(1.0, max(0.0, share))
    red, green = min(1.0, 2 - 2 * share), min(1.0, 2 * share)
    return f"\x1b[48;2;{int(160 * red)};{int(130 * green)};40m\x1b[97m{text}\x1b[0m"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align the columns: the first to the left, the others to the right."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first + " " * (widths[0] - _width(first))]
        cells += [
            " " * (width - _width(cell)) + cell
            for cell, width in zip(others, widths[1:], strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


@dataclass
class Node:
    """A node of a tree: its line, and the nodes under it."""

    label: str
    children: "list[Node]"


def tree(nodes: Sequence[Node]) -> str:
    """Draw nodes under one another, their children behind lines."""
    lines = []
    # what is still to be drawn, the next one last: a node, its indent, whether no sibling follows
    waiting = [(node, "", node is nodes[-1]) for node in reversed(nodes)]
    while waiting:
        node, indent, is_last = waiting.pop()
        lines.append(f"{indent}{'└─ ' if is_last else '├─ '}{node.label}")
        indent += "   " if is_last else "│  "
        below = node.children
        waiting += [(child, indent, child is below[-1]) for child in reversed(below)]
    return "\n".join(lines)


BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw a curve as one line of at most `width` blocks, each the mean of its share of `values`.

    The lowest is the lowest block, the highest the highest; what is no number is left out.
    """
    count = min(width, len(values))
    shares = [
        values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)
    ]
    finite = [[value for value in share if math.isfinite(value)] for share in shares]
    means = [math.fsum(share) / len(share) if share else None for share in finite]
    known = [mean for mean in means if mean is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    # a flat curve is a low one
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if m is None else BLOCKS[round((m - low) * scale)] for m in means)
