"""A run's state on disk: everything a resumed run needs, whole or not there at all.

A checkpoint is a folder `step-N`:

    model.safetensors, config.json, ...   the model, as `load_model` and transformers read it
    training.safetensors                  the trainer's other tensors: optimizer, generators, ...
    state.json                            the rest
    manifest.json                         {file: {size, sha256}} of all of these

It is written aside as `step-N.tmp`, the manifest last, synced to the disk, and only then renamed; a
reader trusts a folder only if its manifest holds. Then `best` points at the best one, its model
becomes the run's, and older checkpoints go. A resumed run does these three again, which makes up
for a kill between them. Nothing is pickled.

This file does not know the loop, the schedule or what the tensors mean.
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
from nanogpt2.tokenizer import Tokenizer
from nanogpt2.training.run_folder import sync

STATE, TENSORS = "state.json", "training.safetensors"


def commit(
    out: Path,
    model: Model,
    tokenizer: Tokenizer,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
) -> None:
    """Save a run under `out`/checkpoints as step-`state["step"]`; make its model the one of `out`.

    Older checkpoints than the newest `keep` and the best are removed last. Raises OSError, leaving
    every checkpoint committed before intact.
    """
    save_checkpoint(out / "checkpoints", model, tokenizer, tensors, state)
    settle(out, state, keep)


def settle(out: Path, state: dict[str, Any], keep: int) -> None:
    """Do what follows from the checkpoint of `state` being there; once more changes nothing."""
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
    """Commit `folder/step-N` and return it. Raises OSError, leaving the others as they were."""
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
        # the library's own name for a full disk
        raise OSError(str(error)) from error
    (partial / STATE).write_text(json.dumps(state), encoding="utf-8")
    entries = {file.name: _digest(file) for file in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(_manifest_text(entries), encoding="utf-8")
    for file in partial.iterdir():
        sync(file)
    sync(partial)
    # a damaged folder of this step gives way
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync(folder)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose manifest holds; None where there is none at all.

    Says which ones it passes over. Raises ValueError where all are damaged.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        if is_whole(path):
            return path
        terminal.note(f"{path} is damaged: going on from the one before it")
    if found:
        raise ValueError(f"finds no checkpoint in {str(folder)!r} whole; none was removed")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Return the committed checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch("[0-9]+", path.name[5:])]
    return sorted(found, key=lambda path: int(path.name[5:]))


def is_whole(path: Path) -> bool:
    """True where every file is there with the size and SHA-256 that the manifest states."""
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
    """Return the trainer's tensors and state.json; the model is `load_model(path)`'s to read."""
    return load_file(path / TENSORS), json.loads((path / STATE).read_text(encoding="utf-8"))


def publish(path: Path, out: Path) -> None:
    """Make a checkpoint's model files those of the folder `out`; each is replaced in one step.

    `out` has a manifest too, of what is the same at every step: the weights state their own digest,
    so whoever loads them while they are replaced finds the old ones or the new ones whole.
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
        # what a killed run left may be a name of a checkpoint's file: not to be written to
        partial.unlink(missing_ok=True)
        # the weights are large; what a person may edit must not be the checkpoint's own
        (_link if file.name == WEIGHTS else shutil.copyfile)(file, partial)
        sync(partial)
        partial.replace(out / file.name)
        # two names of one file: then replacing does nothing
        partial.unlink(missing_ok=True)
    sync(out)


def _link(file: Path, target: Path) -> None:
    """Give a file a second name; a copy, on a file system without hard links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def mark_best(path: Path) -> None:
    """Point the link `best` beside a checkpoint at it, in one step."""
    partial = path.parent / "best.tmp"
    partial.unlink(missing_ok=True)
    partial.symlink_to(path.name)
    partial.replace(path.parent / "best")
    sync(path.parent)


def prune(saved: Path, keep: int) -> None:
    """Remove the checkpoints before the `keep` up to `saved`, but the best; and killed saves.

    Those after `saved` are damaged, since the run went on from one before them: they do not count.
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
    """The one way to write a manifest, so that no bit of it can change unseen."""
    return json.dumps(entries, indent=1)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": sha256}
