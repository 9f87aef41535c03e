"""Narrow a model's weights: python -m nanogpt2.quantize gpt2 --quantize int8 --out gpt2-int8.

The command line -> the model -> a folder of about half or a quarter of the size, for generating
on a CPU. --text measures the cost: the perplexity of a text before and after, and how often the
likeliest token stays the same. The formats of the weights are at the top of prepacked.py.
"""

import os
import sys

if __name__ == "__main__" and not __package__:
    # run by its path: find nanogpt2 beside this folder, in which inspect.py would hide Python's own
    sys.path[0] = os.path.dirname(sys.path[0])  # noqa: PTH120

from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from nanogpt2 import terminal
from nanogpt2.config import SCHEMES, check_data, check_model, fail, parse, usage_error
from nanogpt2.config.flags import check, flag


@dataclass(frozen=True)
class QuantizeConfig:
    """python -m nanogpt2.quantize MODEL [flags]: narrow a model's weights.

    MODEL is gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo, USER/NAME of the hub, or a path: a
    folder, or a file of safetensors, PyTorch (.bin, .pt) or llm.c.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "python -m nanogpt2.quantize gpt2 --out gpt2-int8",
        "python -m nanogpt2.quantize out --quantize fp16 --out out-fp16",
        "python -m nanogpt2.quantize out --text book.txt",
    )
    GROUPS: ClassVar[dict[str, str]] = {"quantize": "what is written", "text": "what it costs"}
    ALIASES: ClassVar[dict[str, str]] = {
        "output": "out",
        "output_dir": "out",
        "out_dir": "out",
        "outfile": "out",
        "save_dir": "out",
        "outtype": "quantize",
        "ftype": "quantize",
        "scheme": "quantize",
        "dataset": "text",
        "calibration_data": "text",
        "max_samples": "limit",
    }
    HINTS: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("model_name", "model_name_or_path", "model_path", "m"),
            "MODEL stands by itself: quantize gpt2 --out gpt2-int8",
        ),
        "o": "the folder to write is --out",
        "bits": "use --quantize int8 or fp16",
        "w_bit": "use --quantize int8 or fp16",
        "dtype": "use --quantize int8 or fp16",
        "type": "use --quantize int8 or fp16",
        "load_in_8bit": "use --quantize int8",
        "load_in_4bit": "use --quantize int8, the narrowest",
        "int8": "use --quantize int8",
        "fp16": "use --quantize fp16",
        "device": "narrow weights run on a CPU",
        "threads": "set them before the command: OMP_NUM_THREADS=4",
    }
    SECOND: ClassVar[str] = "the folder to write is --out"
    model: str = flag(MISSING, "the model", positional=True)
    quantize: str = flag("int8", "how", choices=SCHEMES)
    out: str | None = flag(None, "a new folder for the narrow model")
    text: str | None = flag(None, "a text, or a folder of them, to compare both models on")
    limit: int = flag(20_000, "only so many tokens of the text", low=2)
    json: bool = flag(False, "print one JSON object")

    def __post_init__(self) -> None:
        check(self)
        if self.out is None and self.text is None:
            raise ValueError("out must be given, or text, or both: there is nothing to do")
        if self.out is not None and Path(self.out).exists():
            raise ValueError(f"out must be a folder that is not there yet, not {self.out!r}")

    @classmethod
    def from_flags(cls, given: dict[str, Any]) -> "QuantizeConfig":
        """Build the configuration from the flags that were given."""
        config = cls(**given)
        with usage_error("MODEL"):
            check_model(config.model)
        if config.text is not None:
            with usage_error("--text"):
                check_data(config.text)
        return config


if __name__ == "__main__":
    # before torch loads: --help and mistakes answer at once
    with terminal.checked_output():
        terminal.prepare()
        CONFIG = parse(QuantizeConfig, sys.argv[1:])

import torch

from nanogpt2.checkpoints.load import open_checkpoint
from nanogpt2.checkpoints.save import save_model
from nanogpt2.cpu.inference_model import InferenceGPT
from nanogpt2.evaluation.examples import read_texts
from nanogpt2.evaluation.perplexity import joined, windows
from nanogpt2.metrics import finite, perplexity
from nanogpt2.model import GPT


@dataclass(frozen=True)
class Cost:
    """The effect of narrow weights on a text."""

    tokens: int
    perplexity_before: float
    perplexity_after: float
    top1_agreement: float  # share of the tokens whose likeliest successor is the same


def main(config: QuantizeConfig) -> None:
    """Narrow, compare, save."""
    with usage_error("MODEL"), open_checkpoint(config.model) as checkpoint:
        tokenizer, model = checkpoint.tokenizer, checkpoint.model()
        if isinstance(model, InferenceGPT):
            raise ValueError(f"{config.model!r} is narrow already")
        narrow = checkpoint.model(quantize=config.quantize)
    figures: dict[str, Any] = {"model": config.model, "quantize": config.quantize}
    try:
        for weight in model.parameters():
            # max returns NaN where there is one
            finite(weight.abs().max().item())
        if config.text is not None:
            with usage_error("--text"):
                ids = joined(read_texts(config.text, tokenizer.end_text), tokenizer)[: config.limit]
                figures |= asdict(measure(model, narrow, ids))
    except FloatingPointError as error:
        fail(str(error), code=1)
    if config.out is not None:
        try:
            save_model(narrow, config.out, tokenizer)
        except OSError as error:
            fail(str(error), code=1)
        figures |= {"out": config.out, "bytes": sum(map(_size, Path(config.out).glob("*.safe*")))}
    rows = [[name, f"{v:,.4f}" if isinstance(v, float) else str(v)] for name, v in figures.items()]
    terminal.write(terminal.json_line(figures) if config.json else terminal.table(rows) + "\n")


@torch.no_grad()
def measure(model: GPT, narrow: GPT, ids: list[int]) -> Cost:
    """Compare the two on a text's ids.

    Raises ValueError for fewer than two, FloatingPointError for a loss that is not finite.
    """
    if len(ids) < 2:
        raise ValueError(f"must hold 2 tokens or more, not {len(ids)}")
    longest = model.config.block_size
    nats, same = [0.0, 0.0], 0
    for inputs, targets in windows(ids, longest, longest, batch_size=1):
        before, after = model(inputs), narrow(inputs)  # (1, T, V)
        same += int((before.argmax(dim=2) == after.argmax(dim=2)).sum())
        for n, logits in enumerate((before, after)):
            loss = torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="sum")
            nats[n] += finite(loss.item())
    count = len(ids) - 1
    return Cost(count, perplexity(nats[0] / count), perplexity(nats[1] / count), same / count)


def _size(path: Path) -> int:
    return path.stat().st_size


if __name__ == "__main__":
    terminal.loaded()
    with terminal.checked_output():
        main(CONFIG)
