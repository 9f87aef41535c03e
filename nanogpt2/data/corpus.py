"""A source and a task -> what is trained on and what is held out.

    lm        texts, each followed by <|endoftext|>; of records, the column `text`
    chat      records of a conversation: see chat.py
    classify  records of a text and a label; of text files, the label is their folder's name

This file does not know the model, but for its vocabulary's size.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanogpt2.data.examples import NOT_COUNTED, Examples, chat_examples, labelled_examples
from nanogpt2.data.shards import Ids
from nanogpt2.data.streams import SPLIT_SEED, Columns, Streams
from nanogpt2.tokenizer import Tokenizer

CACHE = Path("~/.cache/nanogpt2/tokens")
COLUMNS = Columns()
TASKS = ("lm", "chat", "classify")
SHORTEST = 90  # tokens: a tenth validates, in blocks of 8 at least
VALIDATION_SHARE = 0.1
VALIDATION_MOST = 65_536  # tokens; more would only slow the evaluations down


@dataclass(frozen=True)
class Corpus:
    """What is trained on, what is held out, and where they came from."""

    train: Ids | Examples
    validation: Ids | Examples
    sha256: str  # of the files, the task and the columns
    labels: tuple[str, ...] = ()  # classification: the name of each class's number

    @property
    def max_block_sizes(self) -> tuple[int, int]:
        """The longest sequences, in tokens, that the splits can fill: (training, validation)."""
        if isinstance(self.train, Examples):
            return self.train.longest, self.train.longest
        return len(self.train) - 1, len(self.validation) - 1

    def prompt(self, tokenizer: Tokenizer) -> list[int]:
        """What a sample may go on from: the first words that are held out; a chat's first turn."""
        if isinstance(self.validation, Examples):
            inputs, targets = self.validation.example(0, self.validation.longest)
            return inputs[: int((targets != NOT_COUNTED).argmax()) + 1].tolist()
        words = tokenizer.decode(self.validation[:64].tolist()).split()[1:7]
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
    cache: Path = CACHE,
) -> Corpus:
    """Tokenise a source, once for each content and tokenizer, and hold some of it out.

    `validation` is a second source, to be held out instead; of texts it must fill `block_size`.
    `vocab_size` is the model's, `labels` are those of a classifier that goes on learning. Raises
    ValueError or OSError for a source that cannot be used.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
    streams = Streams(tokenizer, task, columns, vocab_size or tokenizer.vocab_size, cache)
    stream, digest = streams.read(source)
    if validation is not None:
        second, second_digest = streams.read(validation)
        digest = hashlib.sha256(digest + second_digest).digest()
    if task == "lm":
        if validation is None:
            return Corpus(*_split_ids(stream, source), digest.hex())
        if len(second) < (block_size or 1) + 1:
            raise ValueError(
                f"{validation!r} is too short: {len(second)} tokens to validate on, block_size "
                f"{block_size or 1} needs {(block_size or 1) + 1}"
            )
        return Corpus(stream, second, digest.hex())
    train = _examples(stream, source, task, labels)
    if validation is None:
        return Corpus(*_split_examples(train, source), digest.hex(), train.labels)
    held_out = _examples(second, validation, task, train.labels)
    return Corpus(train, held_out, digest.hex(), train.labels)


def _split_ids(ids: Ids, source: str) -> tuple[Ids, Ids]:
    if len(ids) < SHORTEST:
        raise ValueError(
            f"{source!r} is too short: {len(ids)} tokens, at least {SHORTEST} are needed"
        )
    held_out = min(int(len(ids) * VALIDATION_SHARE), VALIDATION_MOST)
    return ids[: len(ids) - held_out], ids[len(ids) - held_out :]


def _examples(
    stream: Ids, source: str, task: str, labels: tuple[str, ...] | None = None
) -> Examples:
    if task == "chat":
        return chat_examples(stream)
    try:
        examples = labelled_examples(stream, labels or ())
    except ValueError as error:
        raise ValueError(f"{source!r} {error}") from None
    if len(examples.labels) < 2:
        raise ValueError(f"{source!r} has one label alone, {examples.labels[0]!r}; two are needed")
    return examples


def _split_examples(examples: Examples, source: str) -> tuple[Examples, Examples]:
    """Draw examples to hold out, one at least, but never the last that is left of a label."""
    drawn = np.random.default_rng(SPLIT_SEED).permutation(len(examples))
    classes = np.zeros(len(drawn), np.int64) if examples.classes is None else examples.classes
    kept = np.unique(classes[drawn], return_index=True)[1]
    free = np.delete(drawn, kept)
    if not len(free):
        raise ValueError(f"{source!r} has too few records to hold one out: give --validation")
    enough = np.searchsorted(np.cumsum(examples.lengths[free]), VALIDATION_MOST)
    held_out = free[: max(1, min(int(len(drawn) * VALIDATION_SHARE), enough))]
    rest = np.setdiff1d(drawn, held_out)
    return examples.choose(rest), examples.choose(np.sort(held_out))
