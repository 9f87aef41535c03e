"""Time the products of a model on this machine: nanogpt2 tune [MODEL].

A text by sample.py or generate() uses the fastest layout of each matrix by a table of times, which
the first text makes in a second. This command takes longer over it, prints the table and keeps it.
What the layouts are is at the top of nanogpt2/cpu/layouts.py.
"""

import os
import sys

if __name__ == "__main__" and not __package__:
    # run by its path: find nanogpt2 beside this folder, in which inspect.py would hide Python's own
    sys.path[0] = os.path.dirname(sys.path[0])  # noqa: PTH120

from dataclasses import dataclass
from typing import Any, ClassVar

from nanogpt2 import terminal
from nanogpt2.config import SCHEMES, check_model, fail, parse, usage_error
from nanogpt2.config.flags import MOST_THREADS, check, flag


@dataclass(frozen=True)
class TuneConfig:
    """nanogpt2 tune [MODEL] [flags]: time the products of a model on this machine.

    MODEL is gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo, USER/NAME of the hub, or a path. The
    table is kept in ~/.cache/nanogpt2, for this processor, this number of threads and models of
    this shape.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "nanogpt2 tune gpt2",
        "nanogpt2 tune out --quantize int8",
        "nanogpt2 tune gpt2 --compile",
    )
    GROUPS: ClassVar[dict[str, str]] = {"model": "what to time"}
    ALIASES: ClassVar[dict[str, str]] = {"scheme": "quantize", "n_threads": "threads"}
    HINTS: ClassVar[dict[str, str]] = {"device": "a CPU's products are timed"}
    SECOND: ClassVar[str] = "one MODEL is timed at a time"
    model: str = flag("gpt2", "the model", positional=True)
    quantize: str | None = flag(None, "narrow the weights first", choices=SCHEMES)
    threads: int | None = flag(None, "threads (default: all it may use)", low=1, high=MOST_THREADS)
    compile: bool = flag(False, "compile the blocks in C, to be used from now on")
    passes: int = flag(15, "passes over each layout", low=1, high=1000)
    json: bool = flag(False, "print one JSON object")

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def from_flags(cls, given: dict[str, Any]) -> "TuneConfig":
        """Build the configuration from the flags that were given."""
        config = cls(**given)
        if config.quantize == "fp16":
            raise ValueError("quantize must be int8: weights of fp16 have one layout")
        with usage_error("MODEL"):
            check_model(config.model)
        return config


if __name__ == "__main__":
    # before torch loads: --help and mistakes answer at once
    with terminal.checked_output():
        terminal.prepare()
        CONFIG = parse(TuneConfig, sys.argv[1:])

from nanogpt2.checkpoints.load import open_checkpoint
from nanogpt2.cpu import native
from nanogpt2.cpu.decoder import can_run
from nanogpt2.cpu.prepared import prepared_for
from nanogpt2.cpu.tuning import ROWS, Table, table_for
from nanogpt2.devices import choose_device


def main(config: TuneConfig) -> None:
    """Load the model, time its matrices, print the table."""
    choose_device("cpu", config.threads)
    if config.compile:
        try:
            terminal.note(f"compiled: {native.compile_library()}")
        except (OSError, ValueError) as error:
            fail(f"--compile: {error}", code=1)
    with usage_error("MODEL"), open_checkpoint(config.model) as checkpoint:
        model = checkpoint.generator(quantize=config.quantize)
        if not can_run(model):
            raise ValueError("needs a PyTorch with oneDNN: there is nothing to choose from")
    products = prepared_for(model, tuned=False).products()
    table = table_for(products, anew=True, passes=config.passes)
    assert table is not None
    terminal.write(terminal.json_line(as_json(table)) if config.json else drawn(table))


def drawn(table: Table) -> str:
    """Draw the table: one line for each layout of each shape, the fastest marked."""
    head = [
        "matrix",
        "layout",
        *(f"{rows} row{'s' * (rows > 1)}, ms" for rows in ROWS),
        "laying out",
    ]
    lines = [head]
    for shape, layouts in table.items():
        least = {rows: min(t.rows[rows] for t in layouts.values()) for rows in ROWS}
        for name, t in layouts.items():
            times = [f"{t.rows[r]:.3f}{' *' if t.rows[r] == least[r] else ''}" for r in ROWS]
            lines.append([f"{shape[0]} x {shape[1]}", name, *times, f"{t.lay_out:.1f}"])
    return terminal.table(lines) + "\n* the fastest of this matrix\n"


def as_json(table: Table) -> dict[str, Any]:
    """Return the table as plain values."""
    return {
        f"{N}x{K}": {n: {"rows": t.rows, "lay_out": t.lay_out} for n, t in layouts.items()}
        for (N, K), layouts in table.items()
    }


if __name__ == "__main__":
    terminal.loaded()
    with terminal.checked_output():
        main(CONFIG)
