"""A source -> the texts or records to evaluate on, read by the same code as in training.

This file does not know the tasks.
"""

from collections.abc import Iterator
from itertools import islice
from typing import TypeVar

from nanogpt2.data.content import split_texts
from nanogpt2.data.files import EncodingError, find_files
from nanogpt2.data.labelled import (
    LabelledText,
    Names,
    read_labelled,
    skip_text_or_raise,
    with_advice,
)
from nanogpt2.data.records import RECORD_FORMATS, Record, read_records

T = TypeVar("T")


def read_examples(source: str, limit: int | None = None, encoding: str = "utf-8") -> list[Record]:
    """Return the first `limit` records. Raises ValueError for another format or no records."""
    return _some(source, _records(source, encoding), limit)


def read_classified(
    source: str, names: Names, limit: int | None, encoding: str = "utf-8", skip_bad: bool = False
) -> list[LabelledText]:
    """Return the first `limit` texts with their labels. Raises ValueError for none."""
    files = find_files(source, stdin_format=".jsonl", encoding=encoding)
    return _some(source, read_labelled(files, names, skip_bad), limit)


def _some(source: str, found: Iterator[T], limit: int | None) -> list[T]:
    first = list(islice(found, limit))
    if not first:
        raise ValueError(f"{source!r} is empty: no record in it")
    return first


def _records(source: str, encoding: str) -> Iterator[Record]:
    for file in find_files(source, stdin_format=".jsonl", encoding=encoding):
        if file.format not in RECORD_FORMATS:
            raise ValueError(f"{file.name!r} must be one of {', '.join(RECORD_FORMATS)}")
        try:
            yield from read_records(file)
        except EncodingError as error:
            raise ValueError(with_advice(error)) from None


def read_texts(
    source: str, end: str, column: str = "text", encoding: str = "utf-8", skip_bad: bool = False
) -> Iterator[str]:
    """Yield the texts of a source, of records those in a column. `end` separates texts.

    Raises ValueError for a source that holds no texts.
    """
    for file in find_files(source, encoding=encoding):
        texts = (one.text for one in read_labelled([file], Names((column,)), skip_bad))
        try:
            for text in [("".join(file.text()))] if file.format == ".txt" else texts:
                yield from ("".join(parts) for parts in split_texts([text], end))
        except EncodingError as error:
            skip_text_or_raise(error, skip_bad)
