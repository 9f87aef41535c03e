"""A source and a task -> a stream of integers, in order, made once and kept in a cache.

The integers are token ids for language modelling, and entries of examples (see encode.py) for chat
and classify. The cache holds a token file (see shards.py) for each content, tokenizer and task. A
.tokens file is used directly. Beside the token file lies what was read, as JSON. This file does not
know about training and validation splits.
"""

import hashlib
import json
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from nanogpt2 import terminal
from nanogpt2.atomic import whole_file
from nanogpt2.config import Skip
from nanogpt2.data.content import Columns, Content, folder_label
from nanogpt2.data.encode import END, id_type
from nanogpt2.data.files import TOKENS, DataFile, find_splits
from nanogpt2.data.reading import Reading, reading_from
from nanogpt2.data.records import RECORD_FORMATS
from nanogpt2.data.shards import Ids, extremes, open_shard, write_shard
from nanogpt2.data.tasks import labels_in_folders
from nanogpt2.data.token_files import Joined, open_token_file
from nanogpt2.data.unfinished import Unfinished
from nanogpt2.hub import expanded
from nanogpt2.tokenizer import Tokenizer

# the splits of a source to train on and to validate on, the first one found
TRAINING, VALIDATION = ("train", ""), ("validation", "test", "train", "")
# increase it whenever the same files give other tokens
CACHE_VERSION = 3
# a temporary file of whole_file in the cache, and when no live run still writes it
LEFTOVER = re.compile(r"\.[0-9a-f]{64}-.+\.(tokens|json)\.[0-9a-f]+\.tmp")
LEFT_AFTER = 3 * 24 * 3600  # seconds since the last write
UNFINISHED = re.compile(r"\.[0-9a-f]{64}-.+\.tokens(\.[0-9a-f]+)?\.(ids|journal)")
UNFINISHED_AFTER = 30 * 24 * 3600


@dataclass(frozen=True)
class _Digested(DataFile):
    """A file that is digested as it is read: last[0] is the SHA-256 of the last whole reading."""

    last: list[bytes] = field(default_factory=lambda: [b""], compare=False)
    seen: list[int] = field(default_factory=lambda: [0], compare=False)  # bytes read, repeats too

    @override
    def pieces(self) -> Iterator[bytes]:
        digest = hashlib.sha256()
        for piece in super().pieces():
            digest.update(piece)
            self.seen[0] += len(piece)
            yield piece
        self.last[0] = digest.digest()


@dataclass(frozen=True)
class Streams:
    """Turns sources into streams, each once for its content, the tokenizer and the task."""

    tokenizer: Tokenizer
    task: str
    columns: Columns
    vocab_size: int
    cache: Path
    encoding: str = "utf-8"  # of files without a byte-order mark
    skip_bad: bool = False  # count records that cannot be used, and go on
    out: str | None = None  # the run's folder, which is no data
    processes: int = 1  # that may read and encode at once

    def read(
        self, source: str, splits: Sequence[str] = TRAINING
    ) -> tuple[Ids | Joined, bytes, Reading]:
        """Return a source's stream, its digest and what was read.

        splits: the parts of a source to read, the first one that it has. The digest is the SHA-256
        of everything but the tokenizer that shapes the stream. Raises ValueError or OSError for a
        source that cannot be used.
        """
        reading = Reading(source)
        files = [_Digested(**vars(file)) for file in self._find(source, splits, reading.skip)]
        reading.files = len(files)
        _read_all(files, self.processes)
        if files[0].format in TOKENS:
            if any((Path(file.name).parent / "meta.pkl").exists() for file in files):
                reading.advice = (
                    "note: meta.pkl, a pickle, is not read: the ids are taken as the model's"
                )
            return self._open_tokens(files), self._digest(files), reading
        if self.tokenizer.vocab_size > self.vocab_size:
            raise ValueError(
                f"{source!r} would be tokenised into {self.tokenizer.vocab_size} ids, outside the "
                f"vocabulary of {self.vocab_size}"
            )
        cached = self._open_cached(self._path(files))
        if cached is None:
            cached = self._make(source, files)
        ids, read = cached
        reading.records, reading.skipped = read.records, reading.skipped | read.skipped
        # where the folders lie is no part of the cache's name
        is_lm = self.task == "lm"
        reading.advice = read.advice or (labels_in_folders(source, files) if is_lm else "")
        return ids, self._digest(files), reading

    def has_split(self, source: str) -> bool:
        """Tell whether a source has data to validate on of its own."""
        if source == "-":
            return False
        return "validation" in find_splits(source, out=self.out)

    def _find(self, source: str, splits: Sequence[str], skip: Skip) -> list[DataFile]:
        stdin_format = ".txt" if self.task == "lm" else ".jsonl"
        found = find_splits(source, stdin_format, encoding=self.encoding, out=self.out, skip=skip)
        wanted = next((split for split in splits if split in found), None)
        if wanted is None:
            there = ", ".join(sorted(found))
            raise ValueError(f"{source!r} has no files to train on; it holds {there}: name these")
        for file in found.get("test", []) if splits == TRAINING else []:
            skip("of the split test", file.name)
        return found[wanted]

    def _make(self, source: str, files: Sequence[_Digested]) -> tuple[Ids, Reading]:
        """Encode the files, and keep the stream in the cache."""
        size, read = sum(file.seen[0] for file in files), [0]
        counted = [replace(file, seen=read) for file in files]
        path = self._path(files)
        made = Unfinished(path.with_name(f".{path.name}"), id_type(self.tokenizer))
        content = Content(
            source,
            counted,
            self.tokenizer,
            self.task,
            self.columns,
            self.skip_bad,
            made=made,
            processes=self.processes,
            size=size,
            position=lambda: read[0],
        )
        try:
            pieces, reading = content.encode()
            # the digest is now that of the bytes encoded: a file may have grown since the first
            kept = _keep(self._path(files), pieces, reading)
            made.remove()
            return kept
        finally:
            made.close()

    def _digest(self, files: Sequence[_Digested]) -> bytes:
        shape = (CACHE_VERSION, self.task, astuple(self.columns), self.encoding, self.skip_bad)
        digest = hashlib.sha256(repr(shape).encode())
        for file in files:
            named = folder_label(file) if self.task == "classify" else ""
            digest.update(repr((file.format, named)).encode() + file.last[0])
        return digest.digest()

    def _path(self, files: Sequence[_Digested]) -> Path:
        name = f"{self._digest(files).hex()}-{self.tokenizer.key}.tokens"
        return expanded(self.cache) / name

    def _open_cached(self, path: Path) -> tuple[Ids, Reading] | None:
        """Open the token file `path` and what was read; None if one is absent or damaged."""
        try:
            text = path.with_suffix(".json").read_text(encoding="utf-8")
            reading, ids = reading_from(json.loads(text)), open_shard(path)
            if (i := self._outside(ids)) is None:
                return ids, reading
            terminal.note(f"{str(path)!r} holds the wrong id {i}: making it again")
        except (ValueError, TypeError, LookupError, AttributeError):
            terminal.note(f"{str(path)!r} is damaged: making it again")
        except OSError:
            pass
        return None

    def _outside(self, ids: Ids) -> int | None:
        """Return an id outside the vocabulary, if there is one."""
        low, high = extremes(ids)
        if self.task != "lm" and low < 0:
            # entries of examples: END, and complements of ids
            low, high = 0, max(high, ~int(ids[ids != END].min(initial=0)))
        return next((i for i in (low, high) if not 0 <= i < self.vocab_size), None)

    def _open_tokens(self, files: Sequence[DataFile]) -> Ids | Joined:
        name = files[0].name
        if self.task != "lm":
            allowed = ", ".join(RECORD_FORMATS)
            raise ValueError(f"{name!r} holds tokens; {self.task} needs {allowed}")
        parts = []
        for file in files:
            is_own = file.format == ".tokens"
            ids = open_shard(file.name) if is_own else open_token_file(file.name)
            if (i := self._outside(ids)) is not None:
                raise ValueError(
                    f"{file.name!r} holds token id {i}, outside the vocabulary of {self.vocab_size}"
                )
            parts.append(ids)
        return parts[0] if len(parts) == 1 else Joined(parts)


def _read_all(files: Sequence[_Digested], threads: int) -> None:
    """Read all files, several at once, for their digests. Raises the first file's error."""
    stopped = False

    def read(file: _Digested) -> None:
        for _ in file.pieces():
            if stopped:
                return

    pool = ThreadPoolExecutor(min(threads, len(files)))
    try:
        deque(pool.map(read, files), maxlen=0)
    finally:
        stopped = True
        pool.shutdown(cancel_futures=True)


def _keep(
    path: Path, pieces: Iterable[NDArray[np.integer]], reading: Reading
) -> tuple[Ids, Reading]:
    """Write the token file `path` and what was read, and open it."""
    with suppress(OSError):
        # without a writable cache the run still works, only slower
        _delete_leftovers(path.parent)
        write_shard(path, pieces, next(iter(pieces)).dtype)
        with whole_file(path.with_suffix(".json")) as partial:
            partial.write_text(json.dumps(asdict(reading)), encoding="utf-8")
        return open_shard(path), reading
    return np.concatenate([*pieces]), reading


def _delete_leftovers(folder: Path) -> None:
    """Delete what killed runs were writing: it may be gigabytes. A live one writes all the time.

    What a later run can go on from is kept for longer.
    """
    now = time.time()
    for pattern, names, seconds in (
        (".*.tmp", LEFTOVER, LEFT_AFTER),
        (".*.ids", UNFINISHED, UNFINISHED_AFTER),
        (".*.journal", UNFINISHED, UNFINISHED_AFTER),
    ):
        for path in folder.glob(pattern):
            with suppress(OSError):
                if names.fullmatch(path.name) and now - path.stat().st_mtime > seconds:
                    path.unlink()
