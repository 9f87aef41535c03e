"""A run's state on disk: everything a resumed run needs, whole or not there at all.

A checkpoint is a folder `step-N` that holds the model as `load_model` and transformers read it, the
optimizer's tensors and the random generators' states in safetensors, and the rest as JSON. It is
written aside as `step-N.tmp`, with a manifest of sizes and SHA-256 last, synced to the disk, and
only then renamed; a reader trusts a folder only if its manifest holds. No pickle.

This file does not know the loop or the schedule.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanogpt2.model import GPT
from nanogpt2.model_folder import MANIFEST, WEIGHTS, read_manifest
from nanogpt2.tokenizer import Tokenizer
from nanogpt2.weights import save_model

STATE, OPTIMIZER = "state.json", "optimizer.safetensors"


def commit(
    out: Path,
    step: int,
    model: GPT,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    is_best: bool,
    keep: int,
) -> None:
    """Save a run's state under `out`/checkpoints, then make its model the one of `out`.

    Older checkpoints than the newest `keep` and the best are removed last. Raises OSError, leaving
    every checkpoint committed before intact.
    """
    folder = out / "checkpoints"
    saved = save_checkpoint(folder, step, model, tokenizer, optimizer, state)
    if is_best:
        mark_best(saved)
    publish(saved, out)
    prune(folder, keep)


def save_checkpoint(
    folder: Path,
    step: int,
    model: GPT,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    """Commit `folder/step-N` and return it. Raises OSError, leaving the others as they were."""
    final = folder / f"step-{step}"
    if final.exists():
        return final
    partial = folder / f"step-{step}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(model, partial, tokenizer)
    try:
        save_file(_optimizer_tensors(optimizer) | _generator_states(), partial / OPTIMIZER)
    except SafetensorError as error:
        # the library's own name for a full disk
        raise OSError(str(error)) from error
    (partial / STATE).write_text(json.dumps({"step": step} | state), encoding="utf-8")
    entries = {file.name: _digest(file) for file in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps(entries, indent=1), encoding="utf-8")
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    partial.rename(final)
    _sync(folder)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose manifest holds, or None."""
    return next((path for path in reversed(checkpoints(folder)) if is_whole(path)), None)


def checkpoints(folder: Path) -> list[Path]:
    """Return the committed checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def is_whole(path: Path) -> bool:
    """True where every file is there with the size and SHA-256 that the manifest states."""
    try:
        entries = read_manifest(path) or {}
        named = {WEIGHTS, OPTIMIZER, STATE} <= entries.keys()
        return named and all(_digest(path / name) == entry for name, entry in entries.items())
    except (OSError, ValueError):
        return False


def restore(path: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Bring the optimizer and the random generators to a checkpoint's state; return its state.json.

    The weights are `load_model(path)`'s to read.
    """
    tensors = load_file(path / OPTIMIZER)
    torch.set_rng_state(tensors.pop("rng.cpu"))
    cuda = tensors.pop("rng.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def publish(path: Path, out: Path) -> None:
    """Make a checkpoint's model files those of the folder `out`; each is replaced in one step.

    `out` has a manifest too, of what is the same at every step: the weights state their own digest,
    so whoever loads them while they are replaced finds the old ones or the new ones whole.
    """
    entries = read_manifest(path) or {}
    lasting = {n: e for n, e in entries.items() if n not in (WEIGHTS, STATE, OPTIMIZER)}
    partial = out / f".{MANIFEST}.tmp"
    partial.write_text(json.dumps(lasting, indent=1), encoding="utf-8")
    _sync(partial)
    partial.replace(out / MANIFEST)
    for file in path.iterdir():
        if file.name in (MANIFEST, STATE, OPTIMIZER):
            continue
        partial = out / f".{file.name}.tmp"
        partial.unlink(missing_ok=True)
        # the weights are large; what a person may edit must not be the checkpoint's own
        (_link if file.name == WEIGHTS else shutil.copyfile)(file, partial)
        _sync(partial)
        partial.replace(out / file.name)
    _sync(out)


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


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the newest `keep` and the best, and what a killed save left."""
    best = (folder / "best").resolve()
    for path in checkpoints(folder)[:-keep]:
        if path.resolve() != best:
            shutil.rmtree(path)
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{"0.exp_avg": ..., "0.exp_avg_sq": ..., "0.step": ..., "1.exp_avg": ...}."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": tensor for i, slots in state.items() for key, tensor in slots.items()}


def _generator_states() -> dict[str, Tensor]:
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng.cuda"] = torch.cuda.get_rng_state()
    return states


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": sha256}


def _sync(path: Path) -> None:
    """Have the disk hold a file or a folder, not only the kernel."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
