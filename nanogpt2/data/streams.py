"""A source and a task -> a stream of integers, in order, made once and kept in a cache.

The integers are token ids for language modelling, and entries of examples (see encode.py) for chat
and classify. The cache holds a token file (see shards.py) for each content, tokenizer and task. A
.tokens file is used directly. This file does not know about training and validation splits.
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
from nanogpt2.data.records import RECORD_FORMATS, Record, read_records
from nanogpt2.data.shards import Ids, open_shard, write_shard
from nanogpt2.hub import expanded
from nanogpt2.tokenizer import Tokenizer

# increase it whenever the same files give other tokens
CACHE_VERSION = 1
# fixed, so that runs with different seeds share one split and can be compared
SPLIT_SEED = 1558


@dataclass(frozen=True)
class Columns:
    """The names of the columns in records."""

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
        """Return a source's stream, and the SHA-256 of everything but the tokenizer that shapes it.

        Raises ValueError or OSError for a source that cannot be used.
        """
        files = find_files(source, stdin_format=".txt" if self.task == "lm" else ".jsonl")
        digest = hashlib.sha256(repr((CACHE_VERSION, self.task, astuple(self.columns))).encode())
        for file in files:
            content = hashlib.sha256()
            for piece in file.pieces():
                content.update(piece)
            named = self._folder_label(file) if self.task == "classify" else ""
            digest.update(repr((file.format, named)).encode() + content.digest())
        if files[0].format == ".tokens":
            return self._open_tokens(files[0]), digest.digest()
        if self.tokenizer.vocab_size > self.vocab_size:
            raise ValueError(
                f"{source!r} would be tokenised into {self.tokenizer.vocab_size} ids, outside the "
                f"vocabulary of {self.vocab_size}"
            )
        merges = hashlib.sha256(self.tokenizer.merges.encode()).hexdigest()[:8]
        name = f"{digest.hexdigest()}-{self.tokenizer.name}-{merges}.tokens"
        make = self._encode_texts if self.task == "lm" else self._encode_records
        return _open_or_make(
            expanded(self.cache) / name, lambda: make(files, source)
        ), digest.digest()

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

    def _encode_texts(self, files: Sequence[DataFile], source: str) -> list[NDArray[np.integer]]:
        """Encode the texts in random order: the end of the stream becomes the validation split.

        A single text is not shuffled, so its own end validates.
        """
        texts: list[list[NDArray[np.integer]]] = []
        for file in files:
            if file.format == ".txt":
                texts.append(encode_text(file.text(), self.tokenizer))
            else:
                for record in read_records(file):
                    text = record.text(self.columns.text)
                    texts.append(encode_text([text], self.tokenizer))
        texts = [pieces for pieces in texts if pieces]
        if not texts:
            raise ValueError(f"{source!r} is empty: no text in it")
        order = np.random.default_rng(SPLIT_SEED).permutation(len(texts))
        return [piece for i in order for piece in texts[i]]

    def _encode_records(self, files: Sequence[DataFile], source: str) -> list[NDArray[np.integer]]:
        """Encode the records, in order."""
        found = []
        for file in files:
            if file.format != ".txt":
                found += [self._encode_example(record) for record in read_records(file)]
            elif self.task == "chat":
                raise ValueError(f"{file.name!r} is text; chat needs {', '.join(RECORD_FORMATS)}")
            else:
                values = {
                    self.columns.text: "".join(file.text()),
                    self.columns.label: self._folder_label(file),
                }
                found.append(self._encode_example(Record(repr(file.name), values)))
        if not found:
            raise ValueError(f"{source!r} is empty: no record in it")
        return found

    def _encode_example(self, record: Record) -> NDArray[np.integer]:
        if self.task == "chat":
            return encode_chat(segments(record), self.tokenizer)
        text, label = record.text(self.columns.text), record.label(self.columns.label)
        return encode_labelled(text, label, self.tokenizer)

    def _folder_label(self, file: DataFile) -> str:
        return Path(file.name).absolute().parent.name if file.format == ".txt" else ""


def _open_or_make(path: Path, make: Callable[[], list[NDArray[np.integer]]]) -> Ids:
    """Open the token file `path`; make it first if it is absent or damaged."""
    try:
        return open_shard(path)
    except ValueError:
        terminal.note(f"{str(path)!r} is damaged: making it again")
    except OSError:
        pass
    pieces = make()
    with suppress(OSError):
        # without a writable cache the run still works, only slower
        write_shard(path, pieces, pieces[0].dtype)
        return open_shard(path)
    return np.concatenate(pieces)
