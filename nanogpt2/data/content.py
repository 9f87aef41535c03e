"""The files of a source -> the ids or entries of its texts and records, in order.

All bad records of a source are one error, or are counted and skipped; so are all files in another
encoding. This file does not know the cache.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nanogpt2.data.chat import segments
from nanogpt2.data.encode import encode_chat, encode_labelled, encode_text
from nanogpt2.data.files import DataFile, EncodingError, encoding_of
from nanogpt2.data.reading import SHOWN, Reading
from nanogpt2.data.records import RECORD_FORMATS, Record, RecordError, read_records
from nanogpt2.data.tasks import further_task, right_task
from nanogpt2.tokenizer import END_OF_TEXT, Tokenizer

# fixed, so that runs with different seeds share one split and can be compared
SPLIT_SEED = 1558

Pieces = list[NDArray[np.integer]]


@dataclass(frozen=True)
class Columns:
    """The names of the columns in records."""

    text: str = "text"
    label: str = "label"


def folder_label(file: DataFile) -> str:
    """Return the label of a text file, its folder's name; for another file an empty text."""
    return Path(file.name).absolute().parent.name if file.format == ".txt" else ""


def records_of(file: DataFile, columns: Columns) -> Iterator[Record]:
    """Return a file's records; a text file is one, whose label is the folder's name."""
    if file.format != ".txt":
        return read_records(file)
    values = {columns.text: "".join(file.text()), columns.label: folder_label(file)}
    return iter([Record(repr(file.name), values)])


def split_texts(parts: Iterable[str], end: str = END_OF_TEXT) -> Iterator[Iterator[str]]:
    """Cut a text, given in parts, at the text of its end token. Read each before the next one."""
    source, texts = iter(parts), deque([""])
    # a part of a text may end within it
    held = len(end) - 1

    def text() -> Iterator[str]:
        while len(texts) == 1 and (part := next(source, None)) is not None:
            texts.extend((texts.pop() + part).split(end))
            if len(texts) == 1:
                begun = texts.pop()
                size = max(0, len(begun) - held)
                yield begun[:size]
                texts.append(begun[size:])
        yield texts.popleft()

    while texts:
        yield text()


@dataclass
class Content:
    """The files of a source, encoded once."""

    source: str
    files: Sequence[DataFile]
    tokenizer: Tokenizer
    task: str
    columns: Columns
    skip_bad: bool
    reading: Reading = field(default_factory=Reading)
    found: list[Pieces] = field(default_factory=list)  # of each text or record
    bad: list[RecordError] = field(default_factory=list)
    advice: str = ""  # the task that reads the first bad record

    def encode(self) -> tuple[Pieces, Reading]:
        """Return the pieces of the stream, and what was read. Raises ValueError for bad records.

        The texts of language modelling come in random order: the end of the stream becomes the
        validation split. A single text is not shuffled, so its own end validates.
        """
        undecodable: list[EncodingError] = []
        for file in self.files:
            try:
                self._add(file)
            except EncodingError as error:
                if self.skip_bad and file.format == ".txt":
                    self.reading.skip(f"not {error.encoding.upper()}", repr(file.name))
                else:
                    undecodable.append(error)
        if undecodable:
            raise ValueError(self._encoding_advice(undecodable))
        if self.bad and not (self.found and self.skip_bad):
            raise ValueError(self._bad_records())
        for bad in self.bad:
            self.reading.skip("bad records", str(bad))
        is_lm = self.task == "lm"
        if not self.found:
            raise ValueError(f"{self.source!r} is empty: no {'text' if is_lm else 'record'} in it")
        self.reading.records = len(self.found)
        order = np.arange(len(self.found))
        if is_lm:
            order = np.random.default_rng(SPLIT_SEED).permutation(order)
        return [piece for i in order for piece in self.found[i]], self.reading

    def _add(self, file: DataFile) -> None:
        if self.task == "lm" and file.format == ".txt":
            texts = self._texts(file.text())
            self.found += texts
            if not texts:
                self.reading.skip("empty", repr(file.name))
            return
        bad = []
        count = 0
        for record in self._records(file):
            count += 1
            try:
                self.found += self._encode(record)
            except RecordError as error:
                self._advise(record)
                bad.append(error)
        if file.format == ".json" and count == len(bad) == 1 and Path(self.source).is_dir():
            # settings or a description beside the texts
            self.reading.skip("one JSON object that is no record", repr(file.name))
            return
        self.bad += bad
        if not count:
            self.reading.skip("empty", repr(file.name))

    def _records(self, file: DataFile) -> Iterator[Record]:
        if file.format == ".txt" and self.task == "chat":
            needed = ", ".join(RECORD_FORMATS)
            raise ValueError(f"{file.name!r} is text; chat needs {needed}; --task lm learns texts")
        return records_of(file, self.columns)

    def _encode(self, record: Record) -> list[Pieces]:
        if self.task == "chat":
            parts = segments(record, self.reading.skip, self.tokenizer.end_text)
            entries = encode_chat([part for part in parts if part[0]], self.tokenizer)
            # without a prompt the completion begins as after another text
            has_prompt = bool(parts[0][0])
            return [[entries if has_prompt else np.insert(entries, 0, self.tokenizer.end_of_text)]]
        text = record.text(self.columns.text)
        if self.task == "lm":
            if not self.found:
                self.reading.advice = further_task(record.values, self.columns.label)
            return self._texts([text])
        label = record.label(self.columns.label)
        return [[encode_labelled(text, label, self.tokenizer)]]

    def _advise(self, record: Record) -> None:
        """Keep what task would read a record that cannot be used, if it is the first one."""
        if not (self.bad or self.found or self.advice):
            with suppress(RecordError):
                said = right_task(record.values, self.task, self.columns.text, self.columns.label)
                self.advice = said and f"{record.where} {said}"

    def _texts(self, parts: Iterable[str]) -> list[Pieces]:
        texts = split_texts(parts, self.tokenizer.end_text)
        found = [encode_text(text, self.tokenizer) for text in texts]
        return [pieces for pieces in found if pieces]

    def _bad_records(self) -> str:
        """Describe the first bad records, in a line that names --skip_bad if it would help."""
        first, count = self.bad[0], len(self.bad)
        if count == 1 and self.found:
            return f"{first} (--skip_bad skips it)"
        if not self.found:
            return (self.advice or f"{first}") + (
                f" (so are all {count} records)" if count > 1 else ""
            )
        return (
            f"{count} of {count + len(self.found)} records are bad (--skip_bad skips them): "
            f"{', '.join(_places(self.bad[:SHOWN]))}; the first{first.reason}"
        )

    def _encoding_advice(self, errors: list[EncodingError]) -> str:
        """Describe all undecodable files, in a line that names an encoding that would read them."""
        others = [file for file in self.files if file not in [error.file for error in errors]]
        known = all(error.encoding == "utf-8" and error.is_guessed for error in errors)
        encoding = encoding_of([error.file for error in errors]) if known else None
        advice = ""
        if encoding and all(piece.isascii() for file in others for piece in file.pieces()):
            advice = f"--encoding {encoding} would read {'it' if len(errors) == 1 else 'them'}"
        elif encoding:
            advice = f"other files are: convert from {encoding}"
        if len(errors) == 1:
            return f"{errors[0]}; {advice}" if advice else str(errors[0])
        shown = [f"{_clip(error.file.name)} ({error.byte})" for error in errors[:SHOWN]]
        more = ", ..." if len(errors) > SHOWN else ""
        return (
            f"{len(errors)} of {len(self.files)} files are not {errors[0].encoding.upper()}"
            f"{f' ({advice})' if advice else ''}: {', '.join(shown)}{more}"
        )


def _places(errors: list[RecordError]) -> Iterator[str]:
    """Yield the places of bad records; a file that was just named is not named again."""
    last = ""
    for error in errors:
        name, quote, line = error.where.rpartition("' ")
        yield line if quote and name == last else f"{_clip(name[1:])} {line}" if quote else name
        last = name


def _clip(name: str) -> str:
    """Return a file's name in quotes, or the end of a long one: the line has 200 characters."""
    return repr(name if len(name) <= 30 else f"...{name[-27:]}")
