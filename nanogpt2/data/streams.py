"""A source and a task -> a stream of integers, in order, made once and kept in a cache.

Of language modelling these are token ids; of chat and classify the entries of examples (see
encode.py). The cache is a token file (see shards.py) for each content, tokenizer and task. A
.tokens file is taken as it is. This file does not know what is trained on and what is held out.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nanogpt2 import terminal
from nanogpt2.data.chat import segments
from nanogpt2.data.encode import encode_chat, encode_labelled, encode_text
from nanogpt2.data.files import DataFile, find_files
from nanogpt2.data.records import KINDS, Record, read_records
from nanogpt2.data.shards import Ids, open_shard, write_shard
from nanogpt2.tokenizer import Tokenizer

# to be raised whenever the same files give other tokens
FORMAT = 1
# the split does not depend on the run's seed, so that runs can be compared
SPLIT_SEED = 1558


@dataclass(frozen=True)
class Columns:
    """What the columns of records are called."""

    text: str = "text"
    label: str = "label"


@dataclass(frozen=True)
class Streams:
    """Turns sources into streams, each once for its content, the tokenizer and the task."""

    tokenizer: Tokenizer
    task: str
    columns: Columns
    vocab_size: int
    cache: Path

    def read(self, source: str) -> tuple[Ids, bytes]:
        """Return a source's stream, and the SHA-256 of all that determines it but the tokenizer.

        Raises ValueError or OSError for a source that cannot be used.
        """
        files = find_files(source, plain=".txt" if self.task == "lm" else ".jsonl")
        digest = hashlib.sha256(repr((FORMAT, self.task, astuple(self.columns))).encode())
        for file in files:
            content = hashlib.sha256()
            for piece in file.pieces():
                content.update(piece)
            named = self._label_of(file) if self.task == "classify" else ""
            digest.update(repr((file.kind, named)).encode() + content.digest())
        if files[0].kind == ".tokens":
            return self._given(files[0]), digest.digest()
        if self.tokenizer.vocab_size > self.vocab_size:
            raise ValueError(
                f"{source!r} would be tokenised into {self.tokenizer.vocab_size} ids, outside the "
                f"vocabulary of {self.vocab_size}"
            )
        merges = hashlib.sha256(self.tokenizer.merges.encode()).hexdigest()[:8]
        name = f"{digest.hexdigest()}-{self.tokenizer.name}-{merges}.tokens"
        make = self._texts if self.task == "lm" else self._records
        return _cached(self.cache.expanduser() / name, lambda: make(files, source)), digest.digest()

    def _given(self, file: DataFile) -> Ids:
        if self.task != "lm":
            raise ValueError(f"{file.name!r} holds tokens; {self.task} needs {', '.join(KINDS)}")
        ids = open_shard(file.name)
        for i in (int(ids.min()), int(ids.max())):
            if not 0 <= i < self.vocab_size:
                raise ValueError(
                    f"{file.name!r} holds token id {i}, outside the vocabulary of {self.vocab_size}"
                )
        return ids

    def _texts(self, files: Sequence[DataFile], source: str) -> list[NDArray[np.integer]]:
        """Put the texts in an order drawn at random; the last will validate.

        One text stays whole, so its end validates; of many, the last ones do.
        """
        texts: list[list[NDArray[np.integer]]] = []
        for file in files:
            if file.kind == ".txt":
                texts.append(encode_text(file.text(), self.tokenizer))
            else:
                for record in read_records(file):
                    text = record.text(self.columns.text)
                    texts.append(encode_text([text], self.tokenizer))
        texts = [pieces for pieces in texts if pieces]
        if not texts:
            raise ValueError(f"{source!r} is empty: there is no text in it")
        order = np.random.default_rng(SPLIT_SEED).permutation(len(texts))
        return [piece for i in order for piece in texts[i]]

    def _records(self, files: Sequence[DataFile], source: str) -> list[NDArray[np.integer]]:
        """Return the entries of each record, in order."""
        found = []
        for file in files:
            if file.kind != ".txt":
                found += [self._example(record) for record in read_records(file)]
            elif self.task == "chat":
                raise ValueError(f"{file.name!r} is text; chat needs {', '.join(KINDS)}")
            else:
                values = {
                    self.columns.text: "".join(file.text()),
                    self.columns.label: self._label_of(file),
                }
                found.append(self._example(Record(repr(file.name), values)))
        if not found:
            raise ValueError(f"{source!r} is empty: there is no record in it")
        return found

    def _example(self, record: Record) -> NDArray[np.integer]:
        if self.task == "chat":
            return encode_chat(segments(record), self.tokenizer)
        text, label = record.text(self.columns.text), record.label(self.columns.label)
        return encode_labelled(text, label, self.tokenizer)

    def _label_of(self, file: DataFile) -> str:
        return Path(file.name).absolute().parent.name if file.kind == ".txt" else ""


def _cached(path: Path, make: Callable[[], list[NDArray[np.integer]]]) -> Ids:
    """Open the token file `path`, made first where it is absent or damaged."""
    try:
        return open_shard(path)
    except ValueError:
        terminal.note(f"{str(path)!r} is damaged: making it again")
    except OSError:
        pass
    pieces = make()
    with suppress(OSError):
        # a cache that cannot be written costs time, not the run
        write_shard(path, pieces, pieces[0].dtype)
        return open_shard(path)
    return np.concatenate(pieces)
