"""JSONL with one example a line, checked: what is wrong is said with the line's number.

This file does not know what the examples are for.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_records(path: Path, limit: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for the first `limit` lines that are not blank.

    Raises ValueError for a line that is no JSON object.
    """
    count = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if count == limit:
                return
            if not line.strip():
                continue
            count += 1
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is no JSON object: {excerpt(line)}")
            yield number, record


def text_of(record: dict[str, Any], name: str, number: int) -> str:
    """Return a field that must be a text. Raises ValueError, naming the fields there are."""
    if name not in record:
        there = ", ".join(map(str, record)) or "none"
        raise ValueError(f"line {number} has no {name!r}; its fields: {there}")
    if not isinstance(record[name], str):
        raise ValueError(f"line {number}: {name!r} must be text, not {record[name]!r}")
    return record[name]


def excerpt(line: bytes) -> str:
    """Return the beginning of a line, for an error."""
    return repr(line[:40].decode("utf-8", "replace").strip())
