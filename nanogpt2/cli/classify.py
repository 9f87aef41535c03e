"""sample.py --classify: label texts; print a table or one JSON object for each text.

This file does not know the source of the texts.
"""

from collections.abc import Iterator
from typing import Any

import torch

from nanogpt2 import ops, terminal
from nanogpt2.checkpoints.load import open_checkpoint
from nanogpt2.classifier import GPTClassifier
from nanogpt2.cli.text import as_line
from nanogpt2.config import SampleConfig, fail, usage_error
from nanogpt2.memory import is_out_of_memory
from nanogpt2.tokenizer import Tokenizer


def show_labels(config: SampleConfig, device: str, texts: list[str]) -> None:
    """Load the classifier and print the labels of each text."""
    if not all(texts):
        fail("PROMPT is empty: there is nothing to classify")
    with usage_error("--model"), open_checkpoint(config.model) as checkpoint:
        tokenizer = checkpoint.tokenizer
        model = checkpoint.classifier(device, config.dtype, kernels=config.kernels)
    terminal.note(ops.describe_kernels(config.kernels, model.kernels, device))
    show = as_line if config.json or config.prompts else draw
    try:
        for found in classify(model, tokenizer, texts, config.batch_size):
            terminal.write(show(found))
    except FloatingPointError as error:
        fail(str(error), code=1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail("out of memory: lower --batch_size or the texts' length", code=1)


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
