"""A text on standard output, as characters or as JSON; notes on a model."""

import sys
from typing import Any

from nanogpt2 import terminal
from nanogpt2.generation.text import Completion
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text, or its bytes if they are not valid UTF-8."""
    data = tokenizer.decode_bytes([token])
    try:
        return repr(data.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(data)


def shown(text: str) -> str:
    """Return a text for standard output: on a terminal its control characters become escapes."""
    return terminal.visible(text) if sys.stdout.isatty() else text


def ignored(model: GPT) -> str:
    """Return a note on the options in the model's generation_config.json."""
    names = ", ".join(model.generation_options or ())
    return names and f"note: generation_config.json sets {names}; only the flags count here"


def as_line(value: Any) -> str:
    """Return a value as a line of JSON."""
    return terminal.json_line(value)


def as_json(
    prompt: str, index: int, completion: Completion, score: float | None, seed: int | None
) -> dict[str, Any]:
    """Return the object that --json prints for a text."""
    return {
        "prompt": prompt,
        "index": index,
        "text": prompt + completion.text,
        "completion": completion.text,
        "token_ids": completion.token_ids,
        "score": score,
        "finish_reason": completion.finish_reason,
        "seed": seed,
    }
