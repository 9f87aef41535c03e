"""Write a file aside, then rename it: a reader finds the old file or the new one, both whole."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path, *, locked: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` once the block ends.

    An error in the block deletes the temporary file and leaves `path` as it was. A kill leaves the
    temporary file. locked: no other process writes `path`, so the temporary name is always the
    same, and the next write deletes that file. Otherwise the name is random: two machines that
    share a folder may have equal process ids.
    """
    random = "" if locked else f".{secrets.token_hex(8)}"
    partial = path.with_name(f".{path.name}{random}.tmp")
    # a killed run may have left a link there: never write through it
    partial.unlink(missing_ok=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
