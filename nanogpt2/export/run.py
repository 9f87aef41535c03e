"""Load a model, write it aside, check what was written, rename it, print what was found.

This file knows no format.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from nanogpt2 import terminal
from nanogpt2.checkpoints.load import open_checkpoint
from nanogpt2.config import fail, usage_error
from nanogpt2.cpu.inference_model import InferenceGPT
from nanogpt2.export.counterpart import CheckError
from nanogpt2.export.options import ExportConfig
from nanogpt2.export.source import Source
from nanogpt2.export.targets import TARGETS, refuse
from nanogpt2.filesystem import sync


def export(config: ExportConfig) -> None:
    """Export by the command line's flags. Ends the process where that fails."""
    assert config.to is not None and config.out is not None
    dtype = config.dtype or TARGETS[config.to].dtypes[0]
    target = import_module(f"nanogpt2.export.{TARGETS[config.to].module}")
    try:
        with new_folder(Path(config.out)) as folder:
            with usage_error("MODEL"):
                source = opened(config.model, config.to, dtype)
            source.check_weights()
            try:
                target.write(source, folder)
            except ValueError as error:
                fail(f"MODEL {config.model!r} {error}")
            figures = target.check(source, folder)
            size = sum(path.stat().st_size for path in folder.iterdir())
    except FloatingPointError as error:
        fail(str(error), code=1)
    except OSError as error:
        fail(f"--out {config.out!r} cannot be written: {error}", code=1)
    except CheckError as error:
        fail(f"nothing was written, for the check failed: {error}", code=1)
    head = {"model": config.model, "to": config.to, "dtype": dtype, "out": config.out}
    terminal.write(shown(head | {"bytes": size} | figures, config.json))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; sync it and rename it to `path` once the block ends.

    An error or a signal in the block deletes it; a kill leaves it. Exits with 2 where it cannot be
    made.
    """
    aside = path.with_name(f".nanogpt2-{secrets.token_hex(8)}.tmp")
    with usage_error("--out"):
        aside.mkdir()
    try:
        yield aside
        for file in aside.iterdir():
            sync(file)
        sync(aside)
        # a rename would replace an empty folder
        if os.path.lexists(path):
            raise FileExistsError(f"{str(path)!r} has appeared meanwhile")
        aside.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def opened(name: str, to: str, dtype: str) -> Source:
    """Load the model in the type that the target's `write` takes.

    Raises ValueError for what cannot be exported, OSError for an unreadable file.
    """
    with open_checkpoint(name) as checkpoint:
        if checkpoint.labels:
            raise ValueError(f"{name!r} is a classifier: transformers reads its folder as it is")
        refuse(checkpoint.config, to)
        # a folder for transformers holds the model in its type; the others narrow each tensor
        model = checkpoint.model(dtype=dtype if to == "hf" else "float32")
        if isinstance(model, InferenceGPT):
            raise ValueError(f"{name!r} is int8: export the model that it was made of")
        try:
            tokenizer = checkpoint.tokenizer
        except ValueError as error:
            if to == "gguf":
                raise
            terminal.note(f"note: no vocabulary is written: {error}")
            tokenizer = None
        title = Path(name).resolve().name if Path(name).exists() else name
        return Source(title, model, tokenizer, checkpoint.is_chat, dtype)


def shown(figures: dict[str, Any], as_json: bool) -> str:
    """Write the figures as one JSON object, or as a table."""
    if as_json:
        return terminal.json_line(figures)
    counted = "prompts_equal"
    plain = {name: value for name, value in figures.items() if name != "prompts"}
    if counted in plain:
        plain[counted] = f"{plain[counted]} of {figures['prompts']}"
    return terminal.table([[name, _cell(value)] for name, value in plain.items()]) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "not installed, not run"
    if isinstance(value, float):
        return f"{value:.2g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
