"""Diverse beam search: groups of beams that avoid each other's tokens.

The K beams of a prompt are G groups of S = K / G. In a step the groups choose one after the other,
each by its own beam search. The scores of a group are lowered at the tokens that earlier groups
chose in this step:

    score(token) = log p(token) - diversity_penalty * (beams of earlier groups that chose token)

So the Hamming distance between the groups enters the objective. A text's score is the sum of its
penalised scores. The search returns the best texts of all groups together.

The tokens are those of transformers 4.x, the last version with this search built in. As there, a
group whose search is over counts as choosing the pad token. The penalty comes after sequence_bias
and before the other processors. hypotheses.py holds the rules by which texts end.

Sources: Vijayakumar et al. 2016, "Diverse Beam Search"; transformers 4.49, _group_beam_search and
HammingDiversityLogitsProcessor.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanogpt2.generation.beam import Beams, continuations, totals, width
from nanogpt2.generation.engine import Engine, evaluating
from nanogpt2.generation.processors import processors_for
from nanogpt2.generation.request import Processor, Request
from nanogpt2.generation.sampling import filler_token
from nanogpt2.generation.search.hypotheses import (
    NONE,
    close,
    finish,
    pad_what_is_over,
    ranked,
    run_on,
    start,
)
from nanogpt2.generation.stopping import Stopping
from nanogpt2.model import GPT


class Diversity:
    """Lowers the scores of the tokens that this step's earlier groups chose."""

    def __init__(self, request: Request) -> None:
        self._penalty = request.config.diversity_penalty
        shape = (len(request.ids), request.vocab_size)
        self._counts = torch.zeros(shape, device=request.ids.device)  # (B, V)

    def begin_step(self) -> None:
        """Forget the tokens of the step before."""
        self._counts = torch.zeros_like(self._counts)

    def add(self, tokens: Tensor) -> None:
        """Count what a group chose: int64 (B, S)."""
        self._counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=torch.float32))

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Process the scores of a group: (B * S, V)."""
        return scores - self._penalty * self._counts.repeat_interleave(
            len(scores) // len(self._counts), dim=0
        )


@torch.no_grad()
def diverse_search(model: GPT, request: Request) -> Iterator[Beams]:
    """Yield the state of all groups after every step; the last one is `done`."""
    config, B, K = request.config, len(request.ids), request.config.num_beams
    G, S = config.num_beam_groups, K // config.num_beam_groups
    engine, stopping, diversity = Engine(model, request), Stopping(request), Diversity(request)
    chain = [process for _, process in chain_with(diversity, processors_for(request, rows=S))]
    rows = torch.arange(B * K, device=request.ids.device).view(B, G, S)
    groups = [start(request, S) for _ in range(G)]
    history: list[Tensor] = []
    chosen: list[Tensor] = []
    beams = _together(groups, history, chosen)
    with evaluating(model):
        while not beams.done:
            ids = beams.running.ids.flatten(0, 1)  # (B * K, T)
            scores = engine.next_scores(ids).log_softmax(dim=1).view(B, G, S, -1)
            diversity.begin_step()
            processed = []
            for g, group in enumerate(groups):
                processed.append(_step(request, group, scores[:, g], rows[:, g], chain, stopping))
                diversity.add(group.running.ids[:, :, -1])
            if config.output_scores:
                history.append(torch.stack(processed, dim=1).flatten(0, 2))  # (B * K, V)
            over = not any(bool(group.improvable.any()) for group in groups)
            if over or stopping.must_stop(ids.size(1) + 1):
                for group in groups:
                    close(request, group)
            chosen.append(torch.cat([group.running.ids[:, :, -1] for group in groups], dim=1))
            beams = _together(groups, history, chosen)
            engine.reorder(beams.running.beams[:, :, -1].flatten().long())
            yield beams


def chain_with(
    diversity: Diversity, chain: list[tuple[str, Processor]]
) -> list[tuple[str, Processor]]:
    """Insert the penalty into the processors, after sequence_bias."""
    first = [each for each in chain if each[0] == "sequence_bias"]
    others = [each for each in chain if each[0] != "sequence_bias"]
    return [*first, ("diversity_penalty", diversity), *others]


def _step(
    request: Request,
    group: Beams,
    scores: Tensor,
    rows: Tensor,
    chain: list[Processor],
    stopping: Stopping,
) -> Tensor:
    """Lengthen a group's texts, by scores (B, S, V); return the processed scores."""
    over, filler = ~group.improvable, filler_token(request)
    ids, processed = group.running.ids.flatten(0, 1), scores.flatten(0, 1)
    for process in chain:
        processed = process(ids, processed)
    total = totals(group.running, processed)  # (B, S * V)
    places = total.topk(width(request, group.running))[1]
    candidates = continuations(group.running, total, places, rows)
    ended = stopping.ended_by_token(candidates.ids.flatten(0, 1)).view(places.shape)
    finish(request, group, candidates, ended, filler)
    run_on(group, candidates, ended)
    pad_what_is_over(group, over, filler)
    return processed.view_as(scores)


def _together(groups: list[Beams], history: list[Tensor], chosen: list[Tensor]) -> Beams:
    """Put the groups of a prompt side by side; sort all finished texts together, best first."""
    running, finished = groups[0].running, groups[0].finished
    for group in groups[1:]:
        running, finished = running.join(group.running), finished.join(group.finished)
    finished = ranked(finished)
    return Beams(
        running=running,
        finished=finished,
        is_finished=finished.scores > NONE,
        improvable=torch.stack([group.improvable for group in groups]).any(dim=0),
        done=all(group.done for group in groups),
        scores=history,
        chosen=chosen,
    )


def avoided(request: Request, beams: Beams, rows: Tensor) -> tuple[list[int], ...]:
    """Return the tokens that groups before a text's own chose at each step; () without groups.

    rows: int32 (new,), the row that got each of the text's tokens, -1 past the text's end.
    """
    K, S = request.config.num_beams, request.config.num_beams // request.config.num_beam_groups
    steps = zip(beams.chosen, rows[rows >= 0].tolist(), strict=False)
    return tuple(chosen[row // K, : row % K // S * S].tolist() for chosen, row in steps)
