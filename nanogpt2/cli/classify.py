"""sample.py --classify: label texts; print a table or one JSON object for each text.

--prompts names a source that train.py reads, or a text file with one text a line. Where the texts
have labels, a note tells how many of the predictions are right.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanogpt2 import ops, terminal
from nanogpt2.checkpoints.load import open_checkpoint
from nanogpt2.classifier import GPTClassifier
from nanogpt2.cli.text import as_line
from nanogpt2.config import SampleConfig, fail, usage_error
from nanogpt2.data.files import DataFile, EncodingError, find_files
from nanogpt2.data.labelled import (
    LabelledText,
    column_names,
    read_labelled,
    skip_or_raise,
    with_advice,
)
from nanogpt2.data.records import excerpt
from nanogpt2.memory import is_out_of_memory
from nanogpt2.metrics import accuracy, macro_f1
from nanogpt2.tokenizer import Tokenizer


def show_labels(config: SampleConfig, device: str, prompt: str) -> None:
    """Load the classifier and print the labels of the prompt, or of each text of --prompts."""
    examples = [LabelledText("PROMPT", prompt)]
    if config.prompts is not None:
        with usage_error("--prompts"):
            examples = read_examples(config)
    elif not prompt:
        fail("PROMPT is empty: there is nothing to classify")
    texts = [example.text for example in examples]
    with usage_error("--model"), open_checkpoint(config.model) as checkpoint:
        tokenizer = checkpoint.tokenizer
        model = checkpoint.classifier(device, config.dtype, kernels=config.kernels)
    terminal.note(ops.describe_kernels(config.kernels, model.kernels, device))
    show = as_line if config.json or config.prompts else draw
    predicted = []
    try:
        for found in classify(model, tokenizer, texts, config.batch_size):
            terminal.write(show(found))
            predicted.append(found["label"])
    except FloatingPointError as error:
        fail(str(error), code=1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail("out of memory: lower --batch_size or the texts' length", code=1)
    terminal.note(compared(examples, predicted, model.labels))


def read_examples(config: SampleConfig) -> list[LabelledText]:
    """Return the texts of --prompts. Raises ValueError or OSError for what cannot be read."""
    source = str(config.prompts)
    files = find_files(source, encoding=config.encoding)
    found, is_stdin = None, source == "-"
    if (is_stdin or Path(source).is_file()) and files[0].format in (".txt", ".jsonl", ".json"):
        text = _text(files[0], config.skip_bad)
        has_json = is_stdin or files[0].format != ".txt"
        first = _value(next(filter(str.strip, text.split("\n")), "")) if has_json else None
        if isinstance(first, str) or (files[0].format == ".txt" and not isinstance(first, dict)):
            found = _lines(files[0].name, text, isinstance(first, str), config.skip_bad)
        elif is_stdin:
            files = [replace(files[0], format=".jsonl")]
    if found is None:
        names = column_names(config.model, config.text_column, config.label_column)
        found = read_labelled(files, names, config.skip_bad)
    examples = [example for example in found if _is_unicode(example, config.skip_bad)]
    if not examples:
        raise ValueError(f"{source!r} is empty: no text in it")
    return examples


def _text(file: DataFile, skip_bad: bool) -> str:
    """Return a file's text; with skip_bad, bytes that are not in its encoding become surrogates."""
    try:
        return "".join(file.text())
    except EncodingError as error:
        if not skip_bad:
            raise ValueError(f"{with_advice(error)} (--skip_bad skips the line)") from None
        text = b"".join(file.pieces()).decode(error.encoding, "surrogateescape")
        return "\n".join(re.split("\r\n?|\n", text))


def _lines(name: str, text: str, is_json: bool, skip_bad: bool) -> Iterator[LabelledText]:
    """Yield the text of each line, or the text in JSON; blank ones are dropped."""
    for number, line in enumerate(text.split("\n"), 1):
        value = _value(line) if is_json and line.strip() else line
        where = f"{name!r} line {number}"
        if not isinstance(value, str):
            skip_or_raise(f"{where} is not a text in JSON: {excerpt(line)}", skip_bad)
        elif value.strip():
            yield LabelledText(where, value)


def _value(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_unicode(example: LabelledText, skip_bad: bool) -> bool:
    """Tell whether a text can be written; half a surrogate pair cannot."""
    try:
        example.text.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"character {error.start + 1} is half a surrogate pair, or an undecodable byte"
        skip_or_raise(f"{example.where}: {what}", skip_bad)
        return False
    return True


def compared(examples: list[LabelledText], predicted: list[str], labels: tuple[str, ...]) -> str:
    """Say how many predictions are right, where the texts have labels; "" where none has one."""
    pairs = [
        (example.label, found)
        for example, found in zip(examples, predicted, strict=True)
        if example.label is not None
    ]
    if not pairs:
        return ""
    targets, found = map(list, zip(*pairs, strict=True))
    unknown = [target for target in targets if target not in labels]
    some = ", ".join(map(repr, sorted(set(unknown))[:3]))
    if len(unknown) == len(targets):
        return f"note: no accuracy, because the model knows none of the labels ({some})"
    said = f"accuracy {accuracy(targets, found):.4f}, macro F1 {macro_f1(targets, found):.4f}"
    more = f"; the model does not know {len(unknown)} of the labels ({some})" if unknown else ""
    return f"{said} on {len(targets)} of {len(examples)} texts{more}"


def classify(
    model: GPTClassifier, tokenizer: Tokenizer, texts: list[str], batch_size: int
) -> Iterator[dict[str, Any]]:
    """Yield {"text", "label", "probabilities"} for each text in order, the likeliest label first.

    No text may be empty. Raises FloatingPointError for scores that are not finite.
    """
    rows = [tokenizer.encode(text) for text in texts]
    size = model.config.block_size
    if long := sum(len(row) > size for row in rows):
        terminal.note(
            f"note: {long} of {len(rows)} texts are longer than the context of {size} tokens: "
            "only their start counts"
        )
    for start in range(0, len(rows), batch_size):
        batch = slice(start, start + batch_size)
        probabilities = model.classify(rows[batch])  # (B, L)
        if not torch.isfinite(probabilities).all():
            raise FloatingPointError(
                "the model's scores are not finite numbers: are its weights damaged, or its dtype "
                "too narrow?"
            )
        for text, row in zip(texts[batch], probabilities.tolist(), strict=True):
            # the digits after these depend on the other texts of the batch
            pairs = zip(model.labels, (round(p, 5) for p in row), strict=True)
            ranked = dict(sorted(pairs, key=lambda pair: -pair[1]))
            yield {"text": text, "label": next(iter(ranked)), "probabilities": ranked}


def draw(record: dict[str, Any]) -> str:
    """Draw a table of the labels and their probabilities."""
    figures = [[label, f"{p:.4f}"] for label, p in record["probabilities"].items()]
    return terminal.table([["label", "probability"], *figures]) + "\n"
