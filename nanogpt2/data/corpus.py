"""A source and a task -> a training split and a validation split.

    lm        texts, each followed by <|endoftext|>; of records, the column `text`
    chat      one conversation a record: see chat.py
    classify  records of a text and a label; of text files, the label is their folder's name

Of the model, this file knows only the size of the vocabulary.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanogpt2 import threads
from nanogpt2.config import IGNORE_INDEX, data_kind
from nanogpt2.data.content import SPLIT_SEED, Columns
from nanogpt2.data.examples import Examples, chat_examples, labelled_examples
from nanogpt2.data.reading import Reading
from nanogpt2.data.shards import Ids
from nanogpt2.data.streams import VALIDATION, Streams
from nanogpt2.data.token_files import Joined
from nanogpt2.tokenizer import Tokenizer

CACHE = Path("~/.cache/nanogpt2/tokens")
COLUMNS = Columns()
TASKS = ("lm", "chat", "classify")
MIN_TOKENS = 90  # a tenth validates, and that must fill a sequence of 8 tokens
VALIDATION_FRACTION = 0.1
MAX_VALIDATION_TOKENS = 65_536  # more would only slow the evaluations down
MANY_LABELS = 50  # more may be the wrong column


@dataclass(frozen=True)
class Corpus:
    """The training split, the validation split and their origin."""

    train: Ids | Joined | Examples
    validation: Ids | Joined | Examples
    sha256: str  # of the files, the task and the columns
    labels: tuple[str, ...] = ()  # classification: the name of each class's number
    # of the source, and of the validation source if there is one
    readings: tuple[Reading, ...] = ()

    def describe(self, block_size: int) -> str:
        """Count the examples longer than `block_size`; return what was read, in lines."""
        parts = (self.train, self.validation)
        lines = []
        for n, reading in enumerate(self.readings):
            lines.append(reading.describe())
            own = parts if len(self.readings) == 1 else parts[n : n + 1]
            examples = [part for part in own if isinstance(part, Examples)]
            reading.cut = sum(part.too_long(block_size) for part in examples)
            if reading.cut:
                what, kept = ("texts", "start") if self.labels else ("questions", "end")
                lines.append(
                    f"{reading.cut:,} of {reading.records:,} {what} are cut to their {kept}: "
                    f"longer than block_size {block_size} (the longest of all: "
                    f"{max(part.longest for part in examples):,})"
                )
        if len(self.labels) > MANY_LABELS:
            lines.append(f"note: {len(self.labels)} distinct labels: is --label_column right?")
        return "\n".join(lines)

    @property
    def max_block_sizes(self) -> tuple[int, int]:
        """The longest sequences, in tokens, that the splits can fill: (training, validation)."""
        if isinstance(self.train, Examples):
            return self.train.longest, self.train.longest
        return len(self.train) - 1, len(self.validation) - 1

    def prompt(self, tokenizer: Tokenizer) -> list[int]:
        """Return a prompt for samples: the first words held out, or the first turn of a chat."""
        if isinstance(self.validation, Examples):
            inputs, targets = self.validation.example(0, self.validation.longest)
            return inputs[: int((targets != IGNORE_INDEX).argmax()) + 1].tolist()
        words = tokenizer.decode(np.asarray(self.validation[:64]).tolist()).split()[1:7]
        return tokenizer.encode(" ".join(words)) or [tokenizer.end_of_text]


def load_corpus(
    source: str,
    tokenizer: Tokenizer,
    task: str = "lm",
    *,
    validation: str | None = None,
    columns: Columns = COLUMNS,
    vocab_size: int | None = None,
    labels: tuple[str, ...] | None = None,
    block_size: int | None = None,
    encoding: str = "utf-8",
    skip_bad: bool = False,
    out: str | None = None,
    cache: Path = CACHE,
    processes: int | None = None,
) -> Corpus:
    """Tokenise a source, once for each content and tokenizer, and hold some of it out.

    validation: a second source, to hold out instead; for task lm it must fill `block_size`.
    vocab_size: the model's; the tokenizer's by default.
    labels: the labels of a classifier that is trained further.
    encoding: of files without a byte-order mark.
    skip_bad: skip and count the records that cannot be used.
    out: the folder that the run writes, which is no data.
    processes: that may tokenise; as many as the machine allows by default.
    Raises ValueError or OSError for a source that cannot be used.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
    size = vocab_size or tokenizer.vocab_size
    processes = processes or threads.allowed()
    streams = Streams(tokenizer, task, columns, size, cache, encoding, skip_bad, out, processes)
    stream, digest, reading = streams.read(source)
    readings, sha256, second = [reading], digest.hex(), None
    if streams.has_split(source):
        if validation is not None:
            reading.skip("its validation files: --validation names others", source)
        validation = validation or source
    if validation is not None:
        second, second_digest, reading = streams.read(validation, VALIDATION)
        if validation == source:
            _tell_once(reading, readings[0])
        readings.append(reading)
        sha256 = hashlib.sha256(digest + second_digest).hexdigest()
    parts: tuple[Ids | Joined, Ids | Joined] | tuple[Examples, Examples]
    if task == "lm":
        parts = _texts(stream, second, source, validation, block_size or 1)
    else:
        parts = _records(stream, second, source, validation, task, labels)
    train, held_out = parts
    tokens = [part.tokens if isinstance(part, Examples) else len(part) for part in parts]
    for reading, count in zip(readings, tokens if validation else [sum(tokens)], strict=True):
        reading.tokens = count
    return Corpus(train, held_out, sha256, getattr(train, "labels", ()), tuple(readings))


def _tell_once(reading: Reading, known: Reading) -> None:
    """Drop what `known` tells of the same source: which of its files are no data."""
    found = reading.skipped.items()
    reading.skipped = {reason: one for reason, one in found if known.skipped.get(reason) != one}
    reading.source, reading.advice = f"{reading.source} (validation)", ""


def _texts(
    ids: Ids | Joined,
    second: Ids | Joined | None,
    source: str,
    validation: str | None,
    block_size: int,
) -> tuple[Ids | Joined, Ids | Joined]:
    if second is None:
        return _split_ids(ids, source)
    if len(second) < block_size + 1:
        raise ValueError(
            f"{validation!r} is too short: {len(second)} tokens to validate on, block_size "
            f"{block_size} needs {block_size + 1}"
        )
    return ids, second


def _records(
    stream: Ids | Joined,
    second: Ids | Joined | None,
    source: str,
    validation: str | None,
    task: str,
    labels: tuple[str, ...] | None,
) -> tuple[Examples, Examples]:
    train = _examples(stream, source, task, labels)
    if second is None:
        return _split_examples(train, source)
    return train, _examples(second, validation or source, task, train.labels)


def _split_ids(ids: Ids | Joined, source: str) -> tuple[Ids | Joined, Ids | Joined]:
    if len(ids) < MIN_TOKENS:
        raise ValueError(
            f"{source!r} is too short: {len(ids)} tokens, at least {MIN_TOKENS} are needed"
        )
    held_out = min(int(len(ids) * VALIDATION_FRACTION), MAX_VALIDATION_TOKENS)
    return ids[: len(ids) - held_out], ids[len(ids) - held_out :]


def _examples(
    stream: Ids | Joined, source: str, task: str, labels: tuple[str, ...] | None = None
) -> Examples:
    if task == "chat":
        return chat_examples(np.asarray(stream))
    try:
        examples = labelled_examples(np.asarray(stream), labels or ())
    except ValueError as error:
        raise ValueError(f"{source!r} {error}") from None
    if len(examples.labels) < 2:
        (label,) = examples.labels
        is_text = Path(source).is_file() and data_kind(source) in (".txt", None)
        more = " (a text's label is its folder's name; --task lm learns texts)" if is_text else ""
        raise ValueError(f"{source!r} has one label alone, {label!r}; two are needed{more}")
    return examples


def _split_examples(examples: Examples, source: str) -> tuple[Examples, Examples]:
    """Draw at least one example to hold out, but never the only one left of a label."""
    drawn = np.random.default_rng(SPLIT_SEED).permutation(len(examples))
    classes = np.zeros(len(drawn), np.int64) if examples.classes is None else examples.classes
    kept = np.unique(classes[drawn], return_index=True)[1]
    free = np.delete(drawn, kept)
    if not len(free):
        raise ValueError(f"{source!r} has too few records to hold one out: give --validation")
    enough = np.searchsorted(np.cumsum(examples.lengths[free]), MAX_VALIDATION_TOKENS)
    held_out = free[: max(1, min(int(len(drawn) * VALIDATION_FRACTION), enough))]
    rest = np.setdiff1d(drawn, held_out)
    return examples.select(rest), examples.select(np.sort(held_out))
