"""The two containers of torch.save: where the pickle and each storage's bytes are in the file.

Since PyTorch 1.6 a zip file, its records uncompressed, all in one folder:

    NAME/data.pkl       the pickle: tensors by name, each with a storage's key, shape and strides
    NAME/data/KEY       the bytes of a storage
    NAME/byteorder      little or big; NAME/version and NAME/.* hold nothing that is needed

Before, five pickles and then the storages' bytes: a magic number, a version, facts about the
system, the tensors, the list of the storages' keys. Each storage's bytes follow their count of
numbers (8 bytes).

`opcodes` lists what a pickle would do and runs nothing. This file does not import torch and does
not know the meaning of the pickle. Sources: torch/serialization.py and Python's pickletools.
"""

import io
import pickletools
import re
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

ZIP = b"PK\x03\x04"
OLD_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number, pickled
OLD_VERSION = b"\x80\x02M\xe9\x03."  # 1001, pickled
LONGEST_PICKLE = 2**24  # bytes: far above that of a run's checkpoint with the most layers
MOST_RECORDS = 2**17
LOCAL_HEADER = 30  # bytes before the name
RECORD = re.compile(r"data\.pkl|version|byteorder|data/[0-9]+|\.[A-Za-z0-9_./]+")
# those that torch.load(weights_only=True) knows
KNOWN = """
GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 TUPLE3 NONE
NEWFALSE NEWTRUE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET BININT BININT1 BININT2 BINFLOAT
BINUNICODE SHORT_BINSTRING BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT LONG1 PROTO STOP
"""
OPCODES = frozenset(KNOWN.split())
PUTS = ("BINPUT", "LONG_BINPUT")


class Place(NamedTuple):
    """The bytes of a storage in the file."""

    start: int
    size: int


class Opcode(NamedTuple):
    """One instruction of a pickle, and its effect on the stack."""

    name: str
    argument: Any
    place: int
    takes: int  # values off the stack
    to_mark: bool  # before them, all values down to the last mark, and the mark
    makes: int


@dataclass
class Archive:
    """A pickle, and the places of the storages that it names."""

    pickle: bytes
    keys: tuple[str, ...]
    _places: dict[str, Place] = field(default_factory=dict)
    _old: tuple[IO[bytes], int] | None = None  # the file, and where the first storage begins

    def places(self, widths: Mapping[str, int]) -> dict[str, Place]:
        """Return where each storage is. widths: bytes of one number, by the storage's key.

        Raises ValueError for a storage outside the file.
        """
        if self._old is None:
            return self._places
        file, place = self._old
        end = file.seek(0, 2)
        for key in self.keys:
            if key not in widths:
                raise ValueError(f"no tensor uses its storage {key[:20]!r}")
            file.seek(place)
            size = int.from_bytes(file.read(8), "little") * widths[key]
            self._places[key] = Place(place + 8, size)
            place += 8 + size
            if place > end:
                raise ValueError(f"it was cut short at its storage {key[:20]!r}")
        if place != end:
            raise ValueError(f"it goes on for {end - place} bytes after its tensors")
        return self._places


def opcodes(data: bytes) -> Iterator[Opcode]:
    """List the instructions of a pickle, and run none. Raises ValueError for a broken one."""
    try:
        for code, argument, place in pickletools.genops(data):
            to_mark = pickletools.markobject in code.stack_before
            takes = len(code.stack_before) - (2 if to_mark else 0)
            makes = len(code.stack_after)
            yield Opcode(code.name, argument, place or 0, takes, to_mark, makes)
    except (ValueError, IndexError, struct.error) as error:
        raise ValueError(f"its pickle is broken: {error}") from None


def read_zip(file: IO[bytes]) -> Archive:
    """Find a zip file's records. Raises ValueError for a file that torch.save did not write."""
    try:
        # closing it does not close the file
        with zipfile.ZipFile(file) as archive:
            entries, end = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError, OSError) as error:
        raise ValueError(f"its zip directory: {error}") from None
    if len(entries) > MOST_RECORDS:
        raise ValueError(f"it has {len(entries):,} records, above {MOST_RECORDS:,}")
    records: dict[str, Place] = {}
    tops, last = set(), 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.is_dir() and entry.file_size == 0:
            continue
        top, _, name = entry.filename.partition("/")
        tops.add(top)
        if name in ("constants.pkl", "code/") or name.startswith("code/"):
            raise ValueError("it is a TorchScript archive, which holds code: save its state_dict")
        if name in records or not RECORD.fullmatch(name) or len(tops) > 1 or ".." in name:
            raise ValueError(f"torch.save writes no record {entry.filename[:60]!r} here")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"{name} is compressed: unpack the zip file and pack it by zip -0 -r")
        if entry.flag_bits & 1 or stat.S_ISLNK(entry.external_attr >> 16):
            raise ValueError(f"{name} is encrypted or a link")
        start = _data_of(file, entry) if entry.header_offset >= last else end
        if entry.header_offset < last or start + entry.file_size > end:
            raise ValueError(f"{name} is outside the file, or overlaps another record")
        records[name] = Place(start, entry.file_size)
        last = start + entry.file_size
    return _of_records(file, records)


def _data_of(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Return where a record's bytes begin, by the header in front of them."""
    file.seek(entry.header_offset)
    header = file.read(LOCAL_HEADER)
    if len(header) < LOCAL_HEADER or not header.startswith(ZIP):
        raise ValueError(f"the header of {entry.filename[:60]!r} is missing")
    name, extra = struct.unpack("<2H", header[26:])
    return entry.header_offset + LOCAL_HEADER + int(name) + int(extra)


def _of_records(file: IO[bytes], records: Mapping[str, Place]) -> Archive:
    if "data.pkl" not in records:
        raise ValueError("it has no data.pkl")
    if "byteorder" in records and _bytes(file, records["byteorder"], 16) != b"little":
        raise ValueError("its byteorder must be little: save it again on such a machine")
    pickle = _bytes(file, records["data.pkl"], LONGEST_PICKLE)
    places = {n.removeprefix("data/"): p for n, p in records.items() if n.startswith("data/")}
    return Archive(pickle, tuple(places), places)


def _bytes(file: IO[bytes], place: Place, most: int) -> bytes:
    if place.size > most:
        raise ValueError(f"its pickle has {place.size:,} bytes, above {most:,}")
    file.seek(place.start)
    return file.read(place.size)


def read_old(file: IO[bytes]) -> Archive:
    """Find the parts of a file from before PyTorch 1.6; raises ValueError as `read_zip` does."""
    file.seek(0)
    head = file.read(LONGEST_PICKLE)
    place = len(OLD_PICKLE)
    if head[place : place + len(OLD_VERSION)] != OLD_VERSION:
        raise ValueError("its version is unknown")
    place += len(OLD_VERSION)
    parts = []
    for _ in range(3):
        end = 1 + [code.place for code in opcodes(head[place:])][-1]
        parts.append(head[place : place + end])
        place += end
    _, tensors, keys = parts
    names = []
    for code in opcodes(keys):
        if code.name in ("BINUNICODE", "SHORT_BINSTRING"):
            names.append(str(code.argument))
    if len({*names}) < len(names) or not all(re.fullmatch("[0-9]{1,40}", n) for n in names):
        raise ValueError("the keys of its storages are no different numbers")
    return Archive(tensors, tuple(names), _old=(file, place))


def _with_short_ids(pickle: bytes) -> bytes:
    """Drop the sixth field of each persistent id: None in old files, absent in zip files."""
    codes = [code for code in opcodes(pickle) if code.name not in PUTS]
    kept = io.BytesIO()
    begin = 0
    for i, code in enumerate(codes):
        if code.name == "BINPERSID":
            none, last = codes[i - 2 : i] if i > 1 else (code, code)
            if (none.name, last.name) != ("NONE", "TUPLE"):
                raise ValueError("a storage is a view of another: save it again by a newer PyTorch")
            kept.write(pickle[begin : none.place])
            begin = none.place + 1
    kept.write(pickle[begin:])
    return kept.getvalue()


def clean_zip(archive: Archive) -> tuple[IO[bytes], dict[int, str]]:
    """Make a zip file of the pickle and empty storages, for torch.load.

    Return with it the key of each storage by the place of its bytes. Raises ValueError for a
    pickle that no zip file can hold.
    """
    out, keys = io.BytesIO(), {}
    pickle = archive.pickle if archive._old is None else _with_short_ids(archive.pickle)
    with zipfile.ZipFile(out, "w") as made:
        made.writestr("archive/data.pkl", pickle)
        made.writestr("archive/version", "3\n")
        made.writestr("archive/byteorder", "little")
        for key in archive.keys:
            name = f"archive/data/{key}"
            made.writestr(name, b"")
            keys[made.getinfo(name).header_offset + LOCAL_HEADER + len(name)] = key
    out.seek(0)
    return out, keys
