"""Fetch bytes from a server that is not trusted into a file; the caller checks their hash.

The server's answers name nothing: no header becomes a path. A redirect may lead to https, or back
to the server asked; an HTTP address must be given as such, and gets no token. No other server gets
the token. A server below SLOWEST is given up, however it dribbles: in a header, in a body or
between the two.

This file does not know what the bytes are, nor where they are kept.
"""

import errno
import time
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from threading import Thread
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from typing_extensions import override

SLOWEST = 10_000  # bytes a second, over any WINDOW and over the whole file
WINDOW = 30.0  # seconds
TIMEOUT = 10.0  # seconds without a byte
TRIES = 5  # in a row that bring nothing new
PAUSE = 1.0  # seconds between two of them
CHUNK = 2**20  # bytes
# errors of the disk, which another try does not mend
OF_DISK = {errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EROFS}


def download(
    url: str,
    out: IO[bytes],
    size: int,
    token: str | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """Write what `url` serves, `size` bytes at most, to an open file.

    out: at its end, where the download goes on; it starts over if the server sends the whole.
    token: sent to the host of an https URL only. advance: called with the change in the number of
    bytes. Raises OSError or HTTPException for a failed or slow download, ValueError for more than
    `size` bytes.
    """
    transfer = _Transfer(url, out, size, token, advance)
    transfer.start()
    deadline = time.monotonic() + WINDOW + size / SLOWEST
    try:
        while transfer.is_alive():
            arrived = transfer.arrived
            transfer.join(WINDOW)
            slow = transfer.arrived - arrived < SLOWEST * WINDOW or time.monotonic() > deadline
            if slow and transfer.is_alive():
                raise TimeoutError(f"the server sends less than {SLOWEST} bytes a second")
    finally:
        # a transfer that was given up must write no more
        transfer.given_up = True
    if transfer.error is not None:
        raise transfer.error


class _Transfer(Thread):
    """One download, in the background: a thread that waits for a server can be left behind."""

    def __init__(
        self,
        url: str,
        out: IO[bytes],
        size: int,
        token: str | None,
        advance: Callable[[int], object],
    ) -> None:
        super().__init__(daemon=True)
        self.arrived = 0  # bytes, those of broken tries included
        self.given_up = False
        self.error: Exception | None = None
        self._url, self._out, self._size, self._advance = url, out, size, advance
        self._token = token if url.startswith("https:") else None
        self._opener = urllib.request.build_opener(_Redirects(url, self._token))

    @override
    def run(self) -> None:
        try:
            _check_address(self._url, self._url)
            self._fetch(self._out)
        except Exception as error:
            self.error = error

    def _fetch(self, out: IO[bytes]) -> None:
        """Try until the body is whole; go on where the last try broke off."""
        first = furthest = out.tell()
        tries = TRIES
        while True:
            try:
                return self._try(out)
            except HTTPError as error:
                error.close()
                raise
            except (OSError, HTTPException) as error:
                of_disk = isinstance(error, OSError) and error.errno in OF_DISK
                tries = TRIES if out.tell() > furthest else tries - 1
                furthest = max(furthest, out.tell())
                if self.given_up or of_disk or furthest == first or not tries:
                    raise
            time.sleep(PAUSE)

    def _try(self, out: IO[bytes]) -> None:
        request = urllib.request.Request(self._url)
        _authorize(request, self._token)
        start = out.tell()
        if start:
            request.add_header("Range", f"bytes={start}-")
        with self._opener.open(request, timeout=TIMEOUT) as answer:
            if answer.status != 206:
                start = 0
            elif not (answer.headers["Content-Range"] or "").startswith(f"bytes {start}-"):
                raise ValueError("the server sends another part of the file than asked for")
            self._advance(start - out.tell())
            out.seek(start)
            out.truncate()
            self._copy(answer, out)

    def _copy(self, answer: HTTPResponse, out: IO[bytes]) -> None:
        expected = answer.length
        if expected is not None and out.tell() + expected > self._size:
            raise ValueError(f"the server sends more than {self._size} bytes")
        first = out.tell()
        # read1 returns what has arrived: read would wait for a whole chunk
        while (data := answer.read1(CHUNK)) and not self.given_up:
            self.arrived += len(data)
            if out.tell() + len(data) > self._size:
                raise ValueError(f"the server sends more than {self._size} bytes")
            out.write(data)
            out.flush()
            self._advance(len(data))
        if expected is not None and out.tell() < first + expected:
            raise ConnectionError("the connection broke off")


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, asked: str, token: str | None) -> None:
        self._asked, self._token = asked, token

    @override
    def redirect_request(self, *arguments: Any) -> urllib.request.Request | None:
        # urllib would read the body to its end, which may not come
        arguments[1].close()
        _check_address(arguments[-1], self._asked)
        request = super().redirect_request(*arguments)
        if request is not None and _server(request.full_url) == _server(self._asked):
            _authorize(request, self._token)
        return request


def _authorize(request: urllib.request.Request, token: str | None) -> None:
    """Add the token, in a header that urllib does not repeat for the next server."""
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")


def _server(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _check_address(url: str, asked: str) -> None:
    """Raise OSError for a URL that is neither https nor of the HTTP server that was asked."""
    scheme, _ = _server(url)
    if scheme != "https" and not (scheme == "http" and _server(url) == _server(asked)):
        raise OSError("an address without https")
