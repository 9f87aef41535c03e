"""Several corpora -> one: each sequence of a run comes from one of them, by their weights.

The sequences are dealt out evenly, without chance: of the first n sequences of a run, a corpus has
n times its share, to within one for each corpus before it in the list. So every batch has the
mixture, a sequence's number alone decides its corpus and its place there, and a resumed run seeks
to its place at once. Each corpus has epochs of its own. This file does not know the model.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from nanogpt2.data.corpus import Corpus, load_corpus
from nanogpt2.data.examples import Examples
from nanogpt2.data.reading import Reading
from nanogpt2.data.shards import Ids
from nanogpt2.data.token_files import Joined
from nanogpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Shares:
    """Deals out the sequences of a run to the corpora, by weight."""

    weights: tuple[Fraction, ...]

    def counts(self, n: int) -> list[int]:
        """Return how many of the first n sequences each corpus has."""
        found, weight = [], sum(self.weights, Fraction())
        for own in self.weights:
            # of what the corpora before leave: n share + 1/2, rounded down
            share = own / weight if weight else Fraction()
            found.append((2 * n * share.numerator + share.denominator) // (2 * share.denominator))
            n, weight = n - found[-1], weight - own
        return found

    def pick(self, n: int) -> tuple[int, int]:
        """Return the corpus of sequence n of the run, and its number in that corpus's own run."""
        before, after = self.counts(n), self.counts(n + 1)
        corpus = next(i for i, count in enumerate(before) if after[i] > count)
        return corpus, before[corpus]


@dataclass(frozen=True)
class Mixed:
    """The training splits, or the validation splits, of several corpora."""

    names: tuple[str, ...]
    shares: Shares
    parts: tuple[Ids | Joined | Examples, ...]


@dataclass(frozen=True)
class MixedCorpus:
    """Several corpora in the place of one."""

    corpora: Mapping[str, Corpus]  # by name
    shares: Shares
    has_validation: bool  # of its own: one source for all
    labels: tuple[str, ...] = ()

    @property
    def train(self) -> Mixed:
        """The training splits."""
        parts = tuple(corpus.train for corpus in self.corpora.values())
        return Mixed(tuple(self.corpora), self.shares, parts)

    @property
    def validation(self) -> Mixed | Ids | Joined | Examples:
        """The parts held out, or the source given to validate on."""
        parts = tuple(corpus.validation for corpus in self.corpora.values())
        return parts[0] if self.has_validation else Mixed(tuple(self.corpora), self.shares, parts)

    @property
    def sha256(self) -> str:
        """The SHA-256 of the corpora's own ones and of the shares."""
        total = sum(self.shares.weights, Fraction())
        shares = [str(weight / total) for weight in self.shares.weights]
        digests = [corpus.sha256 for corpus in self.corpora.values()]
        return hashlib.sha256(repr([*zip(shares, digests, strict=True)]).encode()).hexdigest()

    @property
    def readings(self) -> tuple[Reading, ...]:
        """What was read from each source."""
        return tuple(one for corpus in self.corpora.values() for one in corpus.readings)

    @property
    def max_block_sizes(self) -> tuple[int, int]:
        """The longest sequences, in tokens, that every corpus can fill: (training, validation)."""
        found = [corpus.max_block_sizes for corpus in self.corpora.values()]
        if isinstance(self.train.parts[0], Examples):
            return max(train for train, _ in found), max(held for _, held in found)
        return min(train for train, _ in found), min(held for _, held in found)

    def describe(self, block_size: int) -> str:
        """Count the examples longer than `block_size`; return what was read, in lines."""
        return "\n".join(corpus.describe(block_size) for corpus in self.corpora.values())

    def prompt(self, tokenizer: Tokenizer) -> list[int]:
        """Return a prompt for samples, from the first corpus."""
        return next(iter(self.corpora.values())).prompt(tokenizer)


def load_mix(
    weights: Mapping[str, Fraction],
    tokenizer: Tokenizer,
    task: str = "lm",
    *,
    validation: str | None = None,
    **how: Any,
) -> MixedCorpus:
    """Load a corpus for each source; the arguments and errors are those of `load_corpus`.

    Raises ValueError for task classify: the labels of several sources are no common list.
    """
    if task == "classify":
        raise ValueError("several sources cannot be classified: join their records in one file")
    corpora: dict[str, Corpus] = {}
    for source in weights:
        corpus = load_corpus(source, tokenizer, task, validation=validation, **how)
        # one validation source for all is read, and told of, once
        is_told = bool(corpora) and validation is not None
        corpora[source] = replace(corpus, readings=corpus.readings[: 1 if is_told else None])
    return MixedCorpus(corpora, Shares(tuple(weights.values())), validation is not None)
