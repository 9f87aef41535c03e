"""The files of a source -> the ids or entries of its texts and records, in order.

All bad records of a source are one error, or are counted and skipped; so are all files in another
encoding. This file does not know the cache.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanogpt2.data.chat import segments
from nanogpt2.data.encode import encode_chat, encode_labelled, id_type, split_texts
from nanogpt2.data.files import DataFile, EncodingError, encoding_of
from nanogpt2.data.reading import SHOWN, Reading
from nanogpt2.data.records import RECORD_FORMATS, Record, RecordError, read_records
from nanogpt2.data.tasks import further_task, right_task
from nanogpt2.data.tokenise import tokenise
from nanogpt2.data.unfinished import Reordered, Unfinished
from nanogpt2.tokenizer import Tokenizer

# fixed, so that runs with different seeds share one split and can be compared
SPLIT_SEED = 1558


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


@dataclass
class Content:
    """The files of a source, encoded once."""

    source: str
    files: Sequence[DataFile]
    tokenizer: Tokenizer
    task: str
    columns: Columns
    skip_bad: bool
    made: Unfinished | None = None  # what an earlier process has made of the texts
    processes: int = 1  # that may encode texts
    size: int = 0  # bytes of the files
    position: Callable[[], int] = int  # returns how many of them are read
    reading: Reading = field(default_factory=Reading)
    count: int = 0  # texts or records found
    bad: list[RecordError] = field(default_factory=list)  # the first ones
    bad_count: int = 0
    undecodable: list[EncodingError] = field(default_factory=list)
    advice: str = ""  # the task that reads the first bad record

    def encode(self) -> tuple[Iterable[NDArray[np.integer]], Reading]:
        """Return the pieces of the stream, and what was read. Raises ValueError for bad records.

        The texts of language modelling come in random order: the end of the stream becomes the
        validation split. A single text is not shuffled, so its own end validates.
        """
        if self.task != "lm":
            entries = [entry for file in self.files for entry in self._checked(file)]
            return entries, self._finished()
        made = Unfinished(None, id_type(self.tokenizer)) if self.made is None else self.made
        how = self.processes, self.size, self.position
        tokenise(self._texts(), self.tokenizer, made, *how)
        reading = self._finished()
        order = np.random.default_rng(SPLIT_SEED).permutation(self.count)
        return Reordered(made, self.tokenizer.end_of_text, order), reading

    def _texts(self) -> Iterator[str]:
        """Yield all texts in parts, each followed by its end token, until one is found bad."""
        for file in self.files:
            for part in self._checked(file):
                if not (self.undecodable or (self.bad and not self.skip_bad)):
                    yield part

    def _checked(self, file: DataFile) -> Iterator[Any]:
        """Yield what a file holds; keep its error if it is in another encoding."""
        try:
            if self.task == "lm" and file.format == ".txt":
                yield from self._text_file(file)
            else:
                yield from self._record_file(file)
        except EncodingError as error:
            if self.skip_bad and file.format == ".txt":
                self.reading.skip(f"not {error.encoding.upper()}", repr(file.name))
            else:
                self.undecodable.append(error)

    def _text_file(self, file: DataFile) -> Iterator[str]:
        if self.skip_bad:
            # a file is skipped whole
            deque(file.text(), maxlen=0)
        before = self.count
        for text in split_texts(file.text(), self.tokenizer.end_text):
            yield from self._marked(text)
        if self.count == before:
            self.reading.skip("empty", repr(file.name))

    def _marked(self, parts: Iterable[str]) -> Iterator[str]:
        """Yield a text and the end token's text; nothing for a blank text."""
        blank: list[str] | None = []
        for part in parts:
            if blank is None:
                yield part
                continue
            blank.append(part)
            if part.strip():
                yield "".join(blank)
                blank = None
        if blank is None:
            self.count += 1
            yield self.tokenizer.end_text

    def _record_file(self, file: DataFile) -> Iterator[Any]:
        before, count = (self.bad, self.bad_count), 0
        for record in self._records(file):
            count += 1
            try:
                yield from self._encode(record)
            except RecordError as error:
                self._advise(record)
                self.bad_count += 1
                self.bad = [*self.bad, error][:SHOWN]
        is_bad = count == 1 and self.bad_count > before[1]
        if file.format == ".json" and is_bad and Path(self.source).is_dir():
            # settings or a description beside the texts
            self.bad, self.bad_count = before
            self.reading.skip("one JSON object that is no record", repr(file.name))
        elif not count:
            self.reading.skip("empty", repr(file.name))

    def _finished(self) -> Reading:
        """Return what was read. Raises ValueError if it cannot be used."""
        if self.undecodable:
            raise ValueError(self._encoding_advice(self.undecodable))
        if self.bad and not (self.count and self.skip_bad):
            raise ValueError(self._bad_records())
        for bad in self.bad:
            self.reading.skip("bad records", str(bad))
        if self.bad:
            self.reading.skipped["bad records"].count = self.bad_count
        if not self.count:
            what = "text" if self.task == "lm" else "record"
            raise ValueError(f"{self.source!r} is empty: no {what} in it")
        self.reading.records = self.count
        return self.reading

    def _records(self, file: DataFile) -> Iterator[Record]:
        if file.format == ".txt" and self.task == "chat":
            needed = ", ".join(RECORD_FORMATS)
            raise ValueError(f"{file.name!r} is text; chat needs {needed}; --task lm learns texts")
        return records_of(file, self.columns)

    def _encode(self, record: Record) -> Iterator[Any]:
        """Yield a record's text in parts, or its entries. Raises RecordError for a bad one."""
        if self.task == "chat":
            parts = segments(record, self.reading.skip, self.tokenizer.end_text)
            entries = encode_chat([part for part in parts if part[0]], self.tokenizer)
            # without a prompt the completion begins as after another text
            has_prompt = bool(parts[0][0])
            yield entries if has_prompt else np.insert(entries, 0, self.tokenizer.end_of_text)
            self.count += 1
            return
        text = record.text(self.columns.text)
        if self.task == "lm":
            if not self.count:
                self.reading.advice = further_task(record.values, self.columns.label)
            for one in split_texts([text], self.tokenizer.end_text):
                yield from self._marked(one)
            return
        label = record.label(self.columns.label)
        yield encode_labelled(text, label, self.tokenizer)
        self.count += 1

    def _advise(self, record: Record) -> None:
        """Keep what task would read a record that cannot be used, if it is the first one."""
        if not (self.bad or self.count or self.advice):
            with suppress(RecordError):
                said = right_task(record.values, self.task, self.columns.text, self.columns.label)
                self.advice = said and f"{record.where} {said}"

    def _bad_records(self) -> str:
        """Describe the first bad records, in a line that names --skip_bad if it would help."""
        first, count = self.bad[0], self.bad_count
        if count == 1 and self.count:
            return f"{first} (--skip_bad skips it)"
        if not self.count:
            return (self.advice or f"{first}") + (
                f" (so are all {count} records)" if count > 1 else ""
            )
        return (
            f"{count} of {count + self.count} records are bad (--skip_bad skips them): "
            f"{', '.join(_places(self.bad))}; the first{first.reason}"
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
