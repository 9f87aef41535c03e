"""A source -> the texts or the records to be measured by, as the trainer reads them.

This file does not know what is measured.
"""

from collections.abc import Iterator
from itertools import islice

from nanogpt2.data.files import find_files
from nanogpt2.data.records import KINDS, Record, read_records


def read_examples(source: str, limit: int | None = None) -> list[Record]:
    """Return the first `limit` records. Raises ValueError for a file of another kind, or none."""
    found = list(islice(_records(source), limit))
    if not found:
        raise ValueError(f"{source!r} is empty: there is no record in it")
    return found


def _records(source: str) -> Iterator[Record]:
    for file in find_files(source, plain=".jsonl"):
        if file.kind not in KINDS:
            raise ValueError(f"{file.name!r} must be one of {', '.join(KINDS)}")
        yield from read_records(file)


def read_texts(source: str) -> Iterator[str]:
    """Yield the texts of a source. Raises ValueError for a file of another kind."""
    for file in find_files(source):
        if file.kind != ".txt":
            raise ValueError(f"{file.name!r} must be plain text, not {file.kind}")
        yield "".join(file.text())
