"""Read one prompt, or run a file of prompts: one JSON object for each text, as soon as it is done.

The file is plain text with one prompt a line, JSONL with one string or object a line, or an array
of them. An object holds the prompt as "prompt"; its other fields go into the result. Only prompts
of the same length in tokens share a batch, and each line draws with a seed of its own. So no text
depends on the other prompts in the file. This file does not know how tokens are chosen.
"""

import json
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from nanogpt2 import terminal
from nanogpt2.cli.decode import Text, decode_texts
from nanogpt2.cli.output import Output, Prompt
from nanogpt2.cli.text import as_json, as_line
from nanogpt2.config import GenerationConfig, SampleConfig, refuse_document
from nanogpt2.filesystem import read_input
from nanogpt2.generation.noise import seed_of
from nanogpt2.generation.text import request_for
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
# a line of these is no prompt
OTHER_SUFFIXES = (".csv", ".tsv", ".parquet", ".gz", ".zst")
# rounds in which --unique tries to replace duplicates
MAX_ROUNDS = 10
# blank lines named in a note
MOST_NAMED = 8


def read_prompt(prompt: str, file: str | None) -> str:
    """Return one prompt: the text of `file`, or of standard input for -, or `prompt` itself.

    Raises ValueError for text that is not UTF-8, OSError for a file that cannot be read.
    """
    if file is None and prompt != "-":
        return prompt
    data = read_input("-" if file is None else file)
    refuse_document(data, file)
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte, where = data[error.start], file or "standard input"
        raise ValueError(
            f"{where!r} is not UTF-8: byte 0x{byte:02x} at offset {error.start}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def read_prompts(
    source: str | None, skip_bad: bool, template: str = "{}"
) -> tuple[dict[int, Prompt], str]:
    """Return the prompts of a file by number, and a note on blank prompts, which are left out.

    A prompt's number is its line's, or its item's in an array. source: a path, - for standard
    input, or None for no prompts; skip_bad: skip malformed lines, with a note for each; template: a
    format string around each prompt.
    Raises ValueError that names the first malformed line otherwise, OSError for a file that cannot
    be read.
    """
    if source is None:
        return {}, ""
    if source.lower().endswith(OTHER_SUFFIXES):
        known = ", ".join(JSON_SUFFIXES)
        raise ValueError(f"{source!r} must hold a prompt a line, as text or JSON ({known})")
    data = read_input(source).removeprefix(b"\xef\xbb\xbf")
    refuse_document(data, None if source == "-" else source)
    has_suffix = source.lower().endswith(JSON_SUFFIXES)
    lines = (_array(data) if has_suffix or source == "-" else None) or data.splitlines()
    is_jsonl = _looks_like_json(lines) if source == "-" else has_suffix
    prompts, blank = {}, []
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8")
            if is_jsonl and not text.strip():
                continue
            prompt = _prompt(text) if is_jsonl else Prompt(text, {})
        except (ValueError, RecursionError) as error:
            _skip_or_raise(f"{source!r} line {number}: {error}", skip_bad)
            continue
        if prompt.text.strip():
            prompts[number] = prompt._replace(text=template.format(prompt.text))
        else:
            blank.append(number)
    if not prompts:
        raise ValueError(f"{source!r} holds no prompt")
    return prompts, _blank_note(blank, len(prompts))


def _blank_note(blank: list[int], others: int) -> str:
    if not blank:
        return ""
    places = ", ".join(map(str, blank[:MOST_NAMED])) + ", ..." * (len(blank) > MOST_NAMED)
    return (
        f"note: {len(blank)} of {len(blank) + others} prompts are blank and were left out: "
        f"line{'s' * (len(blank) > 1)} {places}"
    )


def _array(data: bytes) -> list[bytes] | None:
    """Return the items of a JSON array, a line each; None for anything else."""
    try:
        value = json.loads(data) if data.lstrip().startswith(b"[") else None
        return [json.dumps(item).encode() for item in value] if isinstance(value, list) else None
    except (ValueError, RecursionError):
        return None


def _looks_like_json(lines: list[bytes]) -> bool:
    """Return True if the first line that is not blank is a JSON prompt."""
    try:
        _prompt(next(line for line in lines if line.strip()).decode("utf-8"))
    except (StopIteration, ValueError, RecursionError):
        return False
    return True


def _prompt(line: str) -> Prompt:
    value: Any = json.loads(line)
    prompt = value.pop("prompt", None) if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ValueError('must be a string or an object with a string "prompt"')
    fields = value if isinstance(value, dict) else {}
    try:
        json.dumps([prompt, fields], ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise ValueError(f"{half} is half a surrogate pair, which is no text") from None
    return Prompt(prompt, fields)


def _skip_or_raise(message: str, skip_bad: bool) -> None:
    if not skip_bad:
        raise ValueError(f"{message} (--skip_bad skips it)") from None
    terminal.note(f"skipped {message}")


@dataclass(frozen=True)
class Job:
    """A file of prompts and how to run it.

    batch_size: prompts in a batch; unique: drop duplicate texts; skip_bad: skip prompts that cannot
    be run; in_order: hold back texts until those of all earlier lines are done; literal: read
    <|endoftext|> as characters; done: lines to leave out.
    """

    source: str
    batch_size: int = 8
    unique: bool = False
    skip_bad: bool = False
    in_order: bool = False
    literal: bool = False
    done: Collection[int] = field(default_factory=frozenset)


def show_prompts(
    config: SampleConfig,
    model: GPT,
    tokenizer: Tokenizer,
    prompts: dict[int, Prompt],
    output: Output,
    about_blanks: str,
) -> None:
    """Write the texts of all prompts that are not done; errors as for run_prompts.

    about_blanks: a note, said once the prompts are known to run.
    """
    job = Job(
        source=config.prompts or "",
        batch_size=config.batch_size,
        unique=config.unique,
        skip_bad=config.skip_bad,
        in_order=config.in_order,
        literal=config.literal_prompt,
        done=output.done,
    )
    records = run_prompts(model, tokenizer, prompts, config.generation, job)
    terminal.note(about_blanks)
    with output:
        for record in records:
            output.write(as_line(record))


def run_prompts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: dict[int, Prompt],
    options: GenerationConfig,
    job: Job,
) -> Iterator[dict[str, Any]]:
    """Return the texts of all prompts as they are done, showing progress on stderr.

    Raises ValueError for options or prompts that cannot be run, here or before the first text.
    After the first text, the same failure is a FloatingPointError.
    """
    left = {number: prompt for number, prompt in prompts.items() if number not in job.done}
    batches = _batches(model, tokenizer, left, options, job) if left else []
    return _run(model, tokenizer, left, batches, options, job)


def _run(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: dict[int, Prompt],
    batches: list[list[int]],
    options: GenerationConfig,
    job: Job,
) -> Iterator[dict[str, Any]]:
    # batches are grouped by length, so with in_order texts wait in `done` for their turn
    numbers = [number for batch in batches for number in batch]
    queue = deque(sorted(numbers) if job.in_order else numbers)
    done: dict[int, list[Text]] = {}
    asked, found, before = len(queue) * options.num_return_sequences, 0, len(job.done)
    lost: set[str] = set()
    with terminal.Progress(before + len(queue), before, "prompt") as bar:
        for batch in batches:
            try:
                done |= _texts(model, tokenizer, prompts, batch, options, job)
            except ValueError as error:
                if not found:
                    raise
                raise FloatingPointError(str(error)) from error
            bar.advance(len(batch))
            while queue and queue[0] in done:
                number = queue.popleft()
                prompt, seed = prompts[number], _seed(options, number)
                for index, text in enumerate(done.pop(number)):
                    record = as_json(prompt.text, index, text.completion, text.score, seed)
                    record = {"line": number} | record
                    lost |= record.keys() & prompt.fields.keys()
                    yield prompt.fields | record
                    found += 1
    if lost:
        names = ", ".join(sorted(lost))
        terminal.note(f"note: the result has its own {names}: the file's fields were left out")
    if found < asked:
        terminal.note(f"note: --unique left {found} of {asked} texts: no more new texts came")


def _batches(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: dict[int, Prompt],
    options: GenerationConfig,
    job: Job,
) -> list[list[int]]:
    """Group line numbers into batches of prompts with equal length in tokens.

    Raises ValueError for a length that these options cannot run; with job.skip_bad, skips its lines
    instead.
    """
    by_length: dict[int, list[int]] = {}
    for number, prompt in prompts.items():
        length = len(tokenizer.encode(prompt.text, allow_special=not job.literal))
        by_length.setdefault(length, []).append(number)
    wrong: dict[int, ValueError] = {}
    for numbers in by_length.values():
        try:
            batch = [prompts[number].text for number in numbers[: job.batch_size]]
            request_for(model, tokenizer, batch, options, job.literal)
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


def _seed(options: GenerationConfig, number: int) -> int:
    """Return the seed with which the prompt of a line gives the same texts alone."""
    return seed_of(options.seed or 0, number)


def _texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: dict[int, Prompt],
    batch: list[int],
    options: GenerationConfig,
    job: Job,
) -> dict[int, list[Text]]:
    """Return the texts of a batch; with job.unique, sample more rounds to replace duplicates."""
    texts = [prompts[number].text for number in batch]
    kept: dict[int, dict[str, Text]] = {number: {} for number in batch}
    wanted = options.num_return_sequences
    for round_ in range(MAX_ROUNDS if job.unique and options.samples else 1):
        seeds = [_seed(options, number) for number in batch]
        if options.noise == "counter":
            first = options.first_sample + round_ * wanted
            request = request_for(
                model, tokenizer, texts, replace(options, first_sample=first), job.literal, seeds
            )
        else:
            seeds = [(seed + round_) % 2**63 for seed in seeds]
            request = request_for(model, tokenizer, texts, options, job.literal, seeds)
        found = dict(zip(batch, decode_texts(model, tokenizer, request), strict=True))
        if not job.unique:
            return found
        for number, seen in kept.items():
            for text in found[number]:
                if len(seen) < wanted:
                    seen.setdefault(text.completion.text, text)
        if all(len(seen) == wanted for seen in kept.values()):
            break
    return {number: [*seen.values()] for number, seen in kept.items()}
