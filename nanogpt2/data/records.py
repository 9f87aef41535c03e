"""Files of records -> one mapping a record, and where it stands.

    .jsonl     a JSON object a line; blank lines are passed over
    .csv .tsv  a line of names, then a line a record; a quoted field may hold lines of its own
    .parquet   a row a record; needs pyarrow

What is wrong is a ValueError that names the file and the line. Nothing here knows what the columns
are for.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nanogpt2.data.files import DataFile

KINDS = (".jsonl", ".csv", ".tsv", ".parquet")
LONGEST_FIELD = 2**31 - 1  # characters in a CSV field


@dataclass(frozen=True)
class Record:
    """Named values, and where they stand: "'mails.csv' line 3"."""

    where: str
    values: Mapping[str, Any]

    def value(self, column: str) -> Any:
        """Return a column's value. Raises ValueError that lists those there are."""
        if column not in self.values:
            there = ", ".join(map(repr, self.values)) or "none"
            raise ValueError(f"{self.where} has no column {column!r}; there are: {there}")
        return self.values[column]

    def text(self, column: str) -> str:
        """Return a column's text. Raises ValueError where it is none, or blank."""
        value = self.value(column)
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: {column!r} must be text, not {excerpt(value)}")
        if not value.strip():
            raise ValueError(f"{self.where}: {column!r} is empty")
        return value

    def label(self, column: str) -> str:
        """Return a label's name: a text, or a whole number as text."""
        value = self.value(column)
        if type(value) is int:
            return str(value)
        if not isinstance(value, str):
            raise ValueError(
                f"{self.where}: {column!r} must be text or a whole number, not {excerpt(value)}"
            )
        return self.text(column).strip()


def read_records(file: DataFile) -> Iterator[Record]:
    """Yield the records of a file, in order."""
    if file.kind == ".jsonl":
        yield from _jsonl(file)
    elif file.kind == ".parquet":
        yield from _parquet(file)
    else:
        yield from _table(file, "\t" if file.kind == ".tsv" else ",")


def excerpt(value: object) -> str:
    """The beginning of a value, for an error's line."""
    text = value if isinstance(value, str) else repr(value)
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _lines(parts: Iterable[str]) -> Iterator[str]:
    """Cut at line feeds alone: JSON may hold the other ends of lines that Unicode knows."""
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
            raise ValueError(f"{where} is no JSON object: {excerpt(line.strip())}")
        yield Record(where, values)


def _table(file: DataFile, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(LONGEST_FIELD)
    rows = csv.reader(_lines(file.text()), delimiter=delimiter, strict=True)
    names: list[str] = []
    line = 1  # where the row begins
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
        # its table of contents stands at its end
        content = io.BytesIO(b"".join(file.pieces()))
        for batch in parquet.ParquetFile(content).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Record(f"{file.name!r} row {number}", values)
    except ArrowException as error:
        raise ValueError(f"{file.name!r} is no Parquet file: {error}") from None
