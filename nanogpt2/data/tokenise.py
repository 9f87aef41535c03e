"""Long texts -> their ids: in blocks, by all processors, in bounded memory, resumable after a kill.

A text that does not fill a block is encoded in this process. A longer one is encoded by several
(see parallel.py), and the blocks made are kept on disk (see unfinished.py). A terminal shows the
progress. This file does not know files or records.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from nanogpt2 import terminal
from nanogpt2.data.parallel import Encoder, batches
from nanogpt2.data.unfinished import Unfinished
from nanogpt2.tokenizer import Tokenizer

BLOCK = 8  # batches: 8 MiB of text
LONGEST_BLOCK = 64  # where the text has no place to cut it
# the digest of a block whose ids may belong to a neighbour's text: no text has it
NONE = ""

Texts = list[tuple[str, bool]]


def tokenise(
    parts: Iterable[str],
    tokenizer: Tokenizer,
    made: Unfinished,
    processes: int,
    size: int = 0,
    position: Callable[[], int] = int,
) -> None:
    """Encode texts joined by the end token's text, given in parts, and add their ids to `made`.

    Blocks that an earlier process has made are skipped. size: the bytes of the files; position:
    returns how many of them are read.
    """
    started = deque[tuple[str, int, int]]()  # digest, batches and place in the files of a block
    with Encoder(tokenizer, processes) as encoder, _Report(size, processes) as report:

        def texts() -> Iterator[tuple[str, bool]]:
            count = 0
            for digest, block in _blocks(batches(parts, tokenizer)):
                count += 1
                if count == 1 and len(block) >= BLOCK:
                    encoder.start()
                    report.begin()
                if count <= len(made.known) and made.known[count - 1] == digest != NONE:
                    report.skip(position())
                    continue
                made.keep(count - 1)
                started.append((digest, len(block), position()))
                yield from block
            made.keep(count)

        done, pieces = 0, []
        for count, ids in encoder.encode(texts()):
            done += count
            pieces.append(ids)
            while started and done >= started[0][1]:
                digest, length, place = started.popleft()
                made.add(digest, pieces)
                report.advance(place)
                done, pieces = done - length, []


def _blocks(texts: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, Texts]]:
    """Yield blocks of batches, each with the digest of its text."""
    block, digest, is_whole = Texts(), hashlib.sha256(), True
    for text, is_cut in texts:
        block.append((text, is_cut))
        digest.update(text.encode())
        if len(block) >= (BLOCK if is_cut else LONGEST_BLOCK):
            yield digest.hexdigest() if is_whole and is_cut else NONE, block
            block, digest, is_whole = Texts(), hashlib.sha256(), is_cut
    if block:
        yield digest.hexdigest() if is_whole else NONE, block


class _Report:
    """A bar with the speed and the time left, and a note that says what goes on."""

    def __init__(self, size: int, processes: int) -> None:
        self.size, self.processes = size, processes
        self.done = self.skipped = 0  # bytes
        self._is_said = False
        self._bar: terminal.Progress | None = None
        self._started = time.perf_counter()

    def __enter__(self) -> "_Report":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(*error)

    def begin(self) -> None:
        """Say what begins, and show the bar."""
        several = f" with {self.processes} processes" if self.processes > 1 else ""
        terminal.note(f"tokenising {_megabytes(self.size):,} MB{several}")
        self._bar = terminal.Progress(_megabytes(self.size), 0, "MB")

    def skip(self, place: int) -> None:
        """Count what an earlier process has made."""
        self.skipped = place
        self._show(place)
        self._started = time.perf_counter()

    def advance(self, place: int) -> None:
        """Count what is made now."""
        if self.skipped and not self._is_said:
            self._is_said = True
            terminal.note(f"{_megabytes(self.skipped):,} MB of it were tokenised before a stop")
        self._show(place)

    def _show(self, place: int) -> None:
        if self._bar is None:
            return
        place = min(place, self.size)
        seconds = max(time.perf_counter() - self._started, 1e-9)
        speed = f"{(place - self.skipped) / 1e6 / seconds:.1f} MB/s" if place > self.skipped else ""
        self._bar.advance(_megabytes(place) - _megabytes(self.done), speed)
        self.done = place


def _megabytes(size: int) -> int:
    return -(-size // 10**6)
