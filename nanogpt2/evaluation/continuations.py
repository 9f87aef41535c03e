"""The log-probability of given continuations of given contexts, in batches.

LAMBADA and HellaSwag both build on it. This file does not know either of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nanogpt2.evaluation.perplexity import ignore_progress, pad
from nanogpt2.metrics import finite
from nanogpt2.model import GPT


@dataclass(frozen=True)
class Continuation:
    """`target`: the token ids to predict; `context`: the token ids before them."""

    context: list[int]
    target: list[int]


@dataclass(frozen=True)
class Score:
    """`log_probability`: the sum over the target's tokens, in nats.

    greedy: each token was the likeliest; greedy_allowed: the same, with the banned tokens excluded
    at the first position.
    """

    log_probability: float
    greedy: bool
    greedy_allowed: bool


def score(
    model: GPT,
    continuations: Sequence[Continuation],
    batch_size: int,
    block_size: int,
    banned_first: Sequence[int] = (),
    advance: Callable[[int], object] = ignore_progress,
) -> list[Score]:
    """Score each continuation; a context that is too long keeps its last tokens.

    advance: called with the number of continuations in each finished batch. Raises ValueError for
    an empty target, an empty context or a target longer than `block_size`, FloatingPointError for
    a score that is not finite.
    """
    for i, c in enumerate(continuations):
        if not c.target or not c.context:
            raise ValueError(f"continuation {i} has no token to predict, or none before it")
        if len(c.target) > block_size:
            raise ValueError(
                f"continuation {i} has {len(c.target)} tokens to predict; the block size is "
                f"{block_size}"
            )
    # batch rows of similar length, to save padding
    order = sorted(range(len(continuations)), key=lambda i: -_length(continuations[i]))
    scores: dict[int, Score] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [continuations[i] for i in chosen]
        scores |= zip(chosen, _score_batch(model, batch, block_size, banned_first), strict=True)
        advance(len(chosen))
    return [scores[i] for i in range(len(continuations))]


def _length(c: Continuation) -> int:
    return len(c.context) + len(c.target)


@torch.no_grad()
def _score_batch(
    model: GPT, batch: Sequence[Continuation], block_size: int, banned_first: Sequence[int]
) -> list[Score]:
    # the last token is only a target
    rows = [(c.context + c.target)[:-1][-block_size:] for c in batch]
    x = model.hidden_states(pad(rows, 0).to(model.wte.weight.device))  # (B, T, C)
    found = []
    for hidden, row, c in zip(x, rows, batch, strict=True):
        places = hidden[len(row) - len(c.target) : len(row)]  # (targets, C)
        scores = model.logits(places).float().log_softmax(dim=-1)  # (targets, V)
        target = torch.tensor(c.target, device=scores.device)
        right = scores.argmax(dim=-1) == target
        total = finite(scores.gather(1, target[:, None]).sum().item())
        scores[0, list(banned_first)] = -torch.inf
        allowed = scores.argmax(dim=-1) == target
        found.append(Score(total, bool(right.all()), bool(allowed.all())))
    return found
