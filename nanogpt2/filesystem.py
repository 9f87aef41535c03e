"""The file system: files that end, and the services that weaker file systems lack.

A path may lead to a pipe that nobody writes to, to a device without an end, or to a huge file:
`open_regular` and `read_input` refuse these before they read. `lock` and `sync` go on without the
service, with one note, where the file system or Windows lacks it. This file does not know the
content of the files.
"""

import errno
import os
import re
import stat
import sys
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, TextIO

from nanogpt2 import terminal

try:
    import fcntl
except ImportError:
    # Windows has no fcntl
    fcntl = None  # type: ignore[assignment]

LARGEST_INPUT = 2**30  # bytes of a prompt file or of standard input
# how a file system refuses a service that it lacks
UNSUPPORTED = {
    errno.EBADF,
    errno.EINVAL,
    errno.ENOLCK,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.ENOTTY,
    errno.EOPNOTSUPP,
    errno.EPERM,
}
# descriptors of this process: somebody writes to such a pipe, as in --prompts <(...)
GIVEN = re.compile(r"/dev/stdin|/dev/fd/[0-9]+|/proc/self/fd/[0-9]+")


def open_regular(path: Path, largest: int | None = None) -> BufferedReader:
    """Open a file to read it.

    Raises ValueError for a pipe, a device, a folder, and a file above `largest` bytes; OSError for
    an absent file.
    """
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r} is no path: it contains NUL")
    # reading a pipe could wait forever; one stat, since the file may be deleted meanwhile
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{str(path)!r} is no regular file")
    file = path.open("rb")
    size = os.fstat(file.fileno()).st_size
    if largest is not None and size > largest:
        file.close()
        raise ValueError(f"{str(path)!r} must be {largest:,} bytes at most, not {size:,}")
    return file


def read_input(source: str) -> bytes:
    """Return the bytes of a file, or of standard input for -, LARGEST_INPUT at most.

    A pipe that this process was started with (<(...) in a shell) is read too. Raises ValueError or
    OSError for a source that cannot be read to its end.
    """
    if source == "-":
        return _read_limited(sys.stdin.buffer, "standard input")
    path = Path(source)
    is_given = GIVEN.fullmatch(source) is not None
    with path.open("rb") if is_given else open_regular(path, LARGEST_INPUT) as file:
        return _read_limited(file, repr(source))


def _read_limited(file: BinaryIO, name: str) -> bytes:
    pieces, size = [], 0
    while piece := file.read(2**20):
        size += len(piece)
        if size > LARGEST_INPUT:
            raise ValueError(f"{name} must be {LARGEST_INPUT:,} bytes at most; it goes on")
        pieces.append(piece)
    return b"".join(pieces)


def lock(path: Path) -> TextIO:
    """Open and lock a file until it is closed or this process ends, even by a kill.

    Raises BlockingIOError if another process holds the lock.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{str(path)!r} is no regular file")
    # "a" leaves a file of the user's as it is
    file = path.open("a")
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # the last holder may have deleted the file after it was opened here
        if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
            raise BlockingIOError(errno.EAGAIN, "the lock was deleted")
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            file.close()
            raise
        terminal.note_once("note: no file locks here: start no second run in this folder")
    return file


def sync(path: Path) -> None:
    """Sync a file or a folder from the kernel's cache to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Windows cannot open a folder
        unreadable_folder = isinstance(error, PermissionError) and path.is_dir()
        if error.errno not in UNSUPPORTED and not unreadable_folder:
            raise
        terminal.note_once("note: no fsync of folders here: a power cut may undo the last save")
