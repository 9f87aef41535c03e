"""The ids of a source that is being tokenised, kept in a file that grows: a killed run goes on.

    NAME.ids      the ids made so far, as they come
    NAME.journal  one JSON object for each block of them: the SHA-256 of the block's text, the
                  number of its ids, the SHA-256 of the ids' bytes

A later run reads the texts again, which is fast, and skips the blocks in the journal whose text and
ids have the digests written there. So a damaged file, or a text that has changed since, costs time
alone. While one process writes these files they are locked.

A short source stays in memory. This file does not know texts or tokenizers.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
from numpy.typing import NDArray

from nanogpt2.data.shards import SCAN, Ids
from nanogpt2.filesystem import lock


@dataclass(frozen=True)
class Reordered:
    """The texts of a stream in another order, in pieces; each text ends with the id `end`."""

    made: Unfinished
    end: int
    order: NDArray[np.int64]

    def __iter__(self) -> Iterator[Ids]:
        return self.made.reordered(self.end, self.order)


class Unfinished:
    """Blocks of ids: added one by one, kept on disk from the second on, then read at any place."""

    def __init__(self, path: Path | None, dtype: np.dtype) -> None:
        """Take up what an earlier process left at `path`; None keeps all in memory."""
        self.path, self.dtype = path, dtype
        self.count = 0  # ids on disk
        self.known: list[str] = []  # the digests of the texts on disk, in order
        self._sizes: list[int] = []  # in ids, of these blocks
        self._held: list[Ids] = []  # the last block
        self._held_text = ""
        self._ids: BinaryIO | None = None
        self._journal: TextIO | None = None
        with suppress(OSError):
            if path is not None and _named(path, "journal").exists():
                self._open()

    def keep(self, blocks: int) -> None:
        """Forget all but the first blocks on disk."""
        if blocks < len(self.known) and self._ids is not None and self._journal is not None:
            self.count = sum(self._sizes[:blocks])
            self.known, self._sizes = self.known[:blocks], self._sizes[:blocks]
            self._ids.truncate(self.count * self.dtype.itemsize)
            lines = _named(self.path, "journal").read_bytes().splitlines(keepends=True)[:blocks]
            self._journal.truncate(sum(map(len, lines)))

    def add(self, text_digest: str, pieces: Iterable[Ids]) -> None:
        """Add a block, and write the one before it.

        Where the disk is full or read-only, everything is kept in memory instead.
        """
        if self._held and self.path is not None:
            try:
                self._write()
            except OSError:
                self._leave_the_disk()
        self._held, self._held_text = [*self._held, *pieces], text_digest

    def __len__(self) -> int:
        """Return the number of ids."""
        return self.count + sum(map(len, self._held))

    def pieces(self) -> Iterator[Ids]:
        """Yield all ids in order."""
        for start in range(0, self.count, SCAN):
            yield self._read(start, min(start + SCAN, self.count))
        yield from self._held

    def reordered(self, end: int, order: NDArray[np.int64]) -> Iterator[Ids]:
        """Yield the texts in another order; each ends with the id `end`."""
        last = np.concatenate([*self._held, np.empty(0, self.dtype)])
        ends, at = [np.zeros(1, np.int64)], 0
        for piece in self.pieces():
            ends.append(at + 1 + np.flatnonzero(piece == end))
            at += len(piece)
        edges = np.concatenate(ends)
        for i in order:
            start, stop = int(edges[i]), int(edges[i + 1])
            if start < self.count:
                yield self._read(start, min(stop, self.count))
            if stop > self.count:
                yield last[max(0, start - self.count) : stop - self.count]

    def remove(self) -> None:
        """Delete the files."""
        if self._journal is not None:
            _named(self.path, "ids").unlink(missing_ok=True)
            _named(self.path, "journal").unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Close the files; what is on disk stays for a later process."""
        for file in (self._ids, self._journal):
            if file is not None:
                file.close()
        self._ids = self._journal = None

    def _open(self) -> None:
        """Lock and open the files; where another process has them, open others."""
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._journal = lock(_named(self.path, "journal"))
        except BlockingIOError:
            self.path = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
            self._journal = lock(_named(self.path, "journal"))
        ids = _named(self.path, "ids")
        ids.touch()
        self._ids = ids.open("r+b")
        lines = _named(self.path, "journal").read_bytes().splitlines(keepends=True)
        for line in lines:
            if not (line.endswith(b"\n") and self._takes_up(line)):
                break
        self._ids.truncate(self.count * self.dtype.itemsize)
        self._journal.truncate(sum(map(len, lines[: len(self.known)])))

    def _takes_up(self, line: bytes) -> bool:
        """Take up a block of the journal, if its ids are whole."""
        with suppress(ValueError, TypeError, LookupError):
            entry = json.loads(line)
            text, count, sha256 = str(entry["text"]), int(entry["ids"]), entry["sha256"]
            ids = self._read(self.count, self.count + count)
            if count > 0 and hashlib.sha256(ids.tobytes()).hexdigest() == sha256:
                self.known.append(text)
                self._sizes.append(count)
                self.count += count
                return True
        return False

    def _write(self) -> None:
        if self._ids is None:
            self._open()
            # an unfinished stream of another start
            self.keep(0)
        assert self._ids is not None and self._journal is not None
        data = b"".join(np.ascontiguousarray(piece, self.dtype).tobytes() for piece in self._held)
        self._ids.seek(self.count * self.dtype.itemsize)
        self._ids.write(data)
        self._ids.flush()
        count = len(data) // self.dtype.itemsize
        entry = {"text": self._held_text, "ids": count, "sha256": hashlib.sha256(data).hexdigest()}
        self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()
        self.known.append(self._held_text)
        self._sizes.append(count)
        self.count += count
        self._held = []

    def _leave_the_disk(self) -> None:
        """Read back what is on disk, delete it, and go on in memory."""
        self._held = [*self.pieces()]
        self.remove()
        self.path, self.count = None, 0

    def _read(self, start: int, stop: int) -> Ids:
        assert self._ids is not None
        self._ids.seek(start * self.dtype.itemsize)
        return np.frombuffer(self._ids.read((stop - start) * self.dtype.itemsize), self.dtype)


def _named(path: Path | None, kind: str) -> Path:
    assert path is not None
    return path.with_name(f"{path.name}.{kind}")
