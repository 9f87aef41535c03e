"""A source -> the texts or records to evaluate on, read by the same code as in training.

This file does not know the tasks.
"""

from collections.abc import Iterator
from itertools import islice

from nanogpt2.data.files import find_files
from nanogpt2.data.records import RECORD_FORMATS, Record, read_records


def read_examples(source: str, limit: int | None = None) -> list[Record]:
    """Return the first `limit` records. Raises ValueError for another format or no records."""
    found = list(islice(_records(source), limit))
    if not found:
        raise ValueError(f"{source!r} is empty: no record in it")
    return found


def _records(source: str) -> Iterator[Record]:
    for file in find_files(source, stdin_format=".jsonl"):
        if file.format not in RECORD_FORMATS:
            raise ValueError(f"{file.name!r} must be one of {', '.join(RECORD_FORMATS)}")
        yield from read_records(file)


def read_texts(source: str) -> Iterator[str]:
    """Yield the texts of a source. Raises ValueError for a file that is not plain text."""
    for file in find_files(source):
        if file.format != ".txt":
            raise ValueError(f"{file.name!r} must be plain text, not {file.format}")
        yield "".join(file.text())
