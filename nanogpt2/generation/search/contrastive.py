"""Contrastive search: tokens that are likely, yet unlike the text so far.

Of the k likeliest tokens v, each step takes the token with the greatest

    (1 - alpha) p(v) - alpha max_j cos(h_v, h_j)

where h_v is the model's last hidden state at v, once v is written, and h_j are the hidden states of
the tokens before v, without padding. The hidden states of a text that repeats itself are alike.

A step reads all k candidates, as k rows for each prompt. The chosen row also gives the scores of
the next step, so a token costs one reading. Past block_size a token keeps the hidden state from
when it was chosen. This file does not know the model's inside, nor text.

Sources: Su et al. 2022, "A Contrastive Framework for Neural Text Generation"; transformers 4.49,
_contrastive_search.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from nanogpt2.generation.engine import Engine, evaluating
from nanogpt2.generation.processors import processors_for
from nanogpt2.generation.request import Request
from nanogpt2.generation.sampling import Step, filler_token
from nanogpt2.generation.stopping import Stopping
from nanogpt2.model import GPT


@torch.no_grad()
def contrastive_search(model: GPT, request: Request) -> Iterator[Step]:
    """Yield a Step for each token, one row for each prompt."""
    config, device, ids = request.config, request.ids.device, request.ids
    # the configuration has checked that top_k is given; 0 means the whole vocabulary
    B, k = len(ids), min(config.top_k or request.vocab_size, request.vocab_size)
    engine, stopping = Engine(model, request, rows=k), Stopping(request)
    chain = [process for _, process in processors_for(request)]
    running = torch.ones(B, dtype=torch.bool, device=device)  # (B,)
    filler = torch.tensor(filler_token(request), device=device)
    with evaluating(model):
        next_scores = engine.next_scores(ids.repeat_interleave(k, dim=0))[::k]  # (B, V)
        context = _unit(engine.hidden[:B])  # (B, T, C)
        mask = request.mask[:, -context.size(1) :]  # (B, T)
        while running.any():
            scores = next_scores
            for process in chain:
                scores = process(ids, scores)
            p, tokens = scores.softmax(dim=1).topk(k, dim=1)  # each (B, k)
            rows = torch.cat([ids.repeat_interleave(k, dim=0), tokens.view(-1, 1)], dim=1)
            following = engine.next_scores(rows)  # (B * k, V)
            hidden = _unit(engine.hidden[:, -1]).view(B, k, -1)  # (B, k, C)
            places = _choose(p, hidden, context, mask, config.penalty_alpha or 0.0)  # (B,)

            chosen = places + torch.arange(B, device=device) * k  # (B,), rows of the engine
            engine.reorder(chosen.repeat_interleave(k))
            next_scores = following[chosen]
            context = torch.cat([context, hidden.flatten(0, 1)[chosen][:, None]], dim=1)
            mask = F.pad(mask, (0, 1), value=True)
            picked = tokens.gather(1, places[:, None]).squeeze(1).where(running, filler)  # (B,)
            ids = torch.cat([ids, picked[:, None]], dim=1)
            yield Step(picked, running, scores)
            running = running & ~stopping.ended(ids)


def _choose(p: Tensor, hidden: Tensor, context: Tensor, mask: Tensor, alpha: float) -> Tensor:
    """Return int64 (B,), the best of k candidates.

    p: (B, k); hidden (B, k, C) and context (B, T, C), of length 1; mask: (B, T), False at padding.
    """
    cosine = hidden @ context.transpose(1, 2)  # (B, k, T)
    cosine = cosine.masked_fill(~mask[:, None], torch.finfo(cosine.dtype).min)
    return ((1 - alpha) * p - alpha * cosine.amax(dim=2).float()).argmax(dim=1)


def _unit(x: Tensor) -> Tensor:
    """(..., C) -> (..., C) of length 1."""
    return x / x.norm(dim=-1, keepdim=True)
