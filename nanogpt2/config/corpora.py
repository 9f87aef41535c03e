"""Corpora that other programs prepared: files of token ids, and data sets saved by `datasets`.

    train.bin, val.bin               nanoGPT's: 16-bit ids, no header; known by the name alone
    NAME_train_000001.bin, ..._val_  llm.c's and modded-nanogpt's shards, known by their header
    NAME_train_000001.npy            arrays of ids, as numpy saves them
    dataset_dict.json, state.json, dataset_info.json, *.arrow     `save_to_disk` of Hugging Face's
                                     datasets, or their cache

Training and validation are told apart by the name of the file, or of its folder in a saved
DatasetDict. Of a file of ids only the first bytes are read here, of the JSON files all; a pickle
(nanoGPT's meta.pkl) is never opened.
"""

import json
import re
import struct
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from nanogpt2.config.flags import show

TOKEN_KINDS = (".bin", ".npy")
# of the shards of GPT-2's and of Llama 3's ids: magic -> (version, bytes of an id)
SHARD_MAGICS = {20240520: (1, 2), 20240801: (7, 4)}
# llm.c's other files begin with a date too: models, tokenizers, evaluations
DATES = range(20240101, 20291232)
NPY_MAGIC, ZIP_MAGIC = (int.from_bytes(start, "little") for start in (b"\x93NUM", b"PK\3\4"))
SPLITS = {
    "train": ("train",),
    "validation": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test",),
}
# what `datasets` writes beside its .arrow files
SAVED_FILES = ("state.json", "dataset_info.json", "dataset_dict.json")
LARGEST_JSON = 2**24  # bytes; dataset_info.json may list a million files


def split_in(name: str) -> str:
    """Return the split that a name states: train, validation, test or, for none, ""."""
    words = set(re.split("[^a-z]+", name.lower()))
    return next((split for split, known in SPLITS.items() if words & {*known}), "")


def magic_of(path: Path) -> int:
    """Return the first four bytes as a number; -1 for a file that is shorter or unreadable."""
    try:
        with path.open("rb") as file:
            return struct.unpack("<i", file.read(4))[0]
    except (OSError, struct.error):
        return -1


def holds_ids(path: Path) -> bool:
    """Tell whether a file is known to hold token ids: by its header, or by its name."""
    suffix = path.suffix.lower()
    if suffix not in TOKEN_KINDS:
        return False
    magic, is_named = magic_of(path), split_in(path.stem) != ""
    if suffix == ".npy":
        return magic == NPY_MAGIC and is_named
    # torch.save writes ZIP archives called .bin
    return magic in SHARD_MAGICS or (is_named and magic != ZIP_MAGIC)


def check_ids(path: Path) -> None:
    """Raise ValueError for a file named as one of ids that does not look like one."""
    suffix, magic = path.suffix.lower(), magic_of(path)
    if suffix == ".bin" and magic not in SHARD_MAGICS and magic in DATES:
        raise ValueError(f"{show(str(path))} has llm.c's magic {magic}: no shard of tokens")
    if suffix == ".bin" and not holds_ids(path):
        raise ValueError(
            f"{show(str(path))} is not known to hold token ids: it has no header of llm.c's, and "
            "nanoGPT's are called train.bin and val.bin"
        )


def split_of(path: Path) -> str:
    """Return the split that a file belongs to: train, validation, test, other, or "" for none."""
    folder = path.parent
    if path.suffix.lower() in TOKEN_KINDS:
        return split_in(path.stem)
    if path.suffix == ".arrow" and (folder.parent / "dataset_dict.json").exists():
        return split_in(folder.name) or "other"
    if path.suffix == ".arrow" and not (folder / "state.json").exists():
        return split_in(path.stem) if (folder / "dataset_info.json").exists() else ""
    return ""


def is_beside_saved(path: Path) -> bool:
    """Tell whether a file belongs to a saved data set but is none of its data."""
    folder = path.parent
    if path.name in SAVED_FILES:
        several = sum((folder / name).exists() for name in SAVED_FILES) > 1
        is_saved = several or path.name == "dataset_dict.json" or any(folder.glob("*.arrow"))
        if is_saved and path.name == "state.json":
            _data_files(folder)
        return is_saved
    if path.suffix != ".arrow":
        return False
    state = folder / "state.json"
    if state.exists():
        return path.name not in _listed_in(state, state.stat().st_mtime_ns)
    # results of map and filter
    return (folder / "dataset_info.json").exists() and path.name.startswith(("cache-", "tmp"))


def check_saved(paths: Iterable[Path]) -> None:
    """Raise ValueError for a saved data set that lacks a file, or is a selection of its rows."""
    for folder in sorted({path.parent for path in paths if path.suffix == ".arrow"}):
        if (folder / "state.json").exists():
            _data_files(folder)


@lru_cache(maxsize=8)
def _listed_in(state: Path, mtime_ns: int) -> frozenset[str]:
    """Return the names in a state.json, read once for all files beside it."""
    return frozenset(_data_files(state.parent))


def _data_files(folder: Path) -> list[str]:
    """Return the names that state.json lists. Raises ValueError for a damaged or lacking one."""
    path = folder / "state.json"
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError
        state = json.loads(path.read_text(encoding="utf-8"))
        names = [str(file["filename"]) for file in state["_data_files"]]
        # of releases before 2.0
        indices = state.get("_indices_data_files") or state.get("_indices_files")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise ValueError(f"{show(str(path))} is damaged: _data_files is not a list") from None
    if indices:
        raise ValueError(
            f"{show(str(folder))} is a selection of rows (_indices_files in state.json): call "
            "flatten_indices() before save_to_disk"
        )
    if any(Path(name).name != name or name in ("", "..") for name in names):
        raise ValueError(f"{show(str(path))} lists a file outside its folder")
    if lacking := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{show(str(folder))} lacks {lacking[0]}, which its state.json lists")
    return names
