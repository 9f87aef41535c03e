"""A run's checkpoints on disk: everything that a resumed run needs, complete or absent.

A checkpoint is a folder `step-N`:

    model.safetensors, config.json, ...   the model, as `load_model` and transformers read it
    training.safetensors                  the trainer's other tensors: optimizer, generators, ...
    state.json                            the rest
    manifest.json                         {file: {size, sha256}} of all these files

A save writes `step-N.tmp`, the manifest last, syncs every file to the disk, then renames the
folder. A reader trusts a folder only if its files match its manifest. After the rename, `best`
points at the best checkpoint, the new model replaces the run's model, and old checkpoints are
deleted. A resumed run repeats these three, in case a kill came between them. Nothing is pickled.

This file does not know the loop, the schedule or the tensors' meaning.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanogpt2 import terminal
from nanogpt2.checkpoints.folder import MANIFEST, WEIGHTS, read_manifest
from nanogpt2.checkpoints.save import save_model
from nanogpt2.classifier import Model
from nanogpt2.filesystem import UNSUPPORTED, open_regular, sync
from nanogpt2.tokenizer import Tokenizer

STATE, TENSORS = "state.json", "training.safetensors"


def commit(
    out: Path,
    model: Model,
    tokenizer: Tokenizer,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
) -> None:
    """Save a run as `out`/checkpoints/step-`state["step"]`; publish its model in `out`.

    Deletes old checkpoints last, but keeps the newest `keep` and the best. Raises OSError, and
    then leaves every earlier checkpoint intact.
    """
    save_checkpoint(out / "checkpoints", model, tokenizer, tensors, state)
    settle(out, state, keep)


def settle(out: Path, state: dict[str, Any], keep: int) -> None:
    """Finish a commit: mark the best, publish the model, prune. Repeating it changes nothing."""
    saved = out / "checkpoints" / f"step-{state['step']}"
    if state["is_best"]:
        mark_best(saved)
    publish(saved, out)
    prune(saved, keep)


def save_checkpoint(
    folder: Path,
    model: Model,
    tokenizer: Tokenizer,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
) -> Path:
    """Write `folder/step-N` and return its path. Raises OSError; then the others are unchanged."""
    final = folder / f"step-{state['step']}"
    if is_whole(final):
        return final
    partial = final.with_suffix(".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(model, partial, tokenizer)
    try:
        save_file(tensors, partial / TENSORS)
    except SafetensorError as error:
        # safetensors reports a full disk by this error
        raise OSError(str(error)) from error
    (partial / STATE).write_text(json.dumps(state), encoding="utf-8")
    entries = {file.name: _digest(file) for file in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(_manifest_text(entries), encoding="utf-8")
    for file in partial.iterdir():
        sync(file)
    sync(partial)
    # replace a damaged folder of this step
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync(folder)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest intact checkpoint; None without any checkpoint.

    Prints a note for each damaged checkpoint it skips. Raises ValueError when all are damaged.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        if is_whole(path):
            return path
        terminal.note(f"{path} is damaged: trying the checkpoint before it")
    if found:
        raise ValueError(f"found only damaged checkpoints in {str(folder)!r}; none was deleted")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Return the committed checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch("[0-9]+", path.name[5:])]
    return sorted(found, key=lambda path: int(path.name[5:]))


def is_whole(path: Path) -> bool:
    """Return True if every file has the size and SHA-256 that the manifest states."""
    try:
        entries = read_manifest(path) or {}
        return (
            {WEIGHTS, TENSORS, STATE} <= entries.keys()
            and (path / MANIFEST).read_text(encoding="utf-8") == _manifest_text(entries)
            and all(_digest(path / name) == entry for name, entry in entries.items())
        )
    except (OSError, ValueError):
        return False


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the trainer's tensors and state.json; `load_model(path)` reads the model."""
    return load_file(path / TENSORS), json.loads((path / STATE).read_text(encoding="utf-8"))


def publish(path: Path, out: Path) -> None:
    """Put a checkpoint's model files into the folder `out`, each by one atomic replacement.

    `out` has a manifest too, of the files that are equal at every step. The weights file states its
    own digest, so a reader finds either the old or the new weights, complete.
    """
    entries = read_manifest(path) or {}
    lasting = {n: e for n, e in entries.items() if n not in (WEIGHTS, STATE, TENSORS)}
    partial = out / f".{MANIFEST}.tmp"
    partial.write_text(_manifest_text(lasting), encoding="utf-8")
    sync(partial)
    partial.replace(out / MANIFEST)
    for file in path.iterdir():
        if file.name in (MANIFEST, STATE, TENSORS):
            continue
        partial = out / f".{file.name}.tmp"
        # a killed run may have left a hard link to a checkpoint's file: never write through it
        partial.unlink(missing_ok=True)
        # link the large weights; copy the rest: a user may edit it, the checkpoint must not change
        (_link if file.name == WEIGHTS else shutil.copyfile)(file, partial)
        sync(partial)
        partial.replace(out / file.name)
        # replace() does nothing if both names already link to one file
        partial.unlink(missing_ok=True)
    sync(out)


def _link(file: Path, target: Path) -> None:
    """Hard-link a file; copy it on a file system without hard links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def mark_best(path: Path) -> None:
    """Point the symlink `best`, beside a checkpoint, at that checkpoint, atomically.

    Without symlinks, `best` is a folder with the checkpoint's model.
    """
    best, partial = path.parent / "best", path.parent / "best.tmp"
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(path.name)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        terminal.note_once("note: no symbolic links here: checkpoints/best is a copy")
        best.mkdir(exist_ok=True)
        publish(path, best)
        return
    if best.is_dir() and not best.is_symlink():
        # the copy of an earlier run, on a file system without symlinks
        shutil.rmtree(best)
    partial.replace(best)
    sync(path.parent)


def prune(saved: Path, keep: int) -> None:
    """Keep the newest `keep` checkpoints up to `saved`, and the best; delete older ones.

    Ignores checkpoints after `saved`: the run resumed before them because they are damaged. Deletes
    unfinished saves too.
    """
    folder = saved.parent
    best = (folder / "best").resolve()
    found = checkpoints(folder)
    for path in found[: found.index(saved) + 1][:-keep]:
        if path.resolve() != best:
            shutil.rmtree(path)
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path)


def _manifest_text(entries: dict[str, Any]) -> str:
    """Format a manifest. `is_whole` compares the text, so a changed byte shows."""
    return json.dumps(entries, indent=1)


def _digest(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": sha256}
