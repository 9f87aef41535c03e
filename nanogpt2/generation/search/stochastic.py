"""Stochastic beam search: K different texts, drawn without replacement.

Give every possible text y its log-probability plus independent noise,

    g(y) = log p(y) + Gumbel noise

then the K texts with the greatest g are K draws without replacement, in draw order. The greatest g
among all texts with the same beginning is itself Gumbel noise plus the log-probability of that
beginning, so the search need not see all texts. It works from the top down. A beginning x with
greatest value g(x) gives each continuation v its own value, drawn so that the greatest is g(x):

    G(xv) = log p(xv) + Gumbel noise,   Z = max_v G(xv)
    g(xv) = -log(exp(-g(x)) - exp(-Z) + exp(-G(xv)))

and only the K beginnings with the greatest g can lead to the K texts. A text that ended keeps its
g.

p is the distribution of plain sampling: the softmax of the processed scores, with the sampling
options' processors if do_sample is set. A text's score is log p(y). Where fewer than K texts are
possible, the other texts' score is -1e9. The search computes in fp64, because the noise's far tail
decides. This file does not know the model's inside, nor text.

Source: Kool, van Hoof and Welling 2019, "Stochastic Beams and Where to Find Them", appendix B.3 for
the formula without cancellation.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nanogpt2.generation.beam import OUT, Beams, Group, begin, continuations
from nanogpt2.generation.engine import Engine, evaluating
from nanogpt2.generation.noise import Noise
from nanogpt2.generation.processors import INF, processors_for
from nanogpt2.generation.request import Request
from nanogpt2.generation.sampling import filler_token, make_noise
from nanogpt2.generation.stopping import Stopping
from nanogpt2.model import GPT

NEVER = -INF  # the score of an impossible text


@torch.no_grad()
def stochastic_search(model: GPT, request: Request) -> Iterator[Beams]:
    """Yield the state after every step, in draw order; the last one is `done`."""
    config, B, K = request.config, len(request.ids), request.config.num_beams
    device = request.ids.device
    engine, stopping, noise = Engine(model, request), Stopping(request), make_noise(request)
    chain = [process for _, process in processors_for(request)]
    rows = torch.arange(B * K, device=device).view(B, K)
    texts = begin(request, K).running
    # scores are log p; ended texts stay among these; at first, each prompt has a single text
    g = texts.scores = texts.scores.double().masked_fill(texts.scores < 0, NEVER)  # (B, K)
    ended = torch.zeros(B, K, dtype=torch.bool, device=device)
    history: list[Tensor] = []
    with evaluating(model):
        while not ended.all():
            ids = texts.ids.flatten(0, 1)  # (B * K, T)
            scores = engine.next_scores(ids)  # (B * K, V)
            for process in chain:
                scores = process(ids, scores)
            if config.output_scores:
                history.append(scores)
            logp = scores.double().log_softmax(dim=1).view(B, K, -1)  # (B, K, V)
            step = ids.size(1) - request.prompt_length
            total, perturbed = _perturb(texts.scores, g, logp, noise, step)
            _keep(total, perturbed, texts.scores, g, ended, filler_token(request))
            g, places = perturbed.flatten(1).topk(K)  # each (B, K)
            texts = continuations(texts, total.flatten(1), places, rows)
            parents = places // logp.size(2)
            engine.reorder(rows.gather(1, parents).flatten())
            ended = ended.gather(1, parents)
            texts.beams[:, :, -1].masked_fill_(ended, -1)
            ended = ended | stopping.ended(texts.ids.flatten(0, 1), history).view(B, K)
            yield _state(texts, ended, history)


def _perturb(
    logp: Tensor, g: Tensor, next_logp: Tensor, noise: Noise, step: int
) -> tuple[Tensor, Tensor]:
    """Return log p and g of all continuations, each (B, K, V), from the texts' own, each (B, K)."""
    B, K, V = next_logp.shape
    total = logp[:, :, None] + next_logp  # (B, K, V)
    q = noise.exponential((B, K * V), step).view(B, K, V)
    # -log q is Gumbel noise; q may be 0 once in 2^53 draws
    gumbel = total - q.clamp(min=torch.finfo(q.dtype).tiny).log()
    most = gumbel.amax(dim=2, keepdim=True)
    possible = (total > NEVER) & (g > NEVER)[:, :, None]
    g = g[:, :, None]
    v = g - gumbel + _log1mexp(gumbel - most)
    conditioned = g - v.clamp(min=0) - (-v.abs()).exp().log1p()
    return total, conditioned.where(possible, NEVER)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, exact at both ends (Maechler 2012)."""
    return torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())


def _keep(
    total: Tensor, perturbed: Tensor, logp: Tensor, g: Tensor, ended: Tensor, filler: int
) -> None:
    """Give each ended text a single continuation, the filler, with the text's own log p and g."""
    for every, own in ((total, logp), (perturbed, g)):
        every.masked_fill_(ended[:, :, None], NEVER)
        every[:, :, filler] = own.where(ended, every[:, :, filler])


def _state(texts: Group, ended: Tensor, history: list[Tensor]) -> Beams:
    scores = texts.scores.float().clamp(min=OUT)
    return Beams(
        running=Group(texts.ids, scores.masked_fill(ended, OUT), texts.beams),
        finished=Group(texts.ids, scores.masked_fill(~ended, OUT), texts.beams),
        is_finished=ended,
        improvable=~ended.all(dim=1, keepdim=True),
        done=bool(ended.all()),
        scores=history,
    )
