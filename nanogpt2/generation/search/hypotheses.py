"""Finished hypotheses: how beams end in diverse and constrained search, as in transformers 4.x.

A search follows K texts for each prompt and keeps the K best texts that ended, its hypotheses. A
text's score is its sum of processed log-probabilities / (new tokens, the end included) ^
length_penalty. The rules that differ from beam.py's:

- A prompt's search is over for good once its K places are taken and either early_stopping is true
  or no candidate of the step, ended candidates included, scores better than the worst hypothesis.
- At the last step the running texts compete for the places too, unless the search is over.
- Any end token is written as the first of the end ids.

This file changes a rule of 4.x: there, a stop string ends nothing until all rows hold a stop
string; here, a stop string ends a text as an end token does.

Source: transformers 4.49, BeamSearchScorer and BeamHypotheses.
"""

import torch
from torch import Tensor

from nanogpt2.generation.beam import Beams, Group, begin
from nanogpt2.generation.processors import INF
from nanogpt2.generation.request import Request

NONE = -INF  # the score of an empty place


def start(request: Request, K: int) -> Beams:
    """Begin a search of K texts for each prompt, with K empty places."""
    beams = begin(request, K)
    beams.finished.scores = torch.full_like(beams.finished.scores, NONE)
    return beams


def finish(request: Request, beams: Beams, candidates: Group, ended: Tensor, filler: int) -> None:
    """Let those of the first K candidates that `ended`, bool (B, N), compete for the places.

    `candidates` are sorted, best first; `filler` lengthens the texts that finished earlier.
    """
    beams.finished = beams.finished.extend(filler, -1)
    now = ended & beams.improvable
    now[:, beams.running.scores.size(1) :] = False
    if len(request.eos):
        last = candidates.ids[:, :, -1]
        written = torch.where(torch.isin(last, request.eos), request.eos[0], last)
        ids = torch.cat([candidates.ids[:, :, :-1], written[:, :, None]], dim=2)
        _compete(request, beams, Group(ids, candidates.scores, candidates.beams), now)
    else:
        _compete(request, beams, candidates, now)

    config = request.config
    length = candidates.ids.size(2) - request.prompt_length
    if config.early_stopping == "never" and config.length_penalty > 0:
        length = request.max_length - request.prompt_length
    best_possible = candidates.scores[:, :1] / length**config.length_penalty  # (B, 1)
    worst = beams.finished.scores[:, -1:]  # (B, 1)
    beaten = (worst >= best_possible) | (config.early_stopping is True)
    beams.improvable = beams.improvable & ~(beams.is_finished.all(dim=1, keepdim=True) & beaten)


def run_on(beams: Beams, candidates: Group, ended: Tensor) -> None:
    """Go on with the best K candidates that did not end."""
    K = beams.running.scores.size(1)
    places = ended.int().argsort(dim=1, stable=True)[:, :K]
    scores = candidates.scores.masked_fill(ended, NONE)
    beams.running = Group(candidates.ids, scores, candidates.beams).pick(places)


def close(request: Request, beams: Beams, allowed: Tensor | None = None) -> None:
    """End the search: let the running texts that are `allowed`, bool (B, K), compete as well."""
    now = beams.improvable.expand_as(beams.is_finished)
    _compete(request, beams, beams.running, now if allowed is None else now & allowed)
    beams.done = True


def ranked(finished: Group) -> Group:
    """Sort finished texts, best first; of equal scores the newest first."""
    order = finished.scores.flip(1).argsort(dim=1, descending=True, stable=True)
    return finished.pick(finished.scores.size(1) - 1 - order)


def pad_what_is_over(beams: Beams, over: Tensor, filler: int) -> None:
    """Fill the new token where a search was `over`, bool (B, 1), before this step."""
    ids = beams.running.ids
    last = ids[:, :, -1:].masked_fill(over[:, :, None], filler)
    beams.running.ids = torch.cat([ids[:, :, :-1], last], dim=2)


def _compete(request: Request, beams: Beams, texts: Group, now: Tensor) -> None:
    """Keep the K best of the finished texts and of the `texts` where `now`, best first."""
    length = texts.ids.size(2) - request.prompt_length
    scores = texts.scores / length**request.config.length_penalty
    # a text of score -inf still takes an empty place
    scores = scores.clamp(min=torch.finfo(scores.dtype).min).masked_fill(~now, NONE)
    contest = beams.finished.join(Group(texts.ids, scores, texts.beams))
    # stable: a text of equal score does not displace an older text
    order = contest.scores.argsort(dim=1, descending=True, stable=True)
    beams.finished = contest.pick(order[:, : beams.is_finished.size(1)])
    beams.is_finished = beams.finished.scores > NONE
