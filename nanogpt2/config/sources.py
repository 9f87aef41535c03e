"""A source -> its files: of a path, a folder or a glob.

Every real file is listed once, under one name, however many links lead to it. Hidden entries, the
files of a model or a run, and documents (Word, PDF, HTML) are skipped; `Skip` is told of each. Of a
file only the first bytes are read, to know a document.
"""

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nanogpt2.config import corpora, documents
from nanogpt2.config.flags import show

DATA_NAMES = ("pydocs", "shakespeare")
DATA_KINDS = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
# a folder that holds one of MARKS is a model's or a run's: OWN_FILES and OWN_FOLDERS are its parts
MARKS = ("model.safetensors", "pytorch_model.bin", "run.json", "vocab.json")
OWN_FOLDERS = ("checkpoints", "adapter", "tensorboard")
OWN_FILES = (
    *("run.json", "metrics.jsonl", "config.json", "generation_config.json", "manifest.json"),
    *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"),
    *("special_tokens_map.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
)

Skip = Callable[[str, str], None]  # called with a reason and a file's or a folder's name


def no_report(reason: str, name: str) -> None:
    """Count nothing: the default `Skip`."""


def check_data(source: str, out: str | None = None) -> None:
    """Raise ValueError if `source` cannot be training data. Reads first bytes only."""
    if source not in (*DATA_NAMES, "-"):
        data_splits(source, out)


def data_files(source: str, out: str | None = None, skip: Skip = no_report) -> list[Path]:
    """List the files of a path or a glob, sorted by name; of a folder, the files of known kinds.

    out: the folder that the run writes, which is no data. Raises ValueError if no file is left, for
    one document, and for several splits (training, validation, test): name one.
    """
    splits = data_splits(source, out, skip)
    if len(splits) > 1:
        raise ValueError(f"{show(source)} holds {', '.join(sorted(splits))}: name the files of one")
    return next(iter(splits.values()))


def data_splits(
    source: str, out: str | None = None, skip: Skip = no_report
) -> dict[str, list[Path]]:
    """Return the files of a source by split: train, validation and test, or "" for all files.

    Beside files of token ids, other files are no data. Raises ValueError as `data_files` does.
    """
    paths = _files(source, out, skip)
    corpora.check_saved(paths)
    others = [path for path in paths if path.suffix.lower() not in corpora.TOKEN_KINDS]
    if len(others) < len(paths):
        for path in others:
            skip("beside files of tokens", str(path))
        paths = sorted({*paths} - {*others})
    for path in paths:
        corpora.check_ids(path)
    splits: dict[str, list[Path]] = {}
    for path in paths:
        splits.setdefault(corpora.split_of(path), []).append(path)
    if len(splits) > 1 and {"train", ""} & splits.keys():
        # files of no split are trained on; a saved data set's other splits are not
        splits["train"] = sorted([*splits.pop("train", []), *splits.pop("", [])])
        for path in splits.pop("other", []):
            skip("of another split", str(path))
    return splits if len(splits) > 1 else {"": next(iter(splits.values()))}


def _files(source: str, out: str | None, skip: Skip) -> list[Path]:
    path, seen = Path(source), list[str]()

    def is_text(file: Path) -> bool:
        """Tell whether a file is no document; say so otherwise."""
        if corpora.holds_ids(file):
            return True
        if (kind := documents.document_in(file)) is None:
            return True
        seen.append(f"{show(str(file))} is {documents.advice(kind, str(file))}")
        skip(documents.advice(kind), str(file))
        return False

    if not source or "\0" in source:
        found = []
    elif path.is_dir():
        walk = _walk(path, out, skip)
        paths = (folder / name for folder, names in walk for name in names)
        found = _once((p for p in paths if _is_read(p, is_text, skip)), skip)
        if not found and not seen:
            raise ValueError(
                f"{show(source)} has no file to read ({', '.join(DATA_KINDS)}; also .gz, .zst)"
            )
    elif path.is_file():
        found = [path] if is_text(path) else []
    else:
        matches = (Path(match) for match in _matches(source, out, skip))
        matches = (p for p in matches if p.is_file() and not _is_own(p, skip) and is_text(p))
        found = _once(matches, skip)
    if seen and not found:
        raise ValueError(seen[0])
    if not found:
        known = ", ".join(DATA_NAMES)
        raise ValueError(f"{show(source)} is not a file, a folder or a known text ({known})")
    return sorted(found)


def data_kind(path: str | Path) -> str | None:
    """Return a file's kind by its suffix: one of DATA_KINDS, or None."""
    name = str(path).lower().removesuffix(".gz").removesuffix(".zst")
    return next((kind for kind in DATA_KINDS if name.endswith(kind)), None)


def _is_read(path: Path, is_text: Callable[[Path], bool], skip: Skip) -> bool:
    """Tell whether a file found in a folder is read."""
    is_document = path.suffix.lower() in documents.SUFFIXES and path.is_file()
    if path.name.startswith("."):
        skip("hidden", str(path))
    elif path.is_file() and corpora.holds_ids(path):
        return True
    elif not data_kind(path):
        # is_text says what to do with a document
        if not is_document or is_text(path):
            skip("of another kind", str(path))
    elif not path.is_file():
        skip("not a file", str(path))
    else:
        return not _is_own(path, skip) and is_text(path)
    return False


def _is_own(path: Path, skip: Skip) -> bool:
    own = path.name in OWN_FILES and any((path.parent / mark).exists() for mark in MARKS)
    if own:
        skip("of a model or a run", str(path))
    elif own := corpora.is_beside_saved(path):
        skip("beside a saved data set", str(path))
    return own


def _once(paths: Iterable[Path], skip: Skip) -> list[Path]:
    """Drop the other names of a file; the name that needs no link stays."""
    found: dict[str, Path] = {}
    real = {path: os.path.realpath(path) for path in paths}
    for path in sorted(real, key=lambda p: (str(p.absolute()) != real[p], len(p.parts), p)):
        if found.setdefault(real[path], path) != path:
            skip("a link to a file already read", str(path))
    return list(found.values())


def _matches(pattern: str, out: str | None, skip: Skip) -> Iterator[str]:
    """Expand a glob; ** stands for a folder and the folders below, as `_walk` lists them."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from glob.glob(pattern)  # noqa: PTH207, Path.glob rejects absolute patterns
        return
    i = parts.index("**")
    for top in glob.glob(str(Path(*parts[:i]))) if i else ["."]:  # noqa: PTH207
        for folder, _ in _walk(Path(top), out, skip):
            below = Path(glob.escape(str(folder)), *(parts[i + 1 :] or ["*"]))
            yield from _matches(str(below), out, skip)


def _walk(top: Path, out: str | None, skip: Skip) -> Iterator[tuple[Path, list[str]]]:
    """Yield (folder, names of its files) for `top` and the folders below, each real folder once.

    Links are followed last, and never to a folder that holds `top`.
    """
    real_top, real_out = top.resolve(), out and Path(out).resolve()
    seen: set[Path] = set()
    places = [top]
    for place in places:
        for found, below, names in os.walk(
            place, onerror=lambda error: skip("unreadable", str(error.filename))
        ):
            folder = Path(found)
            if (real := folder.resolve()) in seen:
                below.clear()
                continue
            seen.add(real)
            has_run = "run.json" in names
            for path in [folder / name for name in sorted(below)]:
                target = path.resolve()
                if path.name.startswith("."):
                    skip("hidden", str(path))
                elif target == real_out or (has_run and path.name in OWN_FOLDERS):
                    skip("of a model or a run", str(path))
                elif target == real_top or target in real_top.parents:
                    skip("a link to a folder around it", str(path))
                else:
                    if path.is_symlink():
                        places.append(path)
                    continue
                below.remove(path.name)
            yield folder, sorted(names)
