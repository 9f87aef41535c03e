"""Read one prompt, or run a file of prompts: one JSON object for each text, in the file's order.

The file is plain text with one prompt a line, or JSONL with one string or object a line. The object
holds the prompt as "prompt" ("text" for a classifier). Only prompts of the same length in tokens
share a batch, so that no text depends on the other prompts in the file. This file does not know how
tokens are chosen.
"""

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nanogpt2 import terminal
from nanogpt2.cli.decode import Text, decode_texts, request_for
from nanogpt2.cli.text import as_json
from nanogpt2.config import GenerationConfig
from nanogpt2.filesystem import read_input
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer

JSON_SUFFIXES = (".jsonl", ".json")
# rounds in which --unique tries to replace duplicates
MAX_ROUNDS = 10


def read_prompt(prompt: str, file: str | None) -> str:
    """Return one prompt: the text of `file`, or of standard input for -, or `prompt` itself.

    Raises ValueError for text that is not UTF-8, OSError for a file that cannot be read.
    """
    if file is None and prompt != "-":
        return prompt
    data = read_input("-" if file is None else file)
    try:
        return data.decode("utf-8").removeprefix("\ufeff").removesuffix("\n")
    except UnicodeDecodeError as error:
        byte, where = data[error.start], file or "standard input"
        raise ValueError(
            f"{where!r} is not UTF-8: byte 0x{byte:02x} at offset {error.start}"
        ) from None


def read_prompts(source: str, skip_bad: bool, key: str = "prompt") -> dict[int, str]:
    """Return the prompts of a file, or of standard input if `source` is -, by line number.

    key: the prompt's key in a JSON object; skip_bad: skip malformed lines, with a note for each.
    Raises ValueError that names the first malformed line otherwise, OSError for a file that cannot
    be read.
    """
    data = read_input(source)
    lines = data.removeprefix(b"\xef\xbb\xbf").splitlines()
    is_jsonl = (
        _looks_like_json(lines, key) if source == "-" else source.lower().endswith(JSON_SUFFIXES)
    )
    prompts = {}
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8")
            prompt = _prompt(text, key) if is_jsonl and text.strip() else text
        except (ValueError, RecursionError) as error:
            _skip_or_raise(f"{source!r} line {number}: {error}", skip_bad)
            continue
        if prompt.strip():
            prompts[number] = prompt
    if not prompts:
        raise ValueError(f"{source!r} holds no prompt")
    return prompts


def _looks_like_json(lines: list[bytes], key: str) -> bool:
    """Return True if the first line that is not blank is a JSON prompt."""
    try:
        _prompt(next(line for line in lines if line.strip()).decode("utf-8"), key)
    except (StopIteration, ValueError, RecursionError):
        return False
    return True


def _prompt(line: str, key: str) -> str:
    value: Any = json.loads(line)
    prompt = value.get(key) if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ValueError(f'must be a string or an object with a string "{key}"')
    return prompt


def _skip_or_raise(message: str, skip_bad: bool) -> None:
    if not skip_bad:
        raise ValueError(f"{message} (--skip_bad skips it)") from None
    terminal.note(f"skipped {message}")


@dataclass(frozen=True)
class Job:
    """A file of prompts and how to run it.

    batch_size: prompts in a batch; unique: drop duplicate texts; skip_bad: skip prompts that cannot
    be run.
    """

    source: str
    batch_size: int
    unique: bool
    skip_bad: bool


def run_prompts(
    model: GPT, tokenizer: Tokenizer, prompts: dict[int, str], options: GenerationConfig, job: Job
) -> Iterator[dict[str, Any]]:
    """Yield the texts of all prompts in order, showing progress on stderr.

    Before the first text, raises ValueError for options or prompts that cannot be run. After the
    first text, the same failure is a FloatingPointError.
    """
    batches = _batches(model, tokenizer, prompts, options, job)
    # batches are grouped by length, so texts wait in `done` for their turn
    numbers = deque(sorted(number for batch in batches for number in batch))
    done: dict[int, list[Text]] = {}
    asked, found = len(numbers) * options.num_return_sequences, 0
    with terminal.Progress(len(numbers), 0, "prompt") as bar:
        for batch in batches:
            texts = [prompts[number] for number in batch]
            try:
                done |= zip(batch, _texts(model, tokenizer, texts, options, job), strict=True)
            except ValueError as error:
                if not found:
                    raise
                raise FloatingPointError(str(error)) from error
            bar.advance(len(batch))
            while numbers and numbers[0] in done:
                number = numbers.popleft()
                for index, text in enumerate(done.pop(number)):
                    completion = text.completion
                    yield as_json(prompts[number], index, completion, text.score, options.seed)
                    found += 1
    if found < asked:
        terminal.note(f"note: --unique left {found} of {asked} texts: no more new texts came")


def _batches(
    model: GPT, tokenizer: Tokenizer, prompts: dict[int, str], options: GenerationConfig, job: Job
) -> list[list[int]]:
    """Group line numbers into batches of prompts with equal length in tokens.

    Raises ValueError for a length that these options cannot run; with job.skip_bad, skips its lines
    instead.
    """
    by_length: dict[int, list[int]] = {}
    for number, prompt in prompts.items():
        by_length.setdefault(len(tokenizer.encode(prompt)), []).append(number)
    wrong: dict[int, ValueError] = {}
    for numbers in by_length.values():
        try:
            batch = [prompts[number] for number in numbers[: job.batch_size]]
            request_for(model, tokenizer, batch, options)
        except ValueError as error:
            wrong |= dict.fromkeys(numbers, error)
    if len(wrong) == len(prompts):
        # every prompt fails, so the options are at fault
        raise wrong[min(wrong)]
    for number in sorted(wrong):
        _skip_or_raise(f"prompts {job.source!r} line {number}: {wrong[number]}", job.skip_bad)
    long = sum(len(by_length[n]) for n in by_length if n > model.config.block_size)
    if long:
        terminal.note(
            f"note: {long} of the prompts are longer than the context of "
            f"{model.config.block_size} tokens: their oldest ones are dropped"
        )
    return [
        numbers[start : start + job.batch_size]
        for _, numbers in sorted(by_length.items())
        if numbers[0] not in wrong
        for start in range(0, len(numbers), job.batch_size)
    ]


def _texts(
    model: GPT, tokenizer: Tokenizer, prompts: list[str], options: GenerationConfig, job: Job
) -> list[list[Text]]:
    """Return the texts of a batch; with job.unique, sample more rounds to replace duplicates."""
    kept: list[dict[str, Text]] = [{} for _ in prompts]
    wanted = options.num_return_sequences
    for round_ in range(MAX_ROUNDS if job.unique and options.samples else 1):
        request = request_for(model, tokenizer, prompts, _round(options, round_))
        found = decode_texts(model, tokenizer, request)
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
    """Return the options with the seed or sample numbers of a round, the same in every run."""
    if options.noise == "counter":
        first = options.first_sample + round_ * options.num_return_sequences
        return replace(options, first_sample=first)
    return replace(options, seed=((options.seed or 0) + round_) % 2**63)
