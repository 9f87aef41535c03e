"""Many prompts: a file in, one JSON object a text out, in the order of the file.

The file is text, a prompt a line, or JSONL: a string or an object with "prompt". Prompts of about
the same length are decoded together. This file does not know how tokens are chosen.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanogpt2 import terminal
from nanogpt2.cli.one import Text, decode_texts, request_for
from nanogpt2.cli.text import as_json
from nanogpt2.config import GenerationConfig
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer

# rounds in which --unique tries to replace texts that were there already
MOST_ROUNDS = 10


def read_prompts(source: str, skip_bad: bool) -> list[str]:
    """Read the prompts of a file, or of standard input where it is -.

    Raises ValueError that names the first broken line, unless broken lines are to be skipped: then
    each is noted. Raises OSError for a file that cannot be read.
    """
    data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    prompts = []
    is_jsonl = source.endswith(".jsonl") or data.lstrip()[:1] in (b"{", b'"')
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        try:
            text = line.decode("utf-8")
            prompt = _prompt(text) if is_jsonl and text.strip() else text
        except (ValueError, RecursionError) as error:
            message = f"{source!r} line {number}: {error}"
            if not skip_bad:
                raise ValueError(f"{message} (--skip_bad goes on without it)") from None
            terminal.note(f"skipped {message}")
            continue
        if prompt.strip():
            prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{source!r} holds no prompt")
    return prompts


def _prompt(line: str) -> str:
    value: Any = json.loads(line)
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ValueError('must be a string or an object with a string "prompt"')
    return prompt


@dataclass(frozen=True)
class Job:
    """How the prompts are run: prompts side by side, and whether equal texts are dropped."""

    batch_size: int
    unique: bool


def run_prompts(
    model: GPT, tokenizer: Tokenizer, prompts: list[str], options: GenerationConfig, job: Job
) -> Iterator[dict[str, Any]]:
    """Yield the texts of all prompts in order, showing progress on stderr."""
    lengths = [len(tokenizer.encode(prompt)) for prompt in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: lengths[i])
    done: dict[int, list[Text]] = {}
    next_up = 0
    with terminal.Progress(len(prompts), 0, "prompt") as bar:
        for start in range(0, len(by_length), job.batch_size):
            numbers = by_length[start : start + job.batch_size]
            batch = [prompts[i] for i in numbers]
            for number, texts in zip(
                numbers, _texts(model, tokenizer, batch, options, job), strict=True
            ):
                done[number] = texts
            bar.advance(len(numbers))
            while next_up in done:
                for index, text in enumerate(done.pop(next_up)):
                    completion = text.completion
                    yield as_json(prompts[next_up], index, completion, text.score, options.seed)
                next_up += 1


def _texts(
    model: GPT, tokenizer: Tokenizer, prompts: list[str], options: GenerationConfig, job: Job
) -> list[list[Text]]:
    """The texts of a few prompts; with `unique`, equal ones are replaced while new ones come."""
    kept: list[dict[str, Text]] = [{} for _ in prompts]
    wanted = options.num_return_sequences
    for round_ in range(MOST_ROUNDS if job.unique and options.samples else 1):
        request = request_for(model, tokenizer, prompts, _round(options, round_))
        found = decode_texts(model, tokenizer, prompts, request)
        if not job.unique:
            return found
        for texts, seen in zip(found, kept, strict=True):
            for text in texts:
                if len(seen) < wanted:
                    seen.setdefault(text.completion.text, text)
        if all(len(seen) == wanted for seen in kept):
            break
    return [[*seen.values()] for seen in kept]


def _round(options: GenerationConfig, round_: int) -> GenerationConfig:
    """The same options with other chance, the same at every run."""
    if options.noise == "counter":
        first = options.first_sample + round_ * options.num_return_sequences
        return replace(options, first_sample=first)
    return replace(options, seed=((options.seed or 0) + round_) % 2**63)
