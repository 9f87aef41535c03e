"""The folder of a run: its lock, its settings and its metrics.

    DIR/run.json        the configuration, its automatic values filled in
    DIR/metrics.jsonl   one JSON object a step
    DIR/checkpoints/    step-N/ and best
    DIR/model.safetensors, config.json, ...   the model, as `load_model` and transformers read it

Only the standard library is imported, to refuse a folder in use before torch loads.
This file does not know models or batches.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TextIO

from nanogpt2.config import TrainConfig
from nanogpt2.filesystem import lock, open_regular, sync

MODEL_FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "manifest.json",
)
RUN_FILES = ("run.json", "metrics.jsonl", "loss.png", *MODEL_FILES)
# settings that change a run's numbers by rounding at most: --resume may change them
FREE_ON_RESUME = {
    "data",
    "out",
    "resume",
    "overwrite",
    "device",
    "kernels",
    "fsdp",
    "eval_every",
    "save_every",
    "sample_every",
    "tensorboard",
    "dry_run",
    "keep",
}


class RunFolder:
    """The folder `path` of one run. Nothing but the lock is written before `start`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writes = True  # True in the first process only
        self.loggers: list[Callable[[dict[str, Any]], None]] = []  # called at each step
        self._digests: dict[str, str] = {}
        self.checkpoints = path / "checkpoints"
        self._metrics: TextIO | None = None
        self._open_files: list[TextIO] = []

    def check(self, config: TrainConfig) -> TrainConfig:
        """Return `config`; for a resumed run, its recorded settings.

        Raises ValueError if the folder already holds a run and neither resume nor overwrite is
        given, if the folder holds no run to resume, or if a flag contradicts that run.
        """
        held = [name for name in (*RUN_FILES, "checkpoints") if (self.path / name).exists()]
        where = repr(str(self.path))
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{where} is a file; a folder is needed")
        if config.resume:
            if "run.json" not in held:
                raise ValueError(f"{where} holds no run to --resume")
            return self._as_recorded(config)
        if held and not config.overwrite:
            raise ValueError(
                f"{where} already holds {held[0]}: add --resume or --overwrite, or choose another"
            )
        if config.overwrite and self._contains(config.init):
            raise ValueError(f"{where} holds the --init model, which --overwrite would remove")
        return config

    def _contains(self, init: str) -> bool:
        model, out = Path(init).resolve(), self.path.resolve()
        return model == out or out in model.parents

    def _as_recorded(self, config: TrainConfig) -> TrainConfig:
        recorded = self.record()["config"]
        # DATA may have moved: hold_to() compares its SHA-256
        for name in set(config.given) - FREE_ON_RESUME:
            if getattr(config, name) != recorded.get(name):
                raise ValueError(
                    f"{str(self.path)!r} holds a run with --{name} {recorded.get(name)!r}, "
                    f"which --resume cannot change to {getattr(config, name)!r}"
                )
        given = FREE_ON_RESUME & {*config.given, "data", "out", "resume", "overwrite"}
        free = {name: getattr(config, name) for name in given}
        try:
            return replace(config, **(recorded | free))
        except TypeError:
            raise ValueError(f"{str(self.path / 'run.json')!r} is damaged") from None

    def record(self) -> dict[str, Any]:
        """Return run.json's contents. Raises ValueError for a damaged file."""
        try:
            with open_regular(self.path / "run.json") as file:
                record = json.loads(file.read().decode("utf-8"))
            if (
                isinstance(record["config"], dict)
                and isinstance(record["digests"], dict)
                and record["before"]
            ):
                return record
        except (ValueError, TypeError, LookupError, RecursionError):
            pass
        raise ValueError(f"{str(self.path / 'run.json')!r} is damaged")

    def lock(self) -> None:
        """Lock the folder until `close` or the end of this process, even by a kill.

        Raises ValueError if another trainer holds the lock.
        """
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._open_files.append(lock(self.path / ".lock"))
        except BlockingIOError:
            raise ValueError(f"{str(self.path)!r} is in use by another trainer") from None

    def close(self) -> None:
        """Release the lock and close the files."""
        for file in self._open_files:
            file.close()
        self._open_files, self._metrics = [], None

    def hold_to(self, config: TrainConfig, **digests: str) -> None:
        """Remember a new run's digests; compare a resumed run's digests with the recorded ones.

        digests: the SHA-256 of `data` and `init`. Raises ValueError for a different one.
        """
        if config.resume:
            for what, digest in self.record()["digests"].items():
                if digest != digests.get(what):
                    raise ValueError(
                        f"{str(self.path)!r} holds a run on another {what} than "
                        f"{getattr(config, what)!r} is now"
                    )
        self._digests = digests

    def start(self, config: TrainConfig, before: dict[str, Any]) -> None:
        """Begin a new run: delete an old run's files and write run.json."""
        if not self.writes:
            return
        for folder in ("checkpoints", "adapter", "tensorboard"):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        for name in RUN_FILES:
            (self.path / name).unlink(missing_ok=True)
        settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "given"}
        record = {"config": settings, "digests": self._digests, "before": before}
        self._replace("run.json", json.dumps(record, indent=2))
        sync(self.path.absolute().parent)

    def end(self, after: dict[str, Any]) -> None:
        """Record that the run is finished, so --resume has nothing to do."""
        self._replace("run.json", json.dumps(self.record() | {"after": after}, indent=2))

    def log(self, figures: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl."""
        if not self.writes:
            return
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
            self._open_files.append(self._metrics)
        self._metrics.write(json.dumps(figures) + "\n")
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
        # a kill may cut a line within a character
        kept = path.read_bytes().decode("utf-8", "replace").splitlines()[:step]
        self._replace("metrics.jsonl", "".join(line + "\n" for line in kept))

    def _replace(self, name: str, text: str) -> None:
        """Replace a file atomically: a reader finds the old text or the new text, complete."""
        partial = self.path / f".{name}.tmp"
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(self.path / name)
        sync(self.path)
