"""Strided perplexity of a text, for a model that sees only block_size tokens.

The text's tokens are x_0 .. x_{N-1}. Windows of at most block_size inputs start at 0, stride,
2 stride, ...; each predicts the token after every input. A prediction counts only if no earlier
window made it. So every token but x_0 is scored exactly once, after

    x_{k stride} .. x_{i-1},    k = max(0, ceil((i - block_size) / stride)):

that is, all of its past for i <= block_size, else block_size - stride + 1 to block_size tokens. A
stride of block_size is the cheapest (each input is read once) and the most pessimistic. A stride of
1 gives every token the full context, at block_size times the cost. A stride above block_size would
skip tokens, so it is an error. No <|endoftext|> is put before the text.

    nats_per_token     mean of -log p(x_i | context), i = 1 .. N-1
    perplexity         exp(nats_per_token); depends on the tokenizer
    bits_per_byte      the summed nats / ln 2 / UTF-8 bytes of x_1 .. x_{N-1}; comparable between
                       tokenizers; <|endoftext|> between texts counts as no bytes
    word_perplexity    exp(the summed nats / words in the whole text, split at white space), as in
                       EleutherAI's evaluation harness

This file does not know where the text came from.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanogpt2.config import IGNORE_INDEX
from nanogpt2.metrics import finite, perplexity
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer


def ignore_progress(count: int) -> None:
    """Do nothing: the default progress callback."""


@dataclass(frozen=True)
class Perplexity:
    """Results on a text, defined in the file's docstring."""

    tokens: int  # scored
    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    word_perplexity: float


@torch.no_grad()
def measure_perplexity(
    model: GPT,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    *,
    block_size: int,
    stride: int,
    batch_size: int = 8,
    advance: Callable[[int], object] = ignore_progress,
) -> Perplexity:
    """Score a text's ids; call `advance` with the number of tokens in each finished batch.

    Raises ValueError for fewer than two tokens and for a stride that skips tokens,
    FloatingPointError for a loss that is not finite.
    """
    if len(ids) < 2:
        raise ValueError(f"must hold 2 tokens or more, not {len(ids)}")
    device, total = model.wte.weight.device, 0.0
    for inputs, targets in windows(ids, block_size, stride, batch_size):
        count = int((targets != IGNORE_INDEX).sum())
        total += finite(model(inputs.to(device), targets.to(device)).item()) * count
        advance(count)
    count = len(ids) - 1
    written = [i for i in ids[1:] if not tokenizer.ends(i)]
    scored_bytes = max(1, len(tokenizer.decode_bytes(written)))
    words = len(tokenizer.decode([*ids[:1], *written]).split())
    return Perplexity(
        tokens=count,
        nats_per_token=total / count,
        perplexity=perplexity(total / count),
        bits_per_byte=total / math.log(2) / scored_bytes,
        word_perplexity=perplexity(total / max(1, words)),
    )


def joined(texts: Iterable[str], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the texts that are not blank, joined by <|endoftext|> as in training."""
    ids: list[int] = []
    for text in filter(str.strip, texts):
        ids += [*([tokenizer.end_of_text] if ids else []), *tokenizer.encode(text)]
    return ids


def windows(
    ids: Sequence[int], block_size: int, stride: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, targets), int64 (B, T) each; padding and targets already scored are -100.

    Raises ValueError for a stride that skips tokens.
    """
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride must be 1 to {block_size}, the block size, not {stride}")
    rows: list[tuple[list[int], list[int]]] = []
    scored = 0  # x_1 .. x_scored are already scored
    start = 0
    while scored < len(ids) - 1:
        end = min(start + block_size, len(ids) - 1)
        inputs, targets = list(ids[start:end]), list(ids[start + 1 : end + 1])
        targets[: scored - start] = [IGNORE_INDEX] * (scored - start)
        rows.append((inputs, targets))
        scored, start = end, start + stride
        if len(rows) == batch_size or scored == len(ids) - 1:
            yield pad([r[0] for r in rows], 0), pad([r[1] for r in rows], IGNORE_INDEX)
            rows = []


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Pad rows on the right to the longest: -> int64 (B, T).

    Attention is causal, so the padding changes no prediction before it.
    """
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
