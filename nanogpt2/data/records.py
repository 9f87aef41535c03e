"""Files of records -> one mapping for each record, with its file and line.

    .jsonl     one JSON object a line; blank lines are skipped
    .csv .tsv  a line of names, then one record a line; a quoted field may contain line breaks
    .parquet   one record a row; needs pyarrow

A malformed file is a ValueError that names the file and the line. This file does not know the
meaning of the columns.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nanogpt2.data.files import DataFile

RECORD_FORMATS = (".jsonl", ".csv", ".tsv", ".parquet")
MAX_FIELD_SIZE = 2**31 - 1  # characters in a CSV field


@dataclass(frozen=True)
class Record:
    """Named values and their origin, such as "'mails.csv' line 3"."""

    where: str
    values: Mapping[str, Any]

    def value(self, column: str) -> Any:
        """Return a column's value. Raises ValueError that lists the columns if it is missing."""
        if column not in self.values:
            found = ", ".join(map(repr, self.values)) or "none"
            raise ValueError(f"{self.where} has no column {column!r}; columns found: {found}")
        return self.values[column]

    def text(self, column: str) -> str:
        """Return a column's text. Raises ValueError for a blank text or another type."""
        value = self.value(column)
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: {column!r} must be text, not {excerpt(value)}")
        if not value.strip():
            raise ValueError(f"{self.where}: {column!r} is empty")
        return value

    def label(self, column: str) -> str:
        """Return a label's name: a text, or an integer as text."""
        value = self.value(column)
        if type(value) is int:
            return str(value)
        if not isinstance(value, str):
            raise ValueError(
                f"{self.where}: {column!r} must be text or a whole number, not {excerpt(value)}"
            )
        return self.text(column).strip()


def read_records(file: DataFile) -> Iterator[Record]:
    """Yield the records of a file, in order. Raises ValueError for a malformed file."""
    if file.format == ".jsonl":
        yield from _jsonl(file)
    elif file.format == ".parquet":
        yield from _parquet(file)
    else:
        yield from _table(file, "\t" if file.format == ".tsv" else ",")


def excerpt(value: object) -> str:
    """Return the beginning of a value, for an error message."""
    text = value if isinstance(value, str) else repr(value)
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _lines(parts: Iterable[str]) -> Iterator[str]:
    """Cut at line feeds only: JSON may contain Unicode's other line ends."""
    held: list[str] = []
    for part in parts:
        first, *others = part.split("\n")
        held.append(first)
        for other in others:
            yield "".join(held) + "\n"
            held = [other]
    if any(held):
        yield "".join(held)


def _jsonl(file: DataFile) -> Iterator[Record]:
    for number, line in enumerate(_lines(file.text()), 1):
        if not line.strip():
            continue
        where = f"{file.name!r} line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise ValueError(f"{where} is not a JSON object: {excerpt(line.strip())}")
        yield Record(where, values)


def _table(file: DataFile, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(MAX_FIELD_SIZE)
    rows = csv.reader(_lines(file.text()), delimiter=delimiter, strict=True)
    names: list[str] = []
    line = 1  # of the row's first line
    try:
        for row in rows:
            where, line = f"{file.name!r} line {line}", rows.line_num + 1
            if row and not names:
                names = [name.strip() for name in row]
                if len(set(names)) < len(names):
                    raise ValueError(f"{where} names a column twice: {', '.join(names)}")
            elif row:
                if len(row) != len(names):
                    raise ValueError(
                        f"{where} has {len(row)} fields, not {len(names)} as the first line"
                    )
                yield Record(where, dict(zip(names, row, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{file.name!r} line {line} is malformed: {error}") from None


def _parquet(file: DataFile) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{file.name!r} needs pyarrow: pip install pyarrow") from None
    number = 0
    try:
        # Parquet's index is at the end of the file, so read all of it
        content = io.BytesIO(b"".join(file.pieces()))
        for batch in parquet.ParquetFile(content).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Record(f"{file.name!r} row {number}", values)
    except ArrowException as error:
        raise ValueError(f"{file.name!r} is not a Parquet file: {error}") from None
