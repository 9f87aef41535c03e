"""Scores in, scores out: what changes a model's opinion before a token is chosen.

A processor is a function of (ids, scores): int64 (N, T), all tokens so far, and float32 (N, V). It
returns new scores and leaves its input as it was; -inf bans a token. `processors_for` puts them in
transformers' order. Nothing here loops over rows, tokens or the vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nanogpt2.config import GenerationConfig

Processor = Callable[[Tensor, Tensor], Tensor]


def processors_for(config: GenerationConfig, prompt_mask: Tensor) -> list[Processor]:
    """Return the processors that `config` asks for; prompt_mask: bool (N, T), False at padding."""
    chain: list[Processor] = []
    if config.repetition_penalty != 1:
        first = prompt_mask.int().argmax(dim=1)  # (N,)
        chain.append(partial(penalise_repetition, penalty=config.repetition_penalty, first=first))
    if config.no_repeat_ngram_size > 0:
        chain.append(partial(ban_repeated_ngrams, n=config.no_repeat_ngram_size))
    if config.samples:
        if config.temperature != 1:
            chain.append(partial(scale_temperature, temperature=config.temperature))
        if config.top_k:
            chain.append(partial(keep_top_k, k=config.top_k))
        if config.top_p < 1:
            chain.append(partial(keep_top_p, p=config.top_p))
    return chain


def penalise_repetition(ids: Tensor, scores: Tensor, penalty: float, first: Tensor) -> Tensor:
    """Lower the score of each distinct token from position `first` (N,) on, once.

    A positive score is divided by the penalty, a negative one multiplied.
    """
    seen = torch.arange(ids.size(1), device=ids.device) >= first[:, None]  # (N, T)
    # padding repeats the row's last token, which counts anyway
    ids = ids.where(seen, ids[:, -1:])
    score = scores.gather(1, ids)  # (N, T)
    return scores.scatter(1, ids, torch.where(score < 0, score * penalty, score / penalty))


def ban_repeated_ngrams(ids: Tensor, scores: Tensor, n: int) -> Tensor:
    """Ban each token that would complete an n-gram which the row (padding included) already has."""
    if ids.size(1) < n:
        return scores
    ngrams = ids.unfold(1, n, 1)  # (N, T - n + 1, n)
    prefix = ids[:, None, ids.size(1) - (n - 1) :]  # (N, 1, n - 1)
    row, start = (ngrams[:, :, :-1] == prefix).all(dim=2).nonzero(as_tuple=True)
    return scores.index_put((row, ngrams[row, start, -1]), scores.new_tensor(float("-inf")))


def scale_temperature(ids: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Divide all scores by the temperature."""
    return scores / temperature


def keep_top_k(ids: Tensor, scores: Tensor, k: int) -> Tensor:
    """Ban what scores below the k-th best; ties with it stay."""
    kth = scores.topk(min(k, scores.size(1)), dim=1).values[:, -1:]  # (N, 1)
    return scores.masked_fill(scores < kth, float("-inf"))


def keep_top_p(ids: Tensor, scores: Tensor, p: float) -> Tensor:
    """Ban the unlikeliest tokens, whose probabilities add up to 1 - p at most; the best stays."""
    ascending, order = scores.sort(dim=1)
    banned = ascending.softmax(dim=1).cumsum(dim=1) <= 1 - p  # (N, V), in order of score
    banned[:, -1] = False
    return scores.masked_fill(banned.scatter(1, order, banned), float("-inf"))
