"""The folder of a run: its lock, its settings and its metrics.

    DIR/run.json        the configuration, its automatic values filled in
    DIR/metrics.jsonl   one JSON object a step
    DIR/checkpoints/    step-N/ and best
    DIR/model.safetensors, config.json, ...   the model, as `load_model` and transformers read it
    DIR/adapter/, DIR/tensorboard/            with --lora_rank, with --tensorboard

A new run deletes the files that an old run is known to have made, and no others. Only the standard
library is imported, to refuse a folder in use before torch loads. This file does not know models or
batches.
"""

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TextIO

from nanogpt2 import terminal
from nanogpt2.atomic import whole_file
from nanogpt2.config import TrainConfig
from nanogpt2.filesystem import lock, open_regular, sync
from nanogpt2.training.removal import CHECKPOINT_FILES, MODEL_FILES, remove_checkpoint

RUN_FILES = ("metrics.jsonl", "loss.png", *MODEL_FILES, "run.json")
FOLDERS = ("checkpoints", "adapter", "tensorboard")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# the end of the names of event files, to know them from others' files
EVENTS = ".nanogpt2"
# settings that change a run's numbers by rounding at most: --resume may change them
FREE_ON_RESUME = {
    "data",
    "mix",
    "out",
    "resume",
    "overwrite",
    "device",
    "threads",
    "kernels",
    "fsdp",
    "eval_every",
    "save_every",
    "sample_every",
    "tensorboard",
    "dry_run",
    "keep",
    "timeout",
}
# schedules whose rate does not fall, or falls at the end only: --resume may raise --steps
EXTENDED = ("constant", "wsd")
# how JSON of another form fails
MALFORMED = (AttributeError, ValueError, TypeError, LookupError, RecursionError)
# files that may have moved: --resume compares their SHA-256
BY_DIGEST = {"validation", "init"}


class RunFolder:
    """The folder `path` of one run. Nothing but the lock is written before `start`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writes = True  # True in the first process only
        self.logged = 0  # the last complete step of this process
        self.loggers: list[Callable[[dict[str, Any]], None]] = []  # called at each step
        self.read: list[dict[str, Any]] = []  # what was read from each source, for run.json
        self._digests: dict[str, str] = {}
        self.checkpoints = path / "checkpoints"
        self._metrics: TextIO | None = None
        self._open_files: list[TextIO] = []
        self._made: list[Path] = []  # by `lock`, in a folder where no run has started yet

    def check(self, config: TrainConfig) -> TrainConfig:
        """Return `config`; for a resumed run, its recorded settings.

        Raises ValueError if the folder already holds a run and neither resume nor overwrite is
        given, if overwrite would remove a file that no run made, if the folder holds no run to
        resume, or if a flag contradicts that run.
        """
        where = repr(str(self.path))
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{where} is a file; a folder is needed")
        for folder in (self.path / name for name in FOLDERS):
            if os.path.lexists(folder) and not folder.is_dir():
                raise ValueError(f"{str(folder)!r} must be a folder; is its disk not mounted?")
        lock = self.path / ".lock"
        if os.path.lexists(lock) and (lock.is_symlink() or not lock.is_file()):
            raise ValueError(f"{str(lock)!r} must be a plain file")
        if config.resume:
            if not (self.path / "run.json").exists():
                raise ValueError(f"{where} holds no run to --resume")
            for file in (self.path / name for name in RUN_FILES[:-1]):
                # a pipe would be waited for, a folder would fail the first save
                if file.exists() and not file.is_file():
                    raise ValueError(f"{str(file)!r} must be a plain file")
            return self._as_recorded(config)
        if config.overwrite and self._contains(config.init):
            raise ValueError(f"{where} holds the --init model, which --overwrite would remove")
        if not config.dry_run:
            self._leftovers(config)
        return config

    def _leftovers(self, config: TrainConfig) -> list[Path]:
        """List the files and folders of the old run, which a new run deletes.

        Raises ValueError without leave to delete, and for a file that would be written over but
        that the old run is not known to have made.
        """
        names = [name for name in (*FOLDERS, *RUN_FILES) if os.path.lexists(self.path / name)]
        ran = "run.json" in names
        if names and not (config.overwrite or config.resume):
            what = "run.json" if ran else f"{names[0]} of no run"
            way = "add --resume or --overwrite, or" if ran else "--overwrite removes runs only;"
            raise ValueError(f"{str(self.path)!r} already holds {what}: {way} choose another")
        record: dict[str, Any] = self.record() if ran else {"config": {}}
        paths = [*self._steps(), self.checkpoints / "best"]
        if config.lora_rank or record["config"].get("lora_rank"):
            paths += [self.path / "adapter" / name for name in ADAPTER_FILES]
        paths += [self.path / name for name in RUN_FILES]
        found = [path for path in paths if os.path.lexists(path)]
        saved = self._saved(record)
        for path in found:
            if not (ran and self._is_own(path, record, saved)):
                raise ValueError(
                    f"{str(path)!r} is not known to be a run's, and a new run would replace it: "
                    "move it away, or choose another folder"
                )
        events = self.path / "tensorboard"
        if ran and not events.is_symlink():
            found[:0] = [path for path in events.glob(f"events.out.*{EVENTS}") if _is_plain(path)]
        return found

    def _steps(self) -> list[Path]:
        return [p for p in self.checkpoints.glob("step-*") if re.fullmatch("[0-9]+", p.name[5:])]

    def _saved(self, record: Mapping[str, Any]) -> set[tuple[str, str]]:
        """Collect (name, SHA-256) of the files of the run's checkpoints, as far as recorded."""
        saved = set()
        with suppress(TypeError, ValueError):
            saved = {(name, sha256) for name, sha256 in record.get("saved", [])}
        for step in self._steps():
            if self._run_of(step) == record.get("run"):
                saved |= _stated(step / "manifest.json")
        return saved

    def _run_of(self, step: Path) -> str | None:
        """Return the run's id that a checkpoint states; None where it states none."""
        with suppress(OSError, *MALFORMED):
            manifest = json.loads((step / "manifest.json").read_text(encoding="utf-8"))
            return manifest["state.json"].get("run")
        return None

    def _is_own(self, path: Path, record: Mapping[str, Any], saved: set[tuple[str, str]]) -> bool:
        """Return True for a file or folder that the recorded run has made."""
        if path.parent != self.checkpoints:
            is_log = path.name in ("run.json", "metrics.jsonl") and _is_plain(path)
            return is_log or self._is_known(path, saved)
        if path.is_symlink():
            to_step = re.fullmatch("step-[0-9]+", str(path.readlink()))
            return path.name == "best" and to_step is not None
        if not path.is_dir():
            return False
        # other files in it stay: remove_checkpoint
        made = [file for file in path.iterdir() if file.name in CHECKPOINT_FILES]
        if path.name == "best":
            # a copy, where links are lacking
            return all(self._is_known(file, saved) for file in made)
        return self._run_of(path) == record.get("run") and all(map(_is_plain, made))

    def _is_known(self, path: Path, saved: set[tuple[str, str]]) -> bool:
        """Return True for a file with the content that the run gave it."""
        if not _is_plain(path) or (path.parent.is_symlink() and path.parent != self.path):
            return False
        if path.name == "manifest.json":
            stated = _stated(path)
            return bool(stated) and stated <= saved
        copies = (step / path.name for step in self._steps())
        linked = any(copy.exists() and path.samefile(copy) for copy in copies)
        return linked or (path.name, _sha256(path)) in saved

    def _contains(self, init: str) -> bool:
        model, out = Path(init).resolve(), self.path.resolve()
        return model == out or out in model.parents

    def _as_recorded(self, config: TrainConfig) -> TrainConfig:
        recorded = self.record()["config"]
        for name in set(config.given) - FREE_ON_RESUME:
            old, new = recorded.get(name), getattr(config, name)
            # a file may have moved: hold_to() compares its SHA-256
            moved = name in BY_DIGEST and old and new and "scratch" not in (old, new)
            if name == "steps" and config.steps and config.steps > old:
                self._check_extension(config.steps, recorded)
            elif new != old and not moved:
                raise ValueError(
                    f"{str(self.path)!r} holds a run with --{name} {old!r}, "
                    f"which --resume cannot change to {new!r}"
                )
        free = FREE_ON_RESUME | BY_DIGEST
        given = free & {*config.given, "out", "resume", "overwrite", "dry_run"}
        given |= {"steps"} & {*config.given}
        if config.data or config.mix:
            # one takes the other's place: hold_to() compares the content
            given |= {"data", "mix"}
        if recorded.get("data") == "-" and not (config.data or config.mix):
            raise ValueError(f"{str(self.path)!r} holds a run on standard input: give DATA again")
        settings = recorded | {name: getattr(config, name) for name in given}
        try:
            return replace(config, **settings, given=config.given)
        except TypeError:
            raise ValueError(f"{str(self.path / 'run.json')!r} is damaged") from None
        except ValueError as error:
            raise ValueError(f"{str(self.path / 'run.json')!r}: {error}") from None

    @staticmethod
    def _extends(config: TrainConfig, steps: int) -> bool:
        return config.schedule in EXTENDED and steps < (config.steps or 0)

    def _check_extension(self, steps: int, recorded: Mapping[str, Any]) -> None:
        """Raise ValueError for a schedule whose rate depends on the number of steps throughout."""
        if (schedule := recorded.get("schedule")) not in EXTENDED:
            raise ValueError(
                f"{str(self.path)!r} holds a run with --schedule {schedule}, whose rate has fallen "
                f"by step {recorded['steps']}; --steps {steps} needs {' or '.join(EXTENDED)}: "
                f"--init {self.path} --out MORE trains on"
            )

    def record(self) -> dict[str, Any]:
        """Return run.json's contents. Raises ValueError for a damaged file."""
        path = self.path / "run.json"
        with suppress(*MALFORMED):
            with open_regular(path) as file:
                record = json.loads(file.read().decode("utf-8"))
            parts = record["config"], record["digests"], record["before"]
            is_valid = all(isinstance(part, dict) for part in parts)
            is_valid &= isinstance(record.get("run", ""), str)
            is_valid &= isinstance(record.get("steps", []), list)
            if is_valid and record["before"] and type(record["config"]["steps"]) is int:
                return record
        raise ValueError(f"{str(path)!r} is damaged")

    @property
    def run_id(self) -> str:
        """The random id that the run's checkpoints state; empty for a run without one."""
        return self.record().get("run", "")

    def lock(self) -> None:
        """Lock the folder until `close` or the end of this process, even by a kill.

        Raises ValueError if another trainer holds the lock.
        """
        if not self.writes:
            return
        path = self.path / ".lock"
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        try:
            self._open_files.append(lock(path))
        except BlockingIOError:
            raise ValueError(f"{str(self.path)!r} is in use by another trainer") from None
        if is_new:
            self._made.insert(0, path)

    def close(self) -> None:
        """Release the lock and close the files; if no run has started, delete what `lock` made."""
        for path in self._made:
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        self._made = []
        for file in self._open_files:
            file.close()
        self._open_files, self._metrics = [], None

    def hold_to(self, config: TrainConfig, **digests: str) -> None:
        """Remember a new run's digests; compare a resumed run's digests with the recorded ones.

        digests: the SHA-256 of `data`, with validation's, and of `init`. Raises ValueError for a
        different one.
        """
        if config.resume:
            record = self.record()
            for what, digest in digests.items():
                known, name = record["digests"].get(what), getattr(config, what)
                name = name or config.mix
                # older runs without LoRA lack the digest of init
                unmoved = what == "init" and name == record["config"].get(what)
                if digest != known and not (known is None and unmoved):
                    held_out = config.validation if what == "data" else None
                    also = f" with --validation {held_out!r}" if held_out else ""
                    raise ValueError(
                        f"{str(self.path)!r} holds a run on another {what} than "
                        f"{name!r}{also} is now"
                    )
            digests = record["digests"] | digests
        self._digests = digests

    def settings(self, config: TrainConfig) -> dict[str, Any]:
        """Return all that decides the run's numbers, for a checkpoint's state.json."""
        names = {f.name for f in fields(config)} - FREE_ON_RESUME - BY_DIGEST - {"given"}
        settings = {name: getattr(config, name) for name in sorted(names)}
        return {"config": settings, "digests": self._digests}

    def hold_to_checkpoint(self, config: TrainConfig, settings: Mapping[str, Any]) -> None:
        """Compare run.json with a checkpoint's `settings`, {} in those of older versions.

        Raises ValueError for a setting that was edited since.
        """
        now = {f.name: getattr(config, f.name) for f in fields(config)} | self.record()["digests"]
        try:
            stated = {**settings.get("config", {}), **settings.get("digests", {})}
        except (AttributeError, TypeError):
            raise ValueError("the checkpoint's state.json: settings must be a table") from None
        former = self.record().get("steps", [])
        for name, value in stated.items():
            if name == "steps" and (value in former or self._extends(config, value)):
                continue
            # a later version may lack a setting
            if name in now and now[name] != value:
                raise ValueError(
                    f"{str(self.path / 'run.json')!r} was edited: {name} is {now[name]!r}, in the "
                    f"checkpoint {value!r}"
                )

    def check_unsaved(self) -> None:
        """Raise ValueError if the run, which has no checkpoint now, has saved one before."""
        record = self.record()
        models = [name for name in MODEL_FILES if os.path.lexists(self.path / name)]
        said = ["run.json"] if "after" in record else models
        if not said and self._was_saved(record["config"].get("save_every")):
            said = ["metrics.jsonl"]
        if said:
            raise ValueError(
                f"{str(self.checkpoints)!r} holds no checkpoint, but {said[0]} is of a run that "
                "has saved some: is a disk not mounted? Nothing was deleted"
            )

    def _was_saved(self, save_every: int | None) -> bool:
        """Return True if metrics.jsonl goes on after a step that committed a checkpoint."""
        path, rows = self.path / "metrics.jsonl", []
        if path.is_file():
            for line in path.read_bytes().decode("utf-8", "replace").splitlines():
                with suppress(*MALFORMED):
                    row = json.loads(line)
                    # the first finite val_loss is the best so far, which is saved
                    best = math.isfinite(row.get("val_loss", math.inf))
                    rows.append(best or row["step"] % (save_every or math.inf) == 0)
        return any(rows[:-1])

    def start(self, config: TrainConfig, before: dict[str, Any]) -> None:
        """Begin a new run: delete an old run's files and write run.json.

        Raises FileExistsError, and deletes nothing, where `check` would refuse the folder by now.
        """
        if not self.writes:
            return
        try:
            old = self._leftovers(config)
        except ValueError as error:
            raise FileExistsError(str(error)) from None
        # run.json last: it tells a run's files from others, if a kill comes in between
        for path in old:
            remove_checkpoint(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for folder in FOLDERS:
            with suppress(OSError):
                (self.path / folder).rmdir()
        settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "given"}
        record: dict[str, Any] = {"run": secrets.token_hex(8), "config": settings}
        record |= {"digests": self._digests, "read": self.read, "before": before}
        self._replace("run.json", json.dumps(record, indent=2))
        sync(self.path.absolute().parent)
        self._made = []

    def extend(self, config: TrainConfig) -> None:
        """Record more steps than the run had, in place of its end."""
        record = self.record()
        old = record["config"]["steps"]
        if not self.writes or config.steps == old:
            return
        record["config"]["steps"] = config.steps
        record["steps"] = [*record.get("steps", []), old]
        record.pop("after", None)
        self._replace("run.json", json.dumps(record, indent=2))

    def end(self, after: dict[str, Any]) -> None:
        """Record that the run is finished, so --resume has nothing to do, and the model's files."""
        record = self.record()
        # so that --overwrite knows the model where the checkpoints were deleted
        saved = {pair for pair in self._saved({"run": self.run_id}) if pair[0] in MODEL_FILES}
        last = [self.path / "loss.png", *(self.path / "adapter" / name for name in ADAPTER_FILES)]
        saved |= {(path.name, _sha256(path)) for path in last if _is_plain(path)}
        record |= {"after": after, "saved": sorted(saved)}
        self._replace("run.json", json.dumps(record, indent=2))

    def log(self, figures: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl."""
        self.logged = figures["step"]
        if not self.writes:
            return
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
            self._open_files.append(self._metrics)
        self._metrics.write(terminal.json_line(figures))
        self._metrics.flush()
        for log in self.loggers:
            log(figures)

    def sync_metrics(self) -> None:
        """Sync metrics.jsonl to the disk. Call this before committing a checkpoint."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
            sync(self.path)

    def cut_metrics(self, step: int) -> None:
        """Delete the lines after `step`, and a line that a kill cut short."""
        path = self.path / "metrics.jsonl"
        if not (self.writes and path.exists()):
            return
        kept = []
        # a kill may cut a line within a character
        for line in path.read_bytes().decode("utf-8", "replace").splitlines():
            with suppress(*MALFORMED):
                kept += [line + "\n"] if 1 <= json.loads(line)["step"] <= step else []
        if len(kept) != step:
            terminal.note(f"{path} has {len(kept)} lines of {step} steps: was it edited?")
        self._replace("metrics.jsonl", "".join(kept))

    def _replace(self, name: str, text: str) -> None:
        """Replace a file atomically: a reader finds the old text or the new text, complete."""
        with whole_file(self.path / name, locked=True) as partial:
            partial.write_text(text, encoding="utf-8")
            sync(partial)
        sync(self.path)


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _stated(manifest: Path) -> set[tuple[str, str]]:
    """Return (name, SHA-256) of the files that a manifest states; nothing if it is damaged."""
    with suppress(OSError, *MALFORMED):
        entries = json.loads(manifest.read_text(encoding="utf-8"))
        return {(name, entry["sha256"]) for name, entry in entries.items()}
    return set()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
