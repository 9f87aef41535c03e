"""Continue a text with a GPT-2: python sample.py "Once upon a time".

The command line -> the model and its tokenizer -> the prompt as token ids -> text, as it is made.
"""

import json
import secrets
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanogpt2 import terminal
from nanogpt2.config import GenerationConfig, SampleConfig, fail, parse, wrong_use

if __name__ == "__main__":
    # before torch loads: --help and mistakes answer at once
    CONFIG = parse(SampleConfig, sys.argv[1:])
    terminal.exit_on_signals()

import torch

from nanogpt2.generation.engine import context_start
from nanogpt2.generation.sampling import decode, special_ids, start_ids
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer
from nanogpt2.weights import choose_device, load_model, load_tokenizer


def main(config: SampleConfig) -> None:
    """Read the prompt, load the model, print the texts."""
    with wrong_use("--prompt_file" if config.prompt_file is not None else "PROMPT"):
        prompt = read_prompt(config)
    with wrong_use("--device"):
        device = choose_device(config.device)
    with wrong_use("--model"):
        model = load_model(config.model, device, config.dtype)
        tokenizer = load_tokenizer(config.model)
    # a seed of our own where none is given, so that any text can be made again
    seed = config.generation.seed
    seed = secrets.randbits(63) if seed is None else seed
    config = replace(config, generation=replace(config.generation, seed=seed))
    try:
        sample(config, model, tokenizer, prompt)
    except ValueError as error:
        fail(f"--{error}")


def read_prompt(config: SampleConfig) -> str:
    """Return the text to continue, without a file's last line break.

    Raises OSError for a file that cannot be read, ValueError for one that is not UTF-8.
    """
    if config.prompt_file is not None:
        data = Path(config.prompt_file).read_bytes()
    elif config.prompt == "-":
        data = sys.stdin.buffer.read()
    else:
        return config.prompt
    try:
        return data.decode("utf-8").removeprefix("\ufeff").removesuffix("\n")
    except UnicodeDecodeError as error:
        where = config.prompt_file or "standard input"
        raise ValueError(
            f"{where!r} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from None


def sample(config: SampleConfig, model: GPT, tokenizer: Tokenizer, prompt: str) -> None:
    """Print the prompt and its continuations: the first one as it is made, the others after it.

    Raises ValueError for a prompt that leaves no room for a token.
    """
    options = config.generation
    ids = start_ids(model, torch.tensor([tokenizer.encode(prompt)], dtype=torch.int64))
    note_dropped(ids.size(1), options, model.config.block_size)
    stops, _ = special_ids(model, options)
    texts = [Completion(tokenizer, stops) for _ in range(options.num_return_sequences)]
    headings = [f"--- {i + 1} of {len(texts)} ---\n" for i in range(len(texts))]
    openings = [heading + prompt if len(texts) > 1 else prompt for heading in headings]
    for step, tokens in enumerate(decode(model, ids, None, options)):
        pieces = [text.add(token) for text, token in zip(texts, tokens.tolist(), strict=True)]
        if not config.json:
            terminal.write(pieces[0] if step else openings[0] + pieces[0])
    for index, text in enumerate(texts):
        rest = text.finish()
        if config.json:
            print(json.dumps(text.as_json(prompt, index, options.seed)))
        else:
            terminal.write((openings[index] + text.text if index else rest) + "\n")


class Completion:
    """One continuation while it grows."""

    def __init__(self, tokenizer: Tokenizer, stops: list[int]) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason = "length"
        self._stops = stops
        self._stream = tokenizer.stream()

    def add(self, token: int) -> str:
        """Take the next token and return the text it completes; after the end there is none."""
        if self.finish_reason == "stop":
            return ""
        self.token_ids.append(token)
        if token in self._stops:
            self.finish_reason = "stop"
            return ""
        piece = self._stream.feed([token])
        self.text += piece
        return piece

    def finish(self) -> str:
        """Return the text of a character that was left unfinished."""
        piece = self._stream.finish()
        self.text += piece
        return piece

    def as_json(self, prompt: str, index: int, seed: int | None) -> dict[str, Any]:
        """The object that --json prints."""
        return {
            "prompt": prompt,
            "index": index,
            "text": prompt + self.text,
            "completion": self.text,
            "token_ids": self.token_ids,
            "score": None,
            "finish_reason": self.finish_reason,
            "seed": seed,
        }


def note_dropped(length: int, options: GenerationConfig, block_size: int) -> None:
    """Say how much of a long prompt the model does not see."""
    new = options.max_new_tokens or max(0, (options.max_length or 0) - length)
    dropped = context_start(length, length + new, block_size)
    if dropped:
        terminal.note(
            f"note: the prompt has {length} tokens and the context {block_size}: "
            f"the first {dropped} are dropped"
        )


if __name__ == "__main__":
    main(CONFIG)
