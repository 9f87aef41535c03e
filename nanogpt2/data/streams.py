"""A source and a task -> a stream of integers, in order, made once and kept in a cache.

The integers are token ids for language modelling, and entries of examples (see encode.py) for chat
and classify. The cache holds a token file (see shards.py) for each content, tokenizer and task. A
.tokens file is used directly. Beside the token file lies what was read, as JSON. This file does not
know about training and validation splits.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nanogpt2 import terminal
from nanogpt2.atomic import whole_file
from nanogpt2.data.content import Columns, Content, folder_label
from nanogpt2.data.files import DataFile, find_files
from nanogpt2.data.reading import Reading, reading_from
from nanogpt2.data.records import RECORD_FORMATS
from nanogpt2.data.shards import Ids, open_shard, write_shard
from nanogpt2.tokenizer import Tokenizer

# increase it whenever the same files give other tokens
CACHE_VERSION = 2


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

    def read(self, source: str) -> tuple[Ids, bytes, Reading]:
        """Return a source's stream, its digest and what was read.

        The digest is the SHA-256 of everything but the tokenizer that shapes the stream. Raises
        ValueError or OSError for a source that cannot be used.
        """
        reading = Reading(source)
        stdin_format = ".txt" if self.task == "lm" else ".jsonl"
        files = find_files(
            source, stdin_format, encoding=self.encoding, out=self.out, skip=reading.skip
        )
        reading.files = len(files)
        shape = (CACHE_VERSION, self.task, astuple(self.columns), self.encoding, self.skip_bad)
        digest = hashlib.sha256(repr(shape).encode())
        for file in files:
            data = hashlib.sha256()
            for piece in file.pieces():
                data.update(piece)
            named = folder_label(file) if self.task == "classify" else ""
            digest.update(repr((file.format, named)).encode() + data.digest())
        if files[0].format == ".tokens":
            return self._open_tokens(files[0]), digest.digest(), reading
        if self.tokenizer.vocab_size > self.vocab_size:
            raise ValueError(
                f"{source!r} would be tokenised into {self.tokenizer.vocab_size} ids, outside the "
                f"vocabulary of {self.vocab_size}"
            )
        merges = hashlib.sha256(self.tokenizer.merges.encode()).hexdigest()[:8]
        name = f"{digest.hexdigest()}-{self.tokenizer.name}-{merges}.tokens"
        path = self.cache.expanduser() / name
        content = Content(source, files, self.tokenizer, self.task, self.columns, self.skip_bad)
        ids, read = _open_or_make(path, content.encode)
        reading.records, reading.skipped = read.records, reading.skipped | read.skipped
        return ids, digest.digest(), reading

    def _open_tokens(self, file: DataFile) -> Ids:
        if self.task != "lm":
            allowed = ", ".join(RECORD_FORMATS)
            raise ValueError(f"{file.name!r} holds tokens; {self.task} needs {allowed}")
        ids = open_shard(file.name)
        for i in (int(ids.min()), int(ids.max())):
            if not 0 <= i < self.vocab_size:
                raise ValueError(
                    f"{file.name!r} holds token id {i}, outside the vocabulary of {self.vocab_size}"
                )
        return ids


def _open_or_make(
    path: Path, make: Callable[[], tuple[list[NDArray[np.integer]], Reading]]
) -> tuple[Ids, Reading]:
    """Open the token file `path` and what was read; make both if one is absent or damaged."""
    described = path.with_suffix(".json")
    try:
        reading = reading_from(json.loads(described.read_text(encoding="utf-8")))
        return open_shard(path), reading
    except (ValueError, TypeError, LookupError, AttributeError):
        terminal.note(f"{str(path)!r} is damaged: making it again")
    except OSError:
        pass
    pieces, reading = make()
    with suppress(OSError):
        # without a writable cache the run still works, only slower
        write_shard(path, pieces, pieces[0].dtype)
        with whole_file(described) as partial:
            partial.write_text(json.dumps(asdict(reading)), encoding="utf-8")
        return open_shard(path), reading
    return np.concatenate(pieces), reading
