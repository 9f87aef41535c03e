"""Texts and the tensors they belong to, replaced as one: a reader finds the old set or the new one.

A rename replaces one file, and config.json of one model would load with the weights of another:
with other heads, or with swapped labels. So everything is written aside and synced, and the rename
of the tensors' file is the commit: the old set is valid before it, the new one after it. Where a
text differs from the text that it replaces, the tensors' metadata hold both:

    nanogpt2.replaces   JSON: {file: [SHA-256 of the old text, or null; the new text]}

A reader that still finds the old text then takes the new one from there (folder.py: `current`).
Any other text is somebody's edit, and counts. Other files in the folder stay as they are.

This file does not know what the texts say.
"""

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from nanogpt2.checkpoints import tensors as tensor_file
from nanogpt2.checkpoints.folder import MANIFEST, digest_of_text
from nanogpt2.checkpoints.header import REPLACES
from nanogpt2.config import PICKLES
from nanogpt2.filesystem import sync


def replace_set(
    folder: Path,
    texts: Mapping[str, str],
    tied: Sequence[str],
    name: str,
    tensors: Mapping[str, Tensor],
    stale: str | None = None,
) -> None:
    """Write texts and the tensors' file `name` into a folder, which is made where it is missing.

    tied: the texts without which the tensors mean something else. stale: another tensors' file,
    which would stand for the old set. Deletes it and manifest.json, which states the old files.
    Raises OSError for a failed write; the folder then holds the old set or the new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = [path.name for path in folder.iterdir() if path.suffix in (".safetensors", *PICKLES)]
    held = any(not n.startswith(".") for n in kept)
    pairs = {n: [digest_of_text(folder / n), texts[n]] for n in tied if held}
    replaces = {n: pair for n, pair in pairs.items() if pair[0] != digest_of_text(texts[n])}
    random = secrets.token_hex(8)
    aside = {folder / n: folder / f".{n}.{random}.tmp" for n in (*texts, name)}
    try:
        for n, text in texts.items():
            aside[folder / n].write_bytes(text.encode())
        metadata = {REPLACES: json.dumps(replaces)} if replaces else {}
        tensor_file.write(aside[folder / name], tensors, metadata)
        for path in aside.values():
            sync(path)
        if (folder / MANIFEST).exists():
            (folder / MANIFEST).unlink()
            sync(folder)
        # without old tensors nothing is valid before the new ones: they come last
        untied = [n for n in texts if n not in tied]
        for names in ([name], untied, tied) if held else (untied, tied, [name]):
            _rename(folder, aside, names)
            if name in names and stale is not None:
                (folder / stale).unlink(missing_ok=True)
                sync(folder)
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)


def _rename(folder: Path, aside: Mapping[Path, Path], names: Iterable[str]) -> None:
    """Put files in their places, before any later rename reaches the disk."""
    for name in names:
        aside[folder / name].replace(folder / name)
    sync(folder)
