"""Where the records of sample.py --prompts go: standard output, or a file that a rerun continues.

Beside the file FILE stands FILE.run.json with the settings of its run, the seed among them. A rerun
with --resume must have the same settings. It cuts a half-written last record, and the records of
the last prompt where some are missing, and writes the others. Only one run writes at a time. This
file does not know how texts are made.
"""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, Self

from nanogpt2 import terminal
from nanogpt2.atomic import whole_file
from nanogpt2.checkpoints.folder import find_files
from nanogpt2.config import PICKLES, SampleConfig, repository_of, usage_error
from nanogpt2.config.flags import show
from nanogpt2.filesystem import lock

# flags that a rerun may change: no text depends on them, and each record holds its prompt
FREE = ("prompt", "prompts", "batch_size", "skip_bad", "in_order", "output", "resume", "json")


class Prompt(NamedTuple):
    """A prompt of a file as the model will see it, with the other fields of its JSON object."""

    text: str
    fields: dict[str, Any]


class Output:
    """Takes records, and knows which prompts an earlier run has done."""

    def __init__(self, config: SampleConfig, prompts: Mapping[int, Prompt]) -> None:
        """prompts: by line number. Without a seed, draw one.

        Raises ValueError for a file that cannot be created or continued.
        """
        self.done: set[int] = set()
        self.seed = config.generation.seed
        self._path = None if config.output is None else Path(config.output)
        self._config, self._size = config, 0
        self._before = 0  # bytes, when it was read
        self._file: FileIO | None = None
        self._open_files = ExitStack()
        if self._path is not None:
            try:
                self._open(self._path, prompts)
            except OSError as error:
                raise ValueError(f"output: {error.strerror}: {str(error.filename)!r}") from None
        if self.seed is None:
            self.seed = int.from_bytes(os.urandom(7))

    def about_seed(self) -> str:
        """Say the seed that was drawn, where nothing else states it and the texts depend on it."""
        config = self._config
        is_drawn = config.generation.seed is None and self.seed is not None
        stated = config.json or config.prompts is not None
        draws = (
            config.generation.samples or config.generation.stochastic_beams or config.interactive
        )
        if not is_drawn or stated or not draws:
            return ""
        return f"note: --seed {self.seed} writes this again"

    def _open(self, path: Path, prompts: Mapping[int, Prompt]) -> None:
        name = self._config.output or ""
        if not path.name or "\0" in name:
            raise ValueError(f"output must be a file, not {show(name)}")
        self._run = path.with_name(f"{path.name}.run.json")
        if self._config.resume:
            if not (path.is_file() and self._run.is_file()):
                raise ValueError(f"output: no run to resume: {name!r} or its .run.json is missing")
            self._compare(_json(self._run, self._run.read_bytes()))
            self._read(path, prompts, self._config.generation.num_return_sequences)
            self._before = path.stat().st_size
        elif path.exists() or path.is_symlink():
            raise ValueError(f"output must be a new file, or --resume given: {name!r} exists")
        elif not path.parent.is_dir():
            raise ValueError(f"output must be in a folder: {str(path.parent)!r} is not a folder")
        elif self._run.is_symlink() or (
            self._run.exists() and "weights" not in _json(self._run, self._run.read_bytes())
        ):
            raise ValueError(f"output must be another file: {str(self._run)!r} is not of a run")

    def _compare(self, before: dict[str, Any]) -> None:
        """Take over the seed of the run; raise ValueError for other settings."""
        if self.seed is None:
            self.seed = before.get("seed")
        for name, value in self._settings().items():
            old = before.get(name)
            if value != old and name == "weights":
                raise ValueError("model must be as in the run to resume: its files have changed")
            if value != old:
                raise ValueError(
                    f"{name} must be {show(old)}, as in the run to resume, not {show(value)}"
                )

    def _settings(self) -> dict[str, Any]:
        values = asdict(self._config)
        values |= values.pop("generation") | {"seed": self.seed, "weights": self._weights()}
        kept = {name: value for name, value in values.items() if name not in FREE}
        # as they will be read back: tuples become lists
        return dict(json.loads(json.dumps(kept)))

    def _weights(self) -> list[Any]:
        """Name, size and time of the model's files."""
        path = Path(self._config.model)
        kinds = (".safetensors", *PICKLES)
        inside = sorted(p for p in path.glob("*") if p.suffix in kinds)
        files = inside if path.is_dir() else [path]
        if repository_of(self._config.model):
            with usage_error("--model"):
                files = [*find_files(self._config.model).files]
        stats = [(file.name, file.stat()) for file in files if file.is_file()]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def _read(self, path: Path, prompts: Mapping[int, Prompt], count: int) -> None:
        """Find the prompts that are done, and the size of their records."""
        *lines, _ = path.read_bytes().split(b"\n")
        last, begin, end, have = 0, 0, 0, count
        for place, line in enumerate(lines, start=1):
            record = _json(path, line, place)
            number, prompt = record.get("line"), record.get("prompt")
            if (
                not isinstance(number, int)
                or number not in prompts
                or prompts[number].text != prompt
            ):
                raise ValueError(
                    f"prompts must be those of the run to resume: line {place} of "
                    f"{self._config.output!r} does not belong to them"
                )
            if number != last:
                last, begin, have = number, end, 0
            have, end = have + 1, end + len(line) + 1
            self.done.add(number)
        if have < count:
            # perhaps some are missing: --unique may have found fewer
            self.done.discard(last)
            end = begin
        self._size = end

    def __enter__(self) -> Self:
        """Create the file, or cut it to its complete records. Raises ValueError where it cannot."""
        if self._path is None:
            return self
        if self._config.resume:
            terminal.note(f"note: {len(self.done)} prompts are done already")
        try:
            with ExitStack() as stack:
                if not self._config.resume:
                    with whole_file(self._run) as partial:
                        partial.write_text(json.dumps(self._settings(), indent=2) + "\n")
                stack.enter_context(lock(self._run))
                mode = "r+" if self._config.resume else "x"
                self._file = stack.enter_context(FileIO(self._path, mode))
                if self._file.seek(0, os.SEEK_END) != self._before:
                    raise BlockingIOError
                self._file.truncate(self._size)
                self._file.seek(self._size)
                self._open_files = stack.pop_all()
        except BlockingIOError:
            raise ValueError(f"output: another run writes to {str(self._path)!r}") from None
        except OSError as error:
            raise ValueError(f"output: {error.strerror}: {str(self._path)!r}") from None
        return self

    def write(self, line: str) -> None:
        """Write a record at once. Raises OSError that names the file."""
        if self._file is None:
            terminal.write(line)
            return
        data = line.encode("utf-8")
        try:
            while data:
                written = self._file.write(data)
                self._size += written
                data = data[written:]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._config.output) from None

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._file is None or self._path is None:
            return
        self._open_files.close()
        if kind is not None and issubclass(kind, ValueError) and not self._size:
            # wrong use leaves nothing behind
            self._path.unlink()
            self._run.unlink()


def _json(path: Path, data: bytes, line: int | None = None) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        where = "" if line is None else f" line {line}"
        raise ValueError(f"output{where} is not a record of sample.py: {str(path)!r}")
    return value
