"""A source -> its files -> their bytes, unpacked -> their text, decoded. All in pieces.

A source is a path, a folder, a glob, - for standard input, or a name (pydocs, shakespeare). Text is
UTF-8, or in the encoding given, unless a byte-order mark says otherwise. Its lines end in a line
feed, whatever they ended in. This file does not know the meaning of the text.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from nanogpt2 import hub
from nanogpt2.config import (
    TOKEN_KINDS,
    Skip,
    data_kind,
    data_splits,
    no_report,
    refuse_document,
)
from nanogpt2.filesystem import open_regular, read_input

PIECE_SIZE = 1 << 20  # bytes
# an archive that unpacks to more than both is one byte repeated, not text
BOMB_SIZE, BOMB_RATIO = 1 << 28, 250  # bytes, times the archive's bytes
# UTF-32 before UTF-16, whose mark is the beginning of UTF-32's
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


# files of token ids
TOKENS = (".tokens", *TOKEN_KINDS)


class EncodingError(ValueError):
    """A file in another encoding than it is read in."""

    def __init__(self, file: "DataFile", encoding: str, byte: str, is_guessed: bool) -> None:
        super().__init__(f"{file.name!r} is not {encoding.upper()}: {byte}")
        self.file, self.encoding, self.byte = file, encoding, byte
        # nothing but ASCII before, and no mark: the encoding may be any other
        self.is_guessed = is_guessed


@dataclass(frozen=True)
class DataFile:
    """A file on disk, or bytes with a name. It can be read repeatedly."""

    name: str
    format: str  # .txt, .jsonl, ...: the suffix that its content is read by
    data: bytes | None = None
    encoding: str = "utf-8"  # without a byte-order mark

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes, unpacked. Raises ValueError for a damaged archive, or one of no text."""
        size = 0
        try:
            with self._open() as file:
                for piece in self._unpacked(file):
                    size += len(piece)
                    if size > BOMB_SIZE and size > BOMB_RATIO * file.tell():
                        raise ValueError(
                            f"{self.name!r} unpacks to more than {BOMB_RATIO} times its size and "
                            f"{BOMB_SIZE >> 20} MiB: expected a text"
                        )
                    yield piece
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{self.name!r} is damaged: {error}") from None

    def text(self) -> Iterator[str]:
        """Yield the text. Raises EncodingError that names the offset of an undecodable byte."""
        pieces = self.pieces()
        start = next(pieces, b"")
        # collect more bytes than the longest mark has
        while len(start) <= 4 and (more := next(pieces, b"")):
            start += more
        found = (pair for pair in BYTE_ORDER_MARKS if start.startswith(pair[0]))
        mark, encoding = next(found, (b"", codecs.lookup(self.encoding).name))
        # without a mark these two need the order of the bytes
        encoding += "-le" if encoding in ("utf-16", "utf-32") else ""
        decoder = codecs.getincrementaldecoder(encoding)()
        newlines = io.IncrementalNewlineDecoder(None, translate=True)
        piece, offset, is_ascii = start[len(mark) :], len(mark), not mark
        while True:
            # the decoder still holds the bytes of a character that the last piece left incomplete
            begun = offset - len(decoder.getstate()[0])
            try:
                text = decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                byte = f"byte 0x{error.object[error.start]:02x} at offset {begun + error.start}"
                is_ascii = is_ascii and error.object[: error.start].isascii()
                raise EncodingError(self, encoding, byte, is_ascii) from None
            yield newlines.decode(text, final=not piece)
            if not piece:
                return
            is_ascii = is_ascii and text.isascii()
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
        # 4 bytes can unpack to 128 KiB
        while piece := file.read(max(1, PIECE_SIZE >> 10)):
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


def find_files(
    source: str,
    stdin_format: str = ".txt",
    *,
    encoding: str = "utf-8",
    out: str | None = None,
    skip: Skip = no_report,
) -> list[DataFile]:
    """Return the files of a source, sorted by name.

    stdin_format: the format of standard input, unless that holds JSON objects.
    encoding: of the files without a byte-order mark. out: the folder that a run writes, which is no
    data. skip: told of each file that is not read. Raises ValueError or OSError for a source
    without a file to read, or with several splits.
    """
    splits = find_splits(source, stdin_format, encoding=encoding, out=out, skip=skip)
    if len(splits) > 1:
        found = ", ".join(sorted(splits))
        raise ValueError(f"{source!r} holds several splits ({found}): name the files of one")
    return next(iter(splits.values()))


def find_splits(
    source: str,
    stdin_format: str = ".txt",
    *,
    encoding: str = "utf-8",
    out: str | None = None,
    skip: Skip = no_report,
) -> dict[str, list[DataFile]]:
    """Return the files of each split: train, validation and test; "" where there are no splits.

    The arguments and errors are those of `find_files`.
    """
    if source == "-":
        data = read_input(source)
        refuse_document(data)
        file = DataFile("standard input", stdin_format, data, encoding)
        return {"": [replace(file, format=".jsonl") if _holds_objects(file) else file]}
    if source == "pydocs":
        from pydoc_data.topics import topics

        names = sorted(topics)
        return {"": [DataFile(f"pydocs {n}", ".txt", topics[n].encode()) for n in names]}
    if source == "shakespeare":
        return {"": [DataFile(str(hub.fetch_shakespeare()), ".txt")]}
    splits = data_splits(source, out, skip)
    for paths in splits.values():
        if any(path.suffix == ".tokens" for path in paths) and len(paths) > 1:
            raise ValueError(
                f"{source!r} has a .tokens file among others: give one such file alone"
            )
    return {
        split: [DataFile(str(path), _format(path), encoding=encoding) for path in paths]
        for split, paths in splits.items()
    }


def encoding_of(files: Sequence[DataFile]) -> str | None:
    """Return an encoding that reads files which are not UTF-8; None if they may be binary."""
    for encoding in ("cp1252", "latin-1"):
        try:
            for file in files:
                if any(b"\0" in piece for piece in file.pieces()):
                    return None
                for _ in replace(file, encoding=encoding).text():
                    pass
            return encoding
        except EncodingError:
            continue
    return None


def _holds_objects(file: DataFile) -> bool:
    """Tell whether a text is JSON Lines or an array of objects: standard input has no suffix."""
    try:
        text = "".join(file.text()).lstrip()
        value = json.loads(text if text.startswith("[") else text.partition("\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(item, dict) for item in value)
    )


def _format(path: Path) -> str:
    if path.suffix == ".tokens" or path.suffix.lower() in TOKEN_KINDS:
        return path.suffix.lower()
    # a file named on the command line is text if its suffix is unknown
    kind = data_kind(path) or ".txt"
    return ".jsonl" if kind == ".ndjson" else kind
