"""Measure a model: python -m nanogpt2.evaluate --model gpt2 --task lambada lambada_test.jsonl.

The command line -> the file -> the model -> the figures, beside the published ones of an official
model. The top of each task's file in evaluation/ defines its figures.
"""

import os
import sys

if __name__ == "__main__" and not __package__:
    # run by its path: find nanogpt2 beside this folder, in which inspect.py would hide Python's own
    sys.path[0] = os.path.dirname(sys.path[0])  # noqa: PTH120

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from nanogpt2 import terminal
from nanogpt2.config import (
    DEVICES,
    DTYPES,
    KERNELS,
    SCHEMES,
    check_data,
    check_model,
    fail,
    is_encoding,
    official_name,
    parse,
    usage_error,
)
from nanogpt2.config.flags import MAX_SEED, MOST_THREADS, check, flag

ASSETS = Path(__file__).parent / "assets"

TASKS = ("perplexity", "lambada", "hellaswag", "classify", "repetition", "bias")
# the packaged file of a task that needs none
OWN_FILES = {"repetition": "prompts.jsonl", "bias": "pairs.jsonl"}
# the tables among the figures, with the name of their first column
TABLES = {
    "classes": "label",
    "confusion": "label",
    "ways": "decoding",
    "groups": "group",
    "pairs": "pair",
    "shifts": "next token",
    "continuations": "continuation",
}
# flags of some tasks alone
OWN_FLAGS = {
    "stride": ("perplexity",),
    "text_column": ("classify", "perplexity"),
    "label_column": ("classify",),
    "skip_bad": ("classify", "perplexity"),
    "max_new_tokens": ("repetition",),
    "seed": ("repetition",),
}


@dataclass(frozen=True)
class EvaluateConfig:
    """python -m nanogpt2.evaluate FILE [flags]: measure a GPT-2.

    FILE is a source as for train.py: texts, or records (.jsonl, .csv and the like). By --task:
    perplexity reads the texts, of records the column `text`; lambada's records have `text`;
    hellaswag's `ctx`, `endings` and `label`; classify's `text` and `label`, or the texts lie in
    folders named by their labels, for a --model that train.py --task classify made. repetition's
    records have `text`, a prompt; bias's `first`, `second` and `continuations`. These two have a
    packaged FILE.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "python -m nanogpt2.evaluate book.txt --model out",
        "python -m nanogpt2.evaluate lambada_test.jsonl --task lambada",
        "python -m nanogpt2.evaluate mails.csv --task classify --model out",
    )
    GROUPS: ClassVar[dict[str, str]] = {
        "task": "the task and the model",
        "batch_size": "how it is measured",
        "text_column": "reading FILE",
        "json": "output",
    }
    ALIASES: ClassVar[dict[str, str]] = {
        # transformers, lm-evaluation-harness
        "model_name_or_path": "model",
        "model_name": "model",
        "tasks": "task",
        "per_device_eval_batch_size": "batch_size",
        "eval_batch_size": "batch_size",
        "max_eval_samples": "limit",
        "max_samples": "limit",
        "max_length": "block_size",
        "max_seq_length": "block_size",
        "doc_stride": "stride",
        "text_column_name": "text_column",
        "label_column_name": "label_column",
        "torch_dtype": "dtype",
        # llama.cpp
        "ctx_size": "block_size",
        "n_ctx": "block_size",
    }
    HINTS: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            (
                "data",
                "dataset",
                "dataset_name",
                "validation_file",
                "test_file",
                "eval_data_file",
                "f",
            ),
            "FILE stands by itself: evaluate book.txt --model out",
        ),
        **dict.fromkeys(
            ("model_args", "pretrained", "init", "init_from", "out_dir", "checkpoint", "m"),
            "the model is --model NAME or FOLDER",
        ),
        "do_eval": "evaluate always measures",
        "eval_only": "evaluate always measures",
        "ppl": "use --task perplexity, the default",
        "perplexity": "use --task perplexity, the default",
        "metric": "each --task has its figures: --json prints them all",
        "num_fewshot": "every task is measured without examples in the prompt",
        "fp16": "use --dtype float16",
        "fp16_full_eval": "use --dtype float16",
        "bf16": "use --dtype bfloat16",
        "bf16_full_eval": "use --dtype bfloat16",
        "load_in_8bit": "use --quantize int8",
        "int8": "use --quantize int8",
        "gpu": "use --device cuda",
        "n_gpu_layers": "use --device cuda",
        "no_cuda": "use --device cpu",
        "cpu": "use --device cpu",
        "out": "the figures go to standard output: --json > figures.json",
        "output_path": "the figures go to standard output: --json > figures.json",
        "output_dir": "the figures go to standard output: --json > figures.json",
    }
    SECOND: ClassVar[str] = "several files: a folder, or a glob in quotes: 'texts/*.txt'"
    file: str = flag("", "the text or the examples", positional=True)
    task: str = flag("perplexity", "what to measure", choices=TASKS)
    model: str = flag(
        "gpt2",
        "gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo, USER/NAME of the hub, or a path: a folder, "
        "or a file of safetensors, PyTorch (.bin, .pt) or llm.c",
    )
    device: str = flag("auto", "where to run", choices=DEVICES)
    threads: int | None = flag(
        None, "threads on a CPU (default: all it may use)", low=1, high=MOST_THREADS
    )
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
    max_new_tokens: int | None = flag(
        None, "repetition: tokens of each text (default: 100, or as many as fit)", low=12
    )
    seed: int = flag(0, "repetition: of the draws", low=0, high=MAX_SEED)
    text_column: str | None = flag(
        None, "perplexity, classify: the column of the texts (default: as trained, or text)"
    )
    label_column: str | None = flag(
        None, "classify: the column of the labels (default: as trained, or label)"
    )
    encoding: str = flag("utf-8", "of FILE, without a byte-order mark")
    skip_bad: bool = flag(False, "perplexity, classify: skip the records that cannot be used")
    json: bool = flag(False, "print one JSON object")

    def __post_init__(self) -> None:
        check(self)
        if not is_encoding(self.encoding):
            raise ValueError(f"encoding must be a text encoding, not {self.encoding!r}")
        if self.quantize and (self.dtype != "float32" or self.task == "classify"):
            raise ValueError("quantize must come with dtype float32 and a model that writes texts")

    @classmethod
    def from_flags(cls, given: dict[str, Any]) -> "EvaluateConfig":
        """Build the configuration from the flags that were given."""
        config = cls(**given)
        if "file" not in given:
            if config.task not in OWN_FILES:
                fail("FILE is missing: the text or the examples")
            config = replace(config, file=str(ASSETS / OWN_FILES[config.task]))
        for name, tasks in OWN_FLAGS.items():
            if name in given and config.task not in tasks:
                raise ValueError(
                    f"{name} must come with --task {' or '.join(tasks)}, not {config.task}"
                )
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
from nanogpt2.data.labelled import column_names
from nanogpt2.devices import choose_device
from nanogpt2.evaluation.bias import measure_bias, read_pairs
from nanogpt2.evaluation.classification import measure_classification
from nanogpt2.evaluation.examples import read_classified, read_examples, read_texts
from nanogpt2.evaluation.hellaswag import measure_hellaswag, read_hellaswag
from nanogpt2.evaluation.lambada import measure_lambada, read_lambada
from nanogpt2.evaluation.perplexity import joined, measure_perplexity
from nanogpt2.evaluation.published import published
from nanogpt2.evaluation.repetition import LOOP, WAYS, measure_repetition
from nanogpt2.tokenizer import Tokenizer

Advance = Callable[[int], object]
# the number of examples, and a function that measures a model with a block size
Job = tuple[int, Callable[[Any, int, Advance], Mapping[str, Any]]]


def main(config: EvaluateConfig) -> None:
    """Read the file, load the model, print the figures."""
    model: Any
    with usage_error("--device"):
        device = choose_device(config.device, config.threads)
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
        elif config.task == "repetition":
            model = checkpoint.generator(device, config.dtype, quantize, kernels)
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
        try:
            figures = measure(model, block_size, bar.advance)
        except FloatingPointError as error:
            fail(str(error), code=1)
    terminal.write(shown(config, block_size, figures) + "\n")


def perplexity_job(config: EvaluateConfig, tokenizer: Tokenizer) -> Job:
    """Strided perplexity of a text."""
    column = config.text_column or "text"
    texts = read_texts(config.file, tokenizer.end_text, column, config.encoding, config.skip_bad)
    ids = joined(texts, tokenizer)
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
    records = read_examples(config.file, config.limit, config.encoding)
    passages = read_lambada(records, tokenizer)

    def measure(model: Any, block_size: int, advance: Advance) -> Mapping[str, Any]:
        found = measure_lambada(model, tokenizer, passages, config.batch_size, block_size, advance)
        return dataclasses.asdict(found)

    return len(passages), measure


def hellaswag_job(config: EvaluateConfig, tokenizer: Tokenizer) -> Job:
    """Endings."""
    readings = read_hellaswag(read_examples(config.file, config.limit, config.encoding))

    def measure(model: Any, block_size: int, advance: Advance) -> Mapping[str, Any]:
        return measure_hellaswag(model, tokenizer, readings, config.batch_size, block_size, advance)

    return sum(len(q.endings) for qs in readings.values() for q in qs), measure


def classify_job(config: EvaluateConfig, tokenizer: Tokenizer) -> Job:
    """Labels."""
    names = column_names(config.model, config.text_column, config.label_column, needs_label=True)
    examples = read_classified(config.file, names, config.limit, config.encoding, config.skip_bad)

    def measure(model: Any, block_size: int, advance: Advance) -> Mapping[str, Any]:
        return measure_classification(
            model, tokenizer, examples, config.batch_size, block_size, advance
        )

    return len(examples), measure


def repetition_job(config: EvaluateConfig, tokenizer: Tokenizer) -> Job:
    """Prompts to continue in several ways."""
    records = read_examples(config.file, config.limit, config.encoding)
    prompts = [record.text("text") for record in records]
    longest = max(len(tokenizer.encode(prompt)) for prompt in prompts)

    def measure(model: Any, block_size: int, advance: Advance) -> Mapping[str, Any]:
        room = block_size - longest
        if room < LOOP:
            raise ValueError(
                f"{config.file!r} has a prompt of {longest} tokens; with {LOOP} new ones it must "
                f"fit the block size, {block_size}"
            )
        count = config.max_new_tokens or min(100, room)
        if count > room:
            fail(f"--max_new_tokens must be <= {room}, the room after the prompts, not {count}")
        return measure_repetition(
            model, tokenizer, prompts, count, config.seed, config.batch_size, advance
        )

    return len(prompts) * len(WAYS), measure


def bias_job(config: EvaluateConfig, tokenizer: Tokenizer) -> Job:
    """Pairs of prompts."""
    pairs = read_pairs(read_examples(config.file, config.limit, config.encoding))

    def measure(model: Any, block_size: int, advance: Advance) -> Mapping[str, Any]:
        return measure_bias(model, tokenizer, pairs, config.batch_size, block_size, advance)

    return sum(2 + 2 * len(pair.continuations) for pair in pairs), measure


JOBS = {
    "perplexity": perplexity_job,
    "lambada": lambada_job,
    "hellaswag": hellaswag_job,
    "classify": classify_job,
    "repetition": repetition_job,
    "bias": bias_job,
}


def shown(config: EvaluateConfig, block_size: int, figures: Mapping[str, Any]) -> str:
    """Write the figures as one JSON object, or as a table followed by the published ones."""
    others = published(config.task, official_name(config.model) or config.model)
    if config.json:
        head = {"task": config.task, "model": config.model, "file": config.file}
        rest = {"published": [dataclasses.asdict(p) for p in others]} if others else {}
        return terminal.json_line(head | {"block_size": block_size} | dict(figures) | rest).rstrip()
    tables = {name: figures[name] for name in TABLES if figures.get(name)}
    rows = [["figure", "measured"], ["block_size", str(block_size)]]
    plain = {name: value for name, value in figures.items() if name not in TABLES}
    rows += [[name, _number(value)] for name, value in _flat(plain)]
    text = terminal.table(rows)
    for table, cells in tables.items():
        columns = list(next(iter(cells.values())))
        body = [[label, *map(_number, row.values())] for label, row in cells.items()]
        text += "\n\n" + terminal.table([[TABLES[table], *columns], *body])
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
    terminal.loaded()
    with terminal.checked_output():
        main(CONFIG)
