"""Write a file aside, then rename it: a reader finds the old file or the new one, both whole."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path, *, locked: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` once the block ends.

    An error in the block deletes the temporary file and leaves `path` as it was. A kill leaves the
    temporary file. locked: no other process writes `path`, so the temporary name is always the
    same, and the next write replaces that file. Otherwise the name is random: two machines that
    share a folder may have equal process ids.
    """
    random = "" if locked else f".{secrets.token_hex(8)}"
    partial = path.with_name(f".{path.name}{random}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Sync a file or a folder from the kernel's cache to the disk.

    A file system that cannot sync a folder decides itself when its names reach the disk.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
