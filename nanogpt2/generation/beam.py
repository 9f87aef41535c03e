"""Beam search and beam sampling: K texts side by side, whose best continuations survive.

Each step scores the K V continuations of a prompt and takes N = max(2, 1 + E) K candidates, so that
K remain even if all E end tokens score best. The candidates are the N best or, when sampling, N
drawn without replacement and then sorted, best first. Those of the first K candidates that end the
text compete for the K finished places by their length-normalised scores. The best K of the others
run on. A text's score is the sum of its processed log-probabilities / (new tokens) ^
length_penalty.

The arithmetic is transformers', because it settles ties; so is -1e9, the score of a text that is
out of the search. This file does not know the model's inside, nor text.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanogpt2.generation.engine import Engine, evaluating
from nanogpt2.generation.noise import Noise
from nanogpt2.generation.processors import best as best_scores
from nanogpt2.generation.processors import processors_for
from nanogpt2.generation.request import Request
from nanogpt2.generation.sampling import make_noise
from nanogpt2.generation.stopping import Stopping
from nanogpt2.model import GPT

OUT = -1.0e9  # the score of a text that is out of the search


@dataclass
class Group:
    """The running or the finished texts with their scores, K for each of B prompts.

    ids: int64 (B, K, T); scores: float32 (B, K); beams: int32 (B, K, T - prompt), the row that got
    each new token, -1 past a text's end.
    """

    ids: Tensor
    scores: Tensor
    beams: Tensor

    def pick(self, places: Tensor) -> "Group":
        """Take the texts at `places`, int64 (B, M)."""
        return Group(*(pick(x, places) for x in (self.ids, self.scores, self.beams)))

    def extend(self, tokens: Tensor | int, beams: Tensor | int) -> "Group":
        """Add a column."""
        column = torch.zeros_like(self.ids[:, :, :1])
        ids = torch.cat([self.ids, column + _column(tokens)], dim=2)
        beams = torch.cat([self.beams, (column + _column(beams)).int()], dim=2)
        return Group(ids, self.scores, beams)

    def join(self, other: "Group") -> "Group":
        """Append the texts of another group."""
        return Group(
            torch.cat([self.ids, other.ids], dim=1),
            torch.cat([self.scores, other.scores], dim=1),
            torch.cat([self.beams, other.beams], dim=1),
        )


@dataclass
class Beams:
    """The state of a search after a step."""

    running: Group
    finished: Group
    is_finished: Tensor  # bool (B, K): this place of `finished` holds a text that ended
    improvable: Tensor  # bool (B, 1): a running text may still beat a finished one
    done: bool = False
    scores: list[Tensor] = field(default_factory=list)  # each (B * K, V), if asked for
    # diverse search: the tokens that each step chose, int64 (B, K), in ended searches as well
    chosen: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def beam_search(model: GPT, request: Request) -> Iterator[Beams]:
    """Yield the state after every step; the last one is `done`."""
    config, K = request.config, request.config.num_beams
    engine, stopping = Engine(model, request), Stopping(request)
    chain = [process for _, process in processors_for(request)]
    noise, filler = make_noise(request), filler_of(request)
    beams = begin(request, K)
    rows = torch.arange(beams.running.scores.numel(), device=request.ids.device).view(-1, K)
    with evaluating(model):
        while not beams.done:
            ids = beams.running.ids.flatten(0, 1)  # (B * K, T)
            scores = engine.next_scores(ids).log_softmax(dim=1)  # (B * K, V)
            for process in chain:
                scores = process(ids, scores)
            if config.output_scores:
                beams.scores.append(scores)
            candidates = _candidates(request, beams.running, scores, rows, noise)  # N of them
            del scores  # large
            ended = stopping.ended(candidates.ids.flatten(0, 1), beams.scores)
            ended = ended.view(candidates.scores.shape)
            beams.finished = beams.finished.extend(filler, -1)
            new_tokens = candidates.ids.size(2) - request.prompt_length
            norm = new_tokens**config.length_penalty
            finish(request, beams, candidates, ended, norm)
            beams.done = bool(run_on(request, beams, candidates, ended, norm))
            parents = beams.running.beams[:, :, -1].flatten().long()  # (B * K,)
            if K > 1:
                engine.reorder(parents)
            yield beams


def begin(request: Request, K: int) -> Beams:
    """Start with K texts for each prompt, each the prompt itself."""
    B, device = len(request.ids), request.ids.device
    ids = request.ids[:, None].expand(-1, K, -1)
    scores = torch.full((B, K), OUT, device=device)
    nothing = torch.empty(B, K, 0, dtype=torch.int32, device=device)
    first = scores.clone()
    # the texts of a prompt are equal, so only the first is continued
    first[:, 0] = 0.0
    return Beams(
        running=Group(ids, first, nothing),
        finished=Group(ids, scores, nothing),
        is_finished=torch.zeros(B, K, dtype=torch.bool, device=device),
        improvable=torch.ones(B, 1, dtype=torch.bool, device=device),
    )


def _candidates(
    request: Request, running: Group, scores: Tensor, rows: Tensor, noise: Noise
) -> Group:
    """Choose N continuations to finish or run on."""
    total = totals(running, scores)  # (B, K * V)
    N = width(request, running)
    if request.config.samples:
        step = running.ids.size(2) - request.prompt_length
        drawn = noise.draw(total.softmax(dim=1), N, step)  # (B, N), in draw order
        # best first, because only the first K candidates may finish
        order = total.gather(1, drawn).sort(dim=1, descending=True).indices
        places = drawn.gather(1, order)
    else:
        places = largest(total, N, running.scores.size(1))
    return continuations(running, total, places, rows)


def totals(running: Group, scores: Tensor) -> Tensor:
    """Score all continuations: scores of the next token (B * K, V) -> (B, K * V)."""
    B, K = running.scores.shape
    return (scores.view(B, K, -1) + running.scores[:, :, None]).flatten(1)


def largest(total: Tensor, N: int, K: int) -> Tensor:
    """Find the N largest as topk does: total (B, K * V) -> their places, int64 (B, N)."""
    B, V = len(total), total.size(1) // K
    if total.device.type == "cpu":
        # each text's own largest first: less time and memory, and equal results without ties
        more = min(N + 1, V)
        values, places = best_scores(total.view(B, K, V), more)
        places += V * torch.arange(K)[:, None]
        values, of_texts = values.flatten(1).topk(min(N + 1, K * more))
        if (values[:, 1:] < values[:, :-1]).all():
            return places.flatten(1).gather(1, of_texts[:, :N])
    return total.topk(N)[1]


def width(request: Request, running: Group) -> int:
    """N, enough candidates for K to run on, however many end."""
    return max(2, 1 + len(request.eos)) * running.scores.size(1)


def continuations(running: Group, total: Tensor, places: Tensor, rows: Tensor) -> Group:
    """Make the texts at `places`, int64 (B, N), among the continuations scored by total (B, K * V).

    rows: int64 (B, K), the engine's row of each running text.
    """
    V = total.size(1) // running.scores.size(1)
    parents = places // V
    texts = running.pick(parents).extend(places % V, rows.gather(1, parents))
    return Group(texts.ids, total.gather(1, places), texts.beams)


def finish(
    request: Request, beams: Beams, candidates: Group, ended: Tensor, norm: float | Tensor
) -> None:
    """Let those of the first K candidates that ended compete for the finished places.

    norm: (new tokens) ^ length_penalty.
    """
    config, K = request.config, request.config.num_beams
    now = ended.clone()
    now[:, K:] = False
    scores = candidates.scores / norm
    full = beams.is_finished.all(dim=1, keepdim=True) & (config.early_stopping is True)
    for barred in (full, ~beams.improvable, ~now):
        scores = scores + barred * OUT
    contest = beams.finished.join(Group(candidates.ids, scores, candidates.beams))
    places = contest.scores.topk(K)[1]
    beams.finished = contest.pick(places)
    beams.is_finished = pick(torch.cat([beams.is_finished, now], dim=1), places)


def run_on(
    request: Request, beams: Beams, candidates: Group, ended: Tensor, norm: float | Tensor
) -> Tensor:
    """Let the best candidates that did not end run on; return whether the search is done, ()."""
    config = request.config
    scores = candidates.scores + ended * OUT
    places = scores.topk(config.num_beams)[1]
    beams.running = Group(candidates.ids, scores, candidates.beams).pick(places)

    if config.early_stopping == "never" and config.length_penalty > 0:
        norm = (request.max_length - request.prompt_length) ** config.length_penalty
    best_possible = beams.running.scores[:, :1] / norm  # (B, 1)
    worst = beams.finished.scores.amin(dim=1, keepdim=True)
    worst = torch.where(beams.is_finished, worst, OUT)  # (B, K)
    beams.improvable = beams.improvable & (best_possible > worst).any(dim=1, keepdim=True)
    done = ~beams.improvable.any() | ended.all()
    return done | beams.is_finished.all() if config.early_stopping is True else done


def best(request: Request, beams: Beams) -> Group:
    """Return num_return_sequences texts for each prompt: (B, R, T), cut to the longest."""
    R = request.config.num_return_sequences
    group = beams.finished
    lengths = (group.beams[:, :R] >= 0).sum(dim=2)
    new = int(lengths.max())
    ids = group.ids[:, :R, : request.prompt_length + new]
    return Group(ids, group.scores[:, :R], group.beams[:, :R, :new])


def filler_of(request: Request) -> int:
    """transformers' filler of short texts: never a pad of 0, and -1 without an end token."""
    if len(request.eos) == 0:
        return -1
    return request.pad or int(request.eos[0])


def pick(x: Tensor, places: Tensor) -> Tensor:
    """(B, N, ...), (B, M) -> (B, M, ...)."""
    places = places.view(*places.shape, *(1 for _ in x.shape[2:]))
    return x.gather(1, places.expand(-1, -1, *x.shape[2:]))


def _column(value: Tensor | int) -> Tensor | int:
    return value[:, :, None] if isinstance(value, Tensor) else value
