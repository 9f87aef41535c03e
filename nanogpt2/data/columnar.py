"""Tables stored by columns -> rows. They need pyarrow; only the columns that are used are decoded.

    .parquet    read whole, because its index is at its end
    .arrow      Arrow's stream or file format, as `datasets` writes it; read in batches of rows

Arrow's file format is the stream format between the letters ARROW1 and an index, which is not
needed to read from start to end. A stream that breaks off between two batches looks complete to
pyarrow, so the mark at its end is looked for. This file does not know the meaning of the columns.
Source: https://arrow.apache.org/docs/format/Columnar.html (serialization and IPC).
"""

import io
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from typing_extensions import override

from nanogpt2.data.files import DataFile

KINDS = (".parquet", ".arrow")
FILE_MAGIC = b"ARROW1"


def rows(file: DataFile) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a file. Raises ValueError for a damaged one, and without pyarrow."""
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{file.name!r} needs pyarrow: pip install pyarrow") from None
    kind = "a Parquet" if file.format == ".parquet" else "an Arrow"
    try:
        yield from _parquet(file) if file.format == ".parquet" else _arrow(file)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file.name!r} is not {kind} file: {error}") from None


class _Row(Mapping[str, Any]):
    """A row of a group of rows; a column is read from the file once a row is asked for it."""

    def __init__(self, names: list[str], column: Callable[[str], Any], index: int) -> None:
        self.names, self.column, self.index = names, column, index

    @override
    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        return self.column(name)[self.index].as_py()

    @override
    def __contains__(self, name: object) -> bool:
        return name in self.names

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @override
    def __len__(self) -> int:
        return len(self.names)


def _parquet(file: DataFile) -> Iterator[_Row]:
    from pyarrow import ArrowException, parquet

    data = b"".join(file.pieces())
    if not data:
        return
    content = parquet.ParquetFile(io.BytesIO(data))
    names = content.schema_arrow.names
    for group in range(content.num_row_groups):

        @cache
        def column(name: str, group: int = group) -> Any:
            try:
                return content.read_row_group(group, columns=[name]).column(0)
            except (ArrowException, OSError) as error:
                raise ValueError(f"{file.name!r} is damaged: {error}") from None

        for index in range(content.metadata.row_group(group).num_rows):
            yield _Row(names, column, index)


def _arrow(file: DataFile) -> Iterator[_Row]:
    from pyarrow import ArrowException, ipc

    source = _Pieces(file.pieces())
    start = source.read(8)
    if not start:
        return
    is_file = start.startswith(FILE_MAGIC)
    if not is_file:
        source.held = start + source.held
    try:
        for batch in ipc.open_stream(source):
            names = batch.schema.names

            @cache
            def column(name: str, batch: Any = batch) -> Any:
                try:
                    found = batch.column(batch.schema.names.index(name))
                    found.validate(full=True)
                    return found
                except (ArrowException, OSError) as error:
                    raise ValueError(f"{file.name!r} is damaged: {error}") from None

            yield from (_Row(names, column, index) for index in range(batch.num_rows))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name!r} is damaged: {error}") from None
    is_cut, last = source.has_ended, b""
    while piece := source.read(1 << 20):
        last = (last + piece)[-len(FILE_MAGIC) :]
    if is_cut or (is_file and last != FILE_MAGIC):
        raise ValueError(f"{file.name!r} is cut off: the mark at its end is missing")


class _Pieces:
    """A file to read, from pieces of bytes."""

    closed = False  # pyarrow asks for it

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces, self.held = pieces, b""
        self.has_ended = False

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes; fewer at the end."""
        parts, count = [self.held], len(self.held)
        while count < size and (piece := next(self.pieces, b"")):
            parts.append(piece)
            count += len(piece)
        data = b"".join(parts)
        self.held, self.has_ended = data[size:], len(data) < size
        return data[:size]
