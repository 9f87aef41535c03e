"""A source -> its files -> their bytes, unpacked -> their text, decoded. All in pieces.

A source is a path, a folder, a glob, - for standard input, or a name (pydocs, shakespeare). Text is
UTF-8 unless a byte-order mark says otherwise. This file does not know the meaning of the text.
"""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from nanogpt2 import hub
from nanogpt2.config import data_files, data_kind
from nanogpt2.filesystem import open_regular, read_input

PIECE_SIZE = 1 << 20  # bytes
# UTF-32 before UTF-16, whose mark is the beginning of UTF-32's
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


@dataclass(frozen=True)
class DataFile:
    """A file on disk, or bytes with a name. It can be read repeatedly."""

    name: str
    format: str  # .txt, .jsonl, ...: the suffix that its content is read by
    data: bytes | None = None

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes, unpacked. Raises ValueError for a damaged archive."""
        try:
            with self._open() as file:
                yield from self._unpacked(file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{self.name!r} is damaged: {error}") from None

    def text(self) -> Iterator[str]:
        """Yield the text. Raises ValueError that names the offset of an undecodable byte."""
        pieces = self.pieces()
        start = next(pieces, b"")
        # collect more bytes than the longest mark has
        while len(start) <= 4 and (more := next(pieces, b"")):
            start += more
        found = (pair for pair in BYTE_ORDER_MARKS if start.startswith(pair[0]))
        mark, encoding = next(found, (b"", "utf-8"))
        decoder = codecs.getincrementaldecoder(encoding)()
        piece, offset = start[len(mark) :], len(mark)
        while True:
            # the decoder still holds the bytes of a character that the last piece left incomplete
            begun = offset - len(decoder.getstate()[0])
            try:
                yield decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                raise ValueError(
                    f"{self.name!r} is not {encoding.upper()}: byte 0x{byte:02x} at offset "
                    f"{begun + error.start}"
                ) from None
            if not piece:
                return
            offset += len(piece)
            piece = next(pieces, b"")

    def _open(self) -> BinaryIO:
        return open_regular(Path(self.name)) if self.data is None else BytesIO(self.data)

    def _unpacked(self, file: BinaryIO) -> Iterator[bytes]:
        suffix = Path(self.name).suffix.lower() if self.data is None else ""
        if suffix == ".zst":
            yield from self._unpacked_zst(file)
        else:
            stream = gzip.GzipFile(fileobj=file) if suffix == ".gz" else file
            while piece := stream.read(PIECE_SIZE):
                yield piece

    def _unpacked_zst(self, file: BinaryIO) -> Iterator[bytes]:
        """Unpack a .zst file: frames in a row, the last of them complete."""
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{self.name!r} needs zstandard: pip install zstandard") from None
        frame = None
        # a small piece can unpack to a large one
        while piece := file.read(PIECE_SIZE // 16):
            while piece:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    if data := frame.decompress(piece):
                        yield data
                except zstandard.ZstdError as error:
                    raise ValueError(f"{self.name!r} is damaged: {error}") from None
                piece = frame.unused_data
                frame = None if frame.eof else frame
        if frame is not None:
            raise ValueError(f"{self.name!r} is damaged: its end is missing")


def find_files(source: str, stdin_format: str = ".txt") -> list[DataFile]:
    """Return the files of a source, sorted by name; standard input has the format `stdin_format`.

    Raises ValueError or OSError for a source without a file to read.
    """
    if source == "-":
        return [DataFile("standard input", stdin_format, read_input(source))]
    if source == "pydocs":
        from pydoc_data.topics import topics

        return [DataFile(f"pydocs {n}", ".txt", topics[n].encode()) for n in sorted(topics)]
    if source == "shakespeare":
        return [DataFile(str(hub.fetch_shakespeare()), ".txt")]
    paths = data_files(source)
    if any(path.suffix == ".tokens" for path in paths) and len(paths) > 1:
        raise ValueError(f"{source!r} has a .tokens file among others: give one such file alone")
    return [DataFile(str(path), _format(path)) for path in paths]


def _format(path: Path) -> str:
    # a file named on the command line is text if its suffix is unknown
    return ".tokens" if path.suffix == ".tokens" else data_kind(path) or ".txt"
