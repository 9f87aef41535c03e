"""Measure a model: python -m nanogpt2.evaluate --model gpt2 --task lambada lambada_test.jsonl.

The command line -> the file -> the model -> the figures, beside the published ones of an official
model. The top of each task's file in evaluation/ defines its figures.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from nanogpt2 import terminal
from nanogpt2.config import (
    DEVICES,
    DTYPES,
    KERNELS,
    SCHEMES,
    check_data,
    check_model,
    fail,
    parse,
    usage_error,
)
from nanogpt2.config.flags import check, flag

TASKS = ("perplexity", "lambada", "hellaswag", "classify")
# flags of one task alone
OWN_FLAGS = {"stride": "perplexity", "text_column": "classify", "label_column": "classify"}


@dataclass(frozen=True)
class EvaluateConfig:
    """python -m nanogpt2.evaluate FILE [flags]: measure a GPT-2.

    FILE is, by --task: perplexity, a text, a folder of them or a name as for train.py; else records
    (.jsonl and the like): lambada's have `text`; hellaswag's `ctx`, `endings` and `label`;
    classify's `text` and `label`, for a --model that train.py --task classify made.
    """

    file: str = flag(MISSING, "the text or the examples", positional=True)
    task: str = flag("perplexity", "what to measure", choices=TASKS)
    model: str = flag("gpt2", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo or a path")
    device: str = flag("auto", "where to run", choices=DEVICES)
    dtype: str = flag("float32", "the weights' type", choices=DTYPES)
    quantize: str | None = flag(None, "narrow the weights, on a CPU", choices=SCHEMES)
    kernels: str = flag(
        "auto",
        "what computes; auto: triton on a GPU; reference: ops.py's formulas",
        choices=KERNELS,
    )
    batch_size: int = flag(8, "sequences side by side", low=1)
    block_size: int | None = flag(None, "tokens that are seen (default: the model's)", low=1)
    stride: int | None = flag(
        None, "perplexity: tokens between windows (default: half the block size)", low=1
    )
    limit: int | None = flag(None, "only the first examples, or tokens of the text", low=1)
    text_column: str = flag("text", "classify: the column of the texts")
    label_column: str = flag("label", "classify: the column of the labels")
    json: bool = flag(False, "print one JSON object")

    def __post_init__(self) -> None:
        check(self)
        if self.quantize and (self.dtype != "float32" or self.task == "classify"):
            raise ValueError("quantize must come with dtype float32 and a model that writes texts")

    @classmethod
    def from_flags(cls, given: dict[str, Any]) -> "EvaluateConfig":
        """Build the configuration from the flags that were given."""
        config = cls(**given)
        for name, task in OWN_FLAGS.items():
            if name in given and task != config.task:
                raise ValueError(f"{name} must come with --task {task}, not {config.task}")
        with usage_error("FILE"):
            check_data(config.file)
        with usage_error("--model"):
            check_model(config.model)
        return config


if __name__ == "__main__":
    # before torch loads: --help and mistakes answer at once
    with terminal.checked_output():
        terminal.prepare()
        CONFIG = parse(EvaluateConfig, sys.argv[1:])

from nanogpt2 import ops
from nanogpt2.checkpoints.load import open_checkpoint
from nanogpt2.devices import choose_device
from nanogpt2.evaluation.classification import measure_classification
from nanogpt2.evaluation.examples import read_examples, read_texts
from nanogpt2.evaluation.hellaswag import measure_hellaswag, read_hellaswag
from nanogpt2.evaluation.lambada import measure_lambada, read_lambada
from nanogpt2.evaluation.perplexity import joined, measure_perplexity
from nanogpt2.evaluation.published import published
from nanogpt2.tokenizer import Tokenizer

Advance = Callable[[int], object]
# the number of examples, and a function that measures a model with a block size
Job = tuple[int, Callable[[Any, int, Advance], Mapping[str, Any]]]


def main(config: EvaluateConfig) -> None:
    """Read the file, load the model, print the figures."""
    model: Any
    with usage_error("--device"):
        device = choose_device(config.device)
    with usage_error():
        ops.choose_kernels(config.kernels, device)
    with usage_error("--model"):
        checkpoint = open_checkpoint(config.model)
        tokenizer = checkpoint.tokenizer
    with usage_error("FILE"):
        count, measure = JOBS[config.task](config, tokenizer)
    with usage_error("--model"), checkpoint:
        kernels, quantize = config.kernels, config.quantize
        if config.task == "classify":
            model = checkpoint.classifier(device, config.dtype, kernels=kernels)
        else:
            model = checkpoint.model(device, config.dtype, quantize=quantize, kernels=kernels)
    terminal.note(ops.describe_kernels(config.kernels, model.kernels, device))
    longest = model.config.block_size
    block_size = config.block_size or longest
    if block_size > longest:
        fail(f"--block_size must be <= {longest}, the model's, not {block_size}")
    if (config.stride or 1) > block_size:
        fail(f"--stride must be <= {block_size}, the block size, not {config.stride}")
    with usage_error("FILE"), terminal.Progress(count, 0, "example") as bar:
        figures = measure(model, block_size, bar.advance)
    terminal.write(shown(config, block_size, figures) + "\n")


def perplexity_job(config: EvaluateConfig, tokenizer: Tokenizer) -> Job:
    """Strided perplexity of a text."""
    ids = joined(read_texts(config.file), tokenizer)
    if len(ids) < 2:
        raise ValueError(f"{config.file!r} must hold 2 tokens or more, not {len(ids)}")
    if config.limit == 1:
        fail("--limit must be >= 2, tokens of a text, not 1")
    ids = ids[: config.limit]

    def measure(model: Any, block_size: int, advance: Advance) -> Mapping[str, Any]:
        stride = config.stride or max(1, block_size // 2)
        found = measure_perplexity(
            model,
            tokenizer,
            ids,
            block_size=block_size,
            stride=stride,
            batch_size=config.batch_size,
            advance=advance,
        )
        return {"stride": stride} | dataclasses.asdict(found)

    return len(ids) - 1, measure


def lambada_job(config: EvaluateConfig, tokenizer: Tokenizer) -> Job:
    """Last words."""
    passages = read_lambada(read_examples(config.file, config.limit), tokenizer)

    def measure(model: Any, block_size: int, advance: Advance) -> Mapping[str, Any]:
        found = measure_lambada(model, tokenizer, passages, config.batch_size, block_size, advance)
        return dataclasses.asdict(found)

    return len(passages), measure


def hellaswag_job(config: EvaluateConfig, tokenizer: Tokenizer) -> Job:
    """Endings."""
    readings = read_hellaswag(read_examples(config.file, config.limit))

    def measure(model: Any, block_size: int, advance: Advance) -> Mapping[str, Any]:
        return measure_hellaswag(model, tokenizer, readings, config.batch_size, block_size, advance)

    return sum(len(q.endings) for qs in readings.values() for q in qs), measure


def classify_job(config: EvaluateConfig, tokenizer: Tokenizer) -> Job:
    """Labels."""
    records = read_examples(config.file, config.limit)
    columns = (config.text_column, config.label_column)
    for record in records:
        record.text(columns[0])
        record.label(columns[1])

    def measure(model: Any, block_size: int, advance: Advance) -> Mapping[str, Any]:
        return measure_classification(
            model, tokenizer, records, columns, config.batch_size, block_size, advance
        )

    return len(records), measure


JOBS = {
    "perplexity": perplexity_job,
    "lambada": lambada_job,
    "hellaswag": hellaswag_job,
    "classify": classify_job,
}


def shown(config: EvaluateConfig, block_size: int, figures: Mapping[str, Any]) -> str:
    """Write the figures as one JSON object, or as a table followed by the published ones."""
    others = published(config.task, config.model)
    if config.json:
        head = {"task": config.task, "model": config.model, "file": config.file}
        rest = {"published": [dataclasses.asdict(p) for p in others]} if others else {}
        return json.dumps(head | {"block_size": block_size} | dict(figures) | rest)
    tables = {name: figures[name] for name in ("classes", "confusion") if name in figures}
    rows = [["figure", "measured"], ["block_size", str(block_size)]]
    plain = {name: value for name, value in figures.items() if name not in tables}
    rows += [[name, _number(value)] for name, value in _flat(plain)]
    text = terminal.table(rows)
    for cells in tables.values():
        columns = list(next(iter(cells.values())))
        body = [[label, *map(_number, row.values())] for label, row in cells.items()]
        text += "\n\n" + terminal.table([["label", *columns], *body])
    if others:
        text += "\n\n" + terminal.table(
            [["published", "value", "source"]]
            + [[p.figure, _number(p.value), p.source] for p in others]
        )
    return text


def _flat(figures: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """{"plain": {"acc": x}} -> ("plain acc", x)."""
    found: list[tuple[str, Any]] = []
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found += [(f"{name} {inner}", number) for inner, number in _flat(value)]
        else:
            found.append((name, value))
    return found


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


if __name__ == "__main__":
    with terminal.checked_output():
        main(CONFIG)
