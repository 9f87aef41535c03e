"""The terminal: standard streams, notes, progress, signals, and all drawing of text.

This file does not know what the scripts do.
"""

import gc
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import FrameType, TracebackType
from typing import Any

from nanogpt2 import threads
from nanogpt2.memory import is_out_of_memory, out_of_memory_line

HANGUP = getattr(signal, "SIGHUP", None)  # Windows lacks it


def prepare() -> None:
    """Make the standard streams and signals safe. Every script calls it first.

    SIGINT exits with 130, SIGTERM with 143, SIGHUP (a closed terminal) with 129. A closed pipe ends
    the process silently. Out of memory anywhere is one line on stderr and exit code 1.
    No garbage is collected until `loaded`.
    """
    global _colours
    gc.disable()
    threads.wait_briefly()
    _open_streams()
    _colours = styled(sys.stdout)
    sys.excepthook = _show_uncaught
    _on_broken_pipe(signal.SIG_DFL)
    _on_signals(lambda number: sys.exit(128 + number))


def loaded() -> None:
    """Collect garbage from now on. Every script calls it once all modules are imported.

    Importing leaves half a million objects and hardly any garbage: to look at them, time and again,
    took a tenth of the start.
    """
    gc.freeze()
    gc.enable()


def ignore_broken_pipes() -> None:
    """Let a write to a closed pipe or socket raise OSError, instead of ending the process."""
    _on_broken_pipe(signal.SIG_IGN)


_colours = True  # False where a script's stdout takes no escape sequences


def _show_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if is_out_of_memory(error):
        print(f"error: {out_of_memory_line(error)}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _open_streams() -> None:
    """Open closed standard streams on /dev/null, and make writes to stderr never fail.

    Without that, the next file opened would get a closed stream's number, and printed text would go
    into it. A failed note must not end a run.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # os.open returns the lowest free number: that of the closed stream
            number = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    file = _NeverFailingFile(sys.stderr.fileno(), "w", closefd=False)
    sys.stderr = io.TextIOWrapper(
        file, sys.stderr.encoding, "backslashreplace", line_buffering=True, write_through=True
    )


class _NeverFailingFile(io.FileIO):
    """A file that drops data it cannot write."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


@contextmanager
def checked_output() -> Iterator[None]:
    """If standard output is closed or full, print one error line and exit with 1.

    For scripts whose output is their only result. Call `prepare` inside, because it reopens closed
    streams.
    """
    try:
        if sys.stdout is None:
            raise OSError("standard output is closed")
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        # redirect stdout, or Python would write the rest of the buffer again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        print(visible(f"error: {error}"), file=sys.stderr)
        sys.exit(1)


_output_enabled = True


def enable_output(enabled: bool) -> None:
    """Turn output other than errors on or off: only one of several processes prints."""
    global _output_enabled
    _output_enabled = enabled


def note(text: str) -> None:
    """Print a line on stderr, because stdout is for results. An empty line prints nothing."""
    if not (_output_enabled and text):
        return
    # print above a progress bar; tqdm is loaded only once a bar exists
    tqdm = sys.modules.get("tqdm")
    (tqdm.tqdm.write if tqdm else print)(visible(text), file=sys.stderr)


@cache
def note_once(text: str) -> None:
    """Print a note, but only the first time in this process."""
    note(text)


# control characters but tab and newline, marks that reorder a line, halves of surrogate pairs
_CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Show control characters as escapes, so that foreign text cannot steer the terminal."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def styled(stream: Any) -> bool:
    """Return True if escape sequences may be written to a stream.

    That is: to a terminal, unless TERM=dumb or NO_COLOR (https://no-color.org) say otherwise.
    """
    plain = os.environ.get("TERM") == "dumb" or os.environ.get("NO_COLOR")
    return stream.isatty() and not plain


def write(text: str) -> None:
    """Print text on stdout and flush; characters outside its encoding become ?.

    Raises OSError if the write fails. Later text is then discarded.
    """
    if not _output_enabled:
        return
    encoding = sys.stdout.encoding
    try:
        print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)
    except OSError as error:
        # redirect stdout, or Python would write the rest of the buffer again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "standard output") from None


BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
BAR_COLUMNS = 33  # the bar's own parts: percent, eight columns of bar, two times


def fitting(fields: Sequence[str], columns: int) -> str:
    """Join fields by commas; drop fields from the right until the text fits."""
    while fields and len(", ".join(fields)) > columns:
        fields = fields[:-1]
    return ", ".join(fields)


def json_line(value: Any) -> str:
    """Return a value as a line of JSON. NaN and infinities become null: JSON cannot write them."""
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(plain) + "\n"


class Progress:
    """A progress bar on stderr; if stderr is not a terminal, only the evaluations are printed."""

    def __init__(self, total: int, done: int, unit: str) -> None:
        from tqdm import tqdm

        is_drawn = _output_enabled and styled(sys.stderr)
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=unit,
            disable=not is_drawn,
            dynamic_ncols=True,
            bar_format=BAR_FORMAT,
        )
        self._explained = False

    def show(self, figures: Mapping[str, Any]) -> None:
        """Advance by one step and show its loss and speed; print an evaluation on its own line."""
        shown = f"loss {figures['loss']:.4f}"
        evaluated = [f"{k} {v:.4f}" for k, v in figures.items() if k.startswith("val_")]
        if evaluated:
            note(f"step {figures['step']}: " + ", ".join([shown, *evaluated]))
        fields = [shown, f"{figures['tokens_per_second']:,.0f} tokens/s"]
        if "mfu" in figures:
            fields += [f"mfu {figures['mfu']:.0%}", f"{figures['memory'] / 1e9:.1f} GB"]
            if not (self._explained or self._bar.disable):
                self._explained = True
                note("mfu: the share of the device's peak rate that the model's arithmetic reaches")
        taken = 2 * len(str(self._bar.total)) + BAR_COLUMNS
        room = shutil.get_terminal_size().columns - taken
        self._bar.set_postfix_str(fitting(fields, room), refresh=False)
        self._bar.update()

    def advance(self, count: int, said: str = "") -> None:
        """Advance by `count`; show `said` beside the bar."""
        self._bar.set_postfix_str(said, refresh=False)
        self._bar.update(count)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


class Signals:
    """Stores the first SIGINT, SIGTERM or SIGHUP in `received` for the run; a second one exits.

    A second SIGHUP does not: a closed terminal sends several. Nor does any under torchrun. A broken
    pipe no longer ends the process.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        _on_broken_pipe(signal.SIG_IGN)
        _on_signals(self._receive)

    def _receive(self, number: int) -> None:
        if self.received is not None:
            # torchrun repeats a signal that its processes also got; it kills them after 30 seconds
            if number == HANGUP or "TORCHELASTIC_RUN_ID" in os.environ:
                return
            sys.exit(128 + number)
        self.received = number
        note("finishing the current step; a second signal stops at once")


def _on_broken_pipe(action: signal.Handlers) -> None:
    # Windows has no SIGPIPE
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, action)


def _on_signals(action: Callable[[int], Any]) -> None:
    def handle(number: int, frame: FrameType | None) -> None:
        action(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    # nohup ignores SIGHUP, so that a process outlives its terminal
    if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:
        signal.signal(HANGUP, handle)


# ---- drawing


class Screen:
    """Text streamed to stdout; on a terminal, followed by a dimmed tail that may still change."""

    def __init__(self) -> None:
        self._line = ""  # the last line on the screen, without the tail

    def write(self, text: str) -> None:
        """Erase the tail and print final text."""
        self.tail("")
        write(text)
        self._line = (self._line + text).rpartition("\n")[2]

    def redraws(self) -> bool:
        """Return True if stdout is a terminal that takes escape sequences."""
        return styled(sys.stdout)

    def tail(self, text: str) -> None:
        """Draw text that may still change, dimmed, cut to the rest of the line."""
        if not self.redraws():
            return
        columns = shutil.get_terminal_size().columns
        # of a wrapped line only the last row can be redrawn; a full row leaves no space for a tail
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
    """Return a text's width in columns: wide characters take two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)


def _last(line: str, width: int) -> str:
    """Return the end of a line that fills `width` columns."""
    size = 0
    while size < len(line) and _width(line[len(line) - size :]) < width:
        size += 1
    return line[len(line) - size :]


def paint(text: str, level: float) -> str:
    """Colour a text's background from red (0) over yellow to green (1), if a script may."""
    if not _colours:
        return text
    level = min(1.0, max(0.0, level))
    red, green = min(1.0, 2 - 2 * level), min(1.0, 2 * level)
    return f"\x1b[48;2;{int(160 * red)};{int(130 * green)};40m\x1b[97m{text}\x1b[0m"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first one left, the others right.

    On a narrow terminal the columns that do not fit follow below, each block with the first column.
    A note says how wide a terminal must be where even one column does not fit. A cell takes one
    line.
    """
    rows = [
        [visible(cell).replace("\n", "\\n").replace("\t", "\\t") for cell in row] for row in rows
    ]
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    limit = screen_columns()
    if limit is not None and (needed := widths[0] + 2 + max(widths[1:], default=-2)) > limit:
        note(f"the table needs {needed} columns, the terminal has {limit}")
        limit = needed
    blocks: list[str] = []
    first = 1
    while first < len(widths) or not blocks:
        end, taken = first, widths[0]
        while end < len(widths) and (limit is None or taken + 2 + widths[end] <= limit):
            taken += 2 + widths[end]
            end += 1
        blocks.append("\n".join(_row(row, widths, first, end) for row in rows))
        first = end
    return "\n\n".join(blocks)


def _row(row: Sequence[str], widths: Sequence[int], first: int, end: int) -> str:
    """Return a table's line: the first cell and the cells first .. end - 1."""
    cells = [row[0] + " " * (widths[0] - _width(row[0]))]
    for cell, width in zip(row[first:end], widths[first:end], strict=True):
        cells.append(" " * (width - _width(cell)) + cell)
    return "  ".join(cells).rstrip()


def screen_columns() -> int | None:
    """Return the width of the terminal; None where standard output is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


@dataclass
class Node:
    """A node of a tree: its line and its children."""

    label: str
    children: "list[Node]"


def tree(nodes: Sequence[Node]) -> str:
    """Draw a tree with box-drawing lines, each node above its children.

    On a terminal a label that does not fit loses its middle.
    """
    lines, limit = [], screen_columns()
    # a stack of (node, indent, True for the last sibling)
    waiting = [(node, "", node is nodes[-1]) for node in reversed(nodes)]
    while waiting:
        node, indent, is_last = waiting.pop()
        label = node.label if limit is None else shorten(node.label, limit - len(indent) - 3)
        lines.append(f"{indent}{'└─ ' if is_last else '├─ '}{label}")
        indent += "   " if is_last else "│  "
        below = node.children
        waiting += [(child, indent, child is below[-1]) for child in reversed(below)]
    return "\n".join(lines)


LEAST_LABEL = 30  # columns; a deep tree's labels go beyond a narrow terminal


def shorten(text: str, columns: int, least: int = LEAST_LABEL) -> str:
    """Cut the middle out of a text wider than `columns`; keep its end, where a score stands.

    Never narrower than `least` columns.
    """
    columns = max(columns, least)
    if _width(text) <= columns:
        return text
    end = _last(text, columns - 8)
    start = ""
    for char in text:
        if _width(start + char + "…" + end) > columns:
            break
        start += char
    return start + "…" + end


BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw a curve as one line of at most `width` blocks, each the mean of a slice of `values`.

    The smallest mean gets the lowest block, the largest the highest. NaN and infinities are
    skipped.
    """
    count = min(width, len(values))
    slices = [
        values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)
    ]
    finite = [[value for value in part if math.isfinite(value)] for part in slices]
    means = [math.fsum(part) / len(part) if part else None for part in finite]
    known = [mean for mean in means if mean is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    # a constant curve is drawn with the lowest block
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if m is None else BLOCKS[round((m - low) * scale)] for m in means)
