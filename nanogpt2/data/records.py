"""Files of records -> one mapping for each record, with its file and line.

    .jsonl .json  one JSON object a line, objects one after another, or an array of objects; an
                  array of messages in an object's place is a record with the column `messages`
    .csv          a line of names, then one record a line; a quoted field may contain line breaks;
                  the delimiter is the one in the line of names: , or ; or a tab or |. Excel's
                  line sep=; before it is read
    .tsv          the same with tabs; a quote that does not enclose a field is text
    .parquet, .arrow      one record a row: see columnar.py

Columns without a name are ignored. A file that cannot be cut into records is a ValueError that
names the file. A malformed record is yielded all the same, and its use is a `RecordError`, so that
the records after it can be read. This file does not know the meaning of the columns.
"""

import csv
import itertools
import json
import numbers
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from nanogpt2.data import columnar
from nanogpt2.data.files import DataFile

RECORD_FORMATS = (".jsonl", ".json", ".csv", ".tsv", *columnar.KINDS)
MAX_FIELD_SIZE = 2**31 - 1  # characters in a CSV field
DELIMITERS = ",;\t|"
HALF = re.compile("[\ud800-\udfff]")
# Excel's first line
STATED = re.compile(f'"?sep=([{DELIMITERS}])"?', re.IGNORECASE)
# a field between tabs: in quotes that enclose it, or as it stands
TAB_FIELD = re.compile(r'"([^"]*(?:""[^"]*)*)"(?=\t|\Z)|([^\t]*)')


class RecordError(ValueError):
    """A record that cannot be used: `where` is its file and line."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}{reason}")
        self.where, self.reason = where, reason


@dataclass(frozen=True)
class Record:
    """Named values and their origin, such as "'mails.csv' line 3"."""

    where: str
    values: Mapping[str, Any]

    def value(self, column: str) -> Any:
        """Return a column's value. Raises RecordError that lists the columns if it is missing."""
        if column not in self.values:
            found = ", ".join(map(repr, self.values)) or "none"
            raise RecordError(self.where, f" has no column {column!r}; columns found: {found}")
        try:
            return self.values[column]
        except (ValueError, OverflowError) as error:
            # a time that Python cannot express
            raise RecordError(self.where, f": {column!r} cannot be read: {error}") from None

    def text(self, column: str) -> str:
        """Return a column's text. Raises RecordError for a blank text or another type."""
        value = self.value(column)
        if not isinstance(value, str):
            raise RecordError(self.where, f": {column!r} must be text, not {excerpt(value)}")
        if not value.strip():
            raise RecordError(self.where, f": {column!r} is empty")
        if half := HALF.search(value):
            reason = f": {column!r} has {ascii(half[0])[1:-1]}, half a surrogate pair"
            raise RecordError(self.where, reason)
        return value

    def label(self, column: str) -> str:
        """Return a label's name: a text, or a number, true or false as text."""
        value = self.value(column)
        if isinstance(value, bool):
            return str(value).lower()
        # a missing number is NaN, which differs from itself
        if isinstance(value, numbers.Number) and value == value:
            return str(value)
        if not isinstance(value, str):
            allowed = "text, a number, true or false"
            raise RecordError(self.where, f": {column!r} must be {allowed}, not {excerpt(value)}")
        return self.text(column).strip()


class _Malformed(Mapping[str, Any]):
    """The values of a malformed record: each use raises its error."""

    def __init__(self, error: RecordError) -> None:
        self.error = error

    @override
    def __getitem__(self, name: str) -> Any:
        raise self.error

    @override
    def __iter__(self) -> Iterator[str]:
        raise self.error

    @override
    def __len__(self) -> int:
        raise self.error


def read_records(file: DataFile) -> Iterator[Record]:
    """Yield the records of a file, in order. Raises ValueError for a malformed file."""
    if file.format in (".jsonl", ".json"):
        yield from _json(file)
    elif file.format in columnar.KINDS:
        for number, row in enumerate(columnar.rows(file), 1):
            yield Record(f"{file.name!r} row {number}", row)
    else:
        yield from _table(file, "\t" if file.format == ".tsv" else ",")


def excerpt(value: object) -> str:
    """Return the beginning of a value, for an error message."""
    text = value if isinstance(value, str) else repr(value)
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _malformed(where: str, reason: str) -> Record:
    return Record(where, _Malformed(RecordError(where, reason)))


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


# ---- JSON


def _json(file: DataFile) -> Iterator[Record]:
    is_first = True
    for number, line in enumerate(_lines(file.text()), 1):
        if not (text := line.strip()):
            continue
        values = _value(text)
        if is_first and text[0] in "[{" and not isinstance(values, dict):
            # an array, or an object over several lines
            objects = _objects(file, is_needed=values is None and (text[0] == "[" or text == "{"))
            if objects is not None:
                for i, value in enumerate(objects, 1):
                    yield _json_record(f"{file.name!r} item {i}", value, str(value))
                return
        is_first = False
        yield _json_record(f"{file.name!r} line {number}", values, text)


def _is_conversation(value: Any) -> bool:
    """Tell whether a value is an array of messages."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(one, dict) and ("role" in one or "from" in one) for one in value)
    )


def _json_record(where: str, values: Any, text: str) -> Record:
    if _is_conversation(values):
        values = {"messages": values}
    if isinstance(values, dict):
        return Record(where, values)
    return _malformed(where, f" is not a JSON object: {excerpt(text)}")


def _value(text: str) -> Any:
    """Return the value of a JSON text; None if it is malformed."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _objects(file: DataFile, is_needed: bool) -> list[Any] | None:
    """Return the items of an array, or objects one after another; None for anything else.

    is_needed: the file cannot be JSON Lines, so anything else is a ValueError.
    """
    text, decoder, found = "".join(file.text()).strip(), json.JSONDecoder(), []
    at = 0
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            found.append(value)
            while at < len(text) and text[at].isspace():
                at += 1
    except (ValueError, RecursionError) as error:
        if is_needed:
            raise ValueError(f"{file.name!r} is not JSON Lines or an array: {error}") from None
        return None
    if len(found) == 1 and isinstance(found[0], list) and not _is_conversation(found[0]):
        found = found[0]
        kinds = [isinstance(value, dict) or _is_conversation(value) for value in found]
        return found if not found or any(kinds) else None
    return found if all(isinstance(v, dict) or _is_conversation(v) for v in found) else None


# ---- tables


def _table(file: DataFile, usual: str) -> Iterator[Record]:
    csv.field_size_limit(MAX_FIELD_SIZE)
    lines = _lines(file.text())
    blank, head, stated = 0, "", None
    for head in lines:
        if not stated and (stated := STATED.fullmatch(head.rstrip("\n"))):
            usual = stated[1]
        elif head.strip():
            break
        blank += 1
    # outside quotes
    bare = re.sub('"[^"]*"', "", head)
    delimiter = usual if stated or usual in bare else max(usual + DELIMITERS, key=bare.count)
    lines = itertools.chain([head], lines)
    rows = _tab_rows(lines) if delimiter == "\t" else _quoted_rows(lines, delimiter, file.name)
    names: list[str] = []
    for line, row in rows:
        where = f"{file.name!r} line {blank + line}"
        if isinstance(row, str):
            if not names:
                raise ValueError(f"{where}{row}")
            yield _malformed(where, row)
        elif row and not names:
            names = [name.strip() for name in row]
            named = [name for name in names if name]
            if len(set(named)) < len(named):
                raise ValueError(f"{where} names a column twice: {', '.join(named)}")
        elif row and len(row) != len(names):
            reason = f" has {len(row)} fields, not {len(names)} as the first line"
            yield _malformed(where, reason)
        elif row:
            yield Record(where, {k: v for k, v in zip(names, row, strict=True) if k})


def _quoted_rows(
    lines: Iterable[str], delimiter: str, name: str
) -> Iterator[tuple[int, list[str] | str]]:
    """Yield each row's first line and its fields, or what is wrong with it."""
    text = ""
    rows = csv.reader((text := line for line in lines), delimiter=delimiter, strict=True)
    while True:
        line = rows.line_num + 1
        try:
            yield line, next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if rows.line_num > line:
                # the lines that it swallowed may be records: none of them may be dropped
                raise ValueError(
                    f"{name!r} line {line} opens a quote that does not end as it must (read to "
                    f"line {rows.line_num}): {error}"
                ) from None
            if text.count('"') % 2:
                yield line, f" is malformed: {error}"
            else:
                # "quoted" and more: one field, as other readers have it
                yield line, next(csv.reader([text], delimiter=delimiter))


def _tab_rows(lines: Iterable[str]) -> Iterator[tuple[int, list[str] | str]]:
    """Yield each row's first line and its fields.

    A quoted field spans lines only if these are not records by themselves: a stray quote must not
    swallow the records up to the next one.
    """
    source, held = enumerate(lines, 1), deque[tuple[int, str]]()
    width = 0
    while (now := held.popleft() if held else next(source, None)) is not None:
        line, text = now[0], now[1].rstrip("\n")
        row, ahead = _tab_fields(text), list[tuple[int, str]]()
        while not _is_closed(row) and (more := held.popleft() if held else next(source, None)):
            ahead.append(more)
            if len(_tab_fields(more[1].rstrip("\n"))) == width == len(_tab_fields(text)):
                break
            row = _tab_fields("".join([now[1], *(part for _, part in ahead)]).rstrip("\n"))
        if ahead and not (_is_closed(row) and len(row) == (width or len(row))):
            held.extendleft(reversed(ahead))
            row = _tab_fields(text)
        if len(row) != width == text.count("\t") + 1:
            row = text.split("\t")
        width = width or len(row)
        yield line, row if text else []


def _tab_fields(text: str) -> list[str]:
    fields, at = [], 0
    while at <= len(text) and (found := TAB_FIELD.match(text, at)):
        fields.append(found[2] if found[1] is None else found[1].replace('""', '"'))
        at = found.end() + 1
    return fields


def _is_closed(row: list[str]) -> bool:
    """Tell whether no field begins with a quote that is open at the row's end."""
    return not (row[-1].startswith('"') and row[-1].count('"') % 2)
