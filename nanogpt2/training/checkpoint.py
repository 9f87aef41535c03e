"""A run's checkpoints on disk: everything that a resumed run needs, complete or absent.

A checkpoint is a folder `step-N`:

    model.safetensors, config.json, ...   the model, as `load_model` and transformers read it
    training.safetensors                  the trainer's other tensors: optimizer, generators, ...
    state.json                            the rest
    manifest.json                         {file: {size, sha256}} of all these files; for state.json
                                          also `run`, the id of the run in run.json

A save writes `step-N.tmp`, the manifest last, syncs every file to the disk, then renames the
folder. A reader trusts a folder only if its files match its manifest and it states the reader's
run. Other files and folders are ignored, and never deleted. After the rename, `best`
points at the best checkpoint, the new model replaces the run's model, and old checkpoints are
deleted. A resumed run repeats these three, in case a kill came between them. Nothing is pickled.

This file does not know the loop, the schedule or the tensors' meaning.
"""

import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanogpt2 import terminal
from nanogpt2.atomic import whole_file
from nanogpt2.checkpoints import tensors as tensor_file
from nanogpt2.checkpoints.folder import MANIFEST, WEIGHTS, read_manifest
from nanogpt2.checkpoints.save import save_model
from nanogpt2.classifier import Model
from nanogpt2.config import TrainConfig
from nanogpt2.config.flags import show
from nanogpt2.filesystem import UNSUPPORTED, open_regular, sync
from nanogpt2.metrics import is_number
from nanogpt2.tokenizer import Tokenizer
from nanogpt2.training.removal import remove_checkpoint, remove_unfinished

STATE, TENSORS = "state.json", "training.safetensors"


def commit(
    out: Path,
    model: Model,
    tokenizer: Tokenizer,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
    run: str = "",
) -> None:
    """Save a run as `out`/checkpoints/step-`state["step"]`; publish its model in `out`.

    run: the run's id. Deletes old checkpoints last, but keeps the newest `keep` and the best.
    Raises OSError, and then leaves every earlier checkpoint intact.
    """
    save_checkpoint(out / "checkpoints", model, tokenizer, tensors, state, run)
    settle(out, state, keep)


def settle(out: Path, state: dict[str, Any], keep: int) -> None:
    """Finish a commit: mark the best, publish the model, prune. Repeating it changes nothing.

    Marks the best anew where the link was lost, as in a copy, or replaced.
    """
    saved = out / "checkpoints" / f"step-{state['step']}"
    best_step = state.get("best_step")
    best = saved if state["is_best"] else saved.with_name(f"step-{best_step}")
    mark = saved.with_name("best")
    is_marked = mark.exists() and (mark.is_symlink() or _is_of(mark, run_of(saved)))
    if state["is_best"] or (best.is_dir() and not is_marked):
        mark_best(best)
    publish(saved, out)
    prune(saved, keep, best_step)


def save_checkpoint(
    folder: Path,
    model: Model,
    tokenizer: Tokenizer,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    run: str = "",
) -> Path:
    """Write `folder/step-N` and return its path. Raises OSError; then the others are unchanged."""
    final = folder / f"step-{state['step']}"
    partial = final.with_suffix(".tmp")
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    _make_way(partial, run)
    partial.mkdir()
    save_model(model, partial, tokenizer, state.get("chat", False))
    save_file(tensors, partial / TENSORS)
    (partial / STATE).write_text(json.dumps(state), encoding="utf-8")
    entries = {file.name: _digest(file) for file in sorted(partial.iterdir())}
    entries[STATE] |= {"run": run} if run else {}
    (partial / MANIFEST).write_text(_manifest_text(entries), encoding="utf-8")
    for file in partial.iterdir():
        sync(file)
    sync(partial)
    _make_way(final, run)
    partial.rename(final)
    sync(folder)
    return final


def _make_way(final: Path, run: str) -> None:
    """Delete this run's folder where a checkpoint is to come; move anything else aside."""
    if _is_of(final, run):
        remove_checkpoint(final)
    if os.path.lexists(final):
        _move_aside(final)


def _is_of(path: Path, run: str | None) -> bool:
    """Return True for a folder of this run, damaged or whole. The run writes a manifest always."""
    return (path / MANIFEST).exists() and run_of(path) in (run, None)


def _move_aside(path: Path) -> None:
    with suppress(OSError):
        # empty
        path.rmdir()
        return
    names = (path.with_name(f"{path.name}.old{number}") for number in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    path.rename(aside)
    terminal.note(f"{path} held files of others: moved to {aside.name}")


def save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors with metadata and ordinary permissions; safetensors' own writer lacks both."""
    tensor_file.write(path, tensors)


def latest_checkpoint(folder: Path, run: str | None = None) -> Path | None:
    """Return the newest intact checkpoint of a run, by default of any; None without a checkpoint.

    run: the id that the checkpoint must state; empty for a run without an id. Prints a note for
    each checkpoint it skips. Raises ValueError when it skips all.
    """
    found, whose = checkpoints(folder), "damaged checkpoints"
    for path in reversed(found):
        if not is_whole(path):
            terminal.note(f"{path} is damaged: trying the checkpoint before it")
        elif run not in (None, run_of(path)):
            terminal.note(f"{path} is another run's: trying the checkpoint before it")
            whose = "checkpoints damaged or of another run"
        elif (step := _stated_step(path)) not in (None, _step_of(path)):
            terminal.note(f"{path} is a copy of step {step}: trying the checkpoint before it")
        else:
            return path
    if found:
        raise ValueError(f"found only {whose} in {str(folder)!r}; none was deleted")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Return the committed checkpoints, oldest first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch("step-[1-9][0-9]*", p.name)]
    return sorted((path for path in found if path.is_dir()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def run_of(path: Path) -> str | None:
    """Return the run's id that a checkpoint states, "" if it states none; None if it is damaged."""
    try:
        return (read_manifest(path) or {})[STATE].get("run", "")
    except (OSError, ValueError, LookupError):
        return None


def _stated_step(path: Path) -> int | None:
    """Return the step of a checkpoint, whatever its folder is called; None if malformed."""
    with suppress(OSError, ValueError, RecursionError, LookupError, TypeError):
        step = json.loads((path / STATE).read_text(encoding="utf-8"))["step"]
        return step if type(step) is int else None
    return None


def is_whole(path: Path) -> bool:
    """Return True if every file has the size and SHA-256 that the manifest states."""
    try:
        entries = read_manifest(path) or {}
        if (path / MANIFEST).read_text(encoding="utf-8") != _manifest_text(entries):
            return False
        entries.get(STATE, {}).pop("run", None)
        return {WEIGHTS, TENSORS, STATE} <= entries.keys() and all(
            _digest(path / name) == entry for name, entry in entries.items()
        )
    except (OSError, ValueError):
        return False


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the trainer's tensors and state.json; `load_model(path)` reads the model.

    Raises ValueError for a malformed file.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise ValueError(f"{str(path / STATE)!r} is no JSON object")
    try:
        return load_file(path / TENSORS), state
    except SafetensorError as error:
        raise ValueError(f"{str(path / TENSORS)!r} is no safetensors file: {error}") from None


def check_state(path: Path, state: dict[str, Any], config: TrainConfig) -> None:
    """Raise ValueError for a field of state.json that a resumed run cannot go on from."""
    number, steps, patience = _step_of(path), config.steps or 0, config.patience
    most = config.batch_size or 0
    # a run that is not finished has a step left; only --patience finishes one early
    ends = [True] if number == steps else [False, True] if patience else [False]

    def is_count(value: Any, low: int, high: float = math.inf) -> bool:
        return type(value) is int and low <= value <= high

    allowed: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "step": (f"{number} and <= {steps}", lambda v: is_count(v, number, min(number, steps))),
        "best": ("a number", lambda v: is_number(v) and not math.isnan(v)),
        "best_step": (f"0 to {number}", lambda v: is_count(v, 0, number)),
        "stale": ("a count", lambda v: is_count(v, 0)),
        "finished": (" or ".join(map(str, ends)), lambda v: type(v) is bool and v in ends),
        "is_best": ("true or false", lambda v: type(v) is bool),
        "micro_batch": (f"1 to {most}", lambda v: is_count(v, 1, most)),
        "figures": (
            "a table of numbers",
            lambda v: type(v) is dict and all(f is None or is_number(f) for f in v.values()),
        ),
    }
    # earlier releases did not state the best step
    state = {"best_step": 0} | state
    for name, (what, is_allowed) in allowed.items():
        if not is_allowed(state.get(name)):
            found = show(state[name]) if name in state else "absent"
            raise ValueError(f"{str(path / STATE)!r}: {name} must be {what}, not {found}")


def publish(path: Path, out: Path) -> None:
    """Put a checkpoint's model files into the folder `out`, each by one atomic replacement.

    `out` has a manifest too, of the files that are equal at every step. The weights file states its
    own digest, so a reader finds either the old or the new weights, complete.
    """
    entries = read_manifest(path) or {}
    lasting = {n: e for n, e in entries.items() if n not in (WEIGHTS, STATE, TENSORS)}
    with whole_file(out / MANIFEST, locked=True) as partial:
        partial.write_text(_manifest_text(lasting), encoding="utf-8")
        sync(partial)
    for file in (path / name for name in (*lasting, WEIGHTS)):
        with whole_file(out / file.name, locked=True) as partial:
            # link the large weights; copy the rest: a user may edit it, the checkpoint must not
            # change
            (_link if file.name == WEIGHTS else shutil.copyfile)(file, partial)
            sync(partial)
    sync(out)


def _link(file: Path, target: Path) -> None:
    """Hard-link a file; copy it on a file system without hard links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def mark_best(path: Path) -> None:
    """Point the symlink `best`, beside a checkpoint, at that checkpoint, atomically.

    Where `best` is a folder, as in a copy of a run without links, or on a file system without
    symlinks, it gets the checkpoint's model. A file or folder of others is moved aside.
    """
    best, partial = path.parent / "best", path.parent / "best.tmp"
    if os.path.lexists(best) and not best.is_symlink() and not _is_of(best, run_of(path)):
        _move_aside(best)
    if best.is_dir() and not best.is_symlink():
        publish(path, best)
        # those of the copied checkpoint
        for name in (STATE, TENSORS):
            (best / name).unlink(missing_ok=True)
        return
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(path.name)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        terminal.note_once("note: no symbolic links here: checkpoints/best is a copy")
        best.mkdir()
        publish(path, best)
        return
    partial.replace(best)
    sync(path.parent)


def prune(saved: Path, keep: int, best_step: int | None = None) -> None:
    """Keep the newest `keep` checkpoints up to `saved`, and the best; delete older ones.

    Keeps the target of `best` and step `best_step`, which differ where a person moved the link.
    Ignores other runs' checkpoints, and those after `saved`: the run resumed before them because
    they are damaged. Deletes unfinished saves too.
    """
    folder, run = saved.parent, run_of(saved)
    best = {os.path.realpath(folder / "best"), os.path.realpath(folder / f"step-{best_step}")}
    found = [p for p in checkpoints(folder) if _step_of(p) <= _step_of(saved) and run_of(p) == run]
    for path in found[:-keep]:
        if os.path.realpath(path) not in best:
            # a person may have protected it
            with suppress(PermissionError):
                remove_checkpoint(path)
    remove_unfinished(folder)


def _manifest_text(entries: dict[str, Any]) -> str:
    """Format a manifest. `is_whole` compares the text, so a changed byte shows."""
    return json.dumps(entries, indent=1)


def _digest(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": sha256}
