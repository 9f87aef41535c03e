"""Each token's probability, raw and after each processor: while a text is written, or afterwards.

`stages` runs a finished text through the model again, token by token, with the processors of its
request. The probabilities equal those of the decoding, whatever the algorithm. In diverse beam
search the text does not show the choices of earlier groups, so the caller passes them. `Watch`
keeps the same stages of a text that is being written. This file does not know how tokens are
chosen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanogpt2.generation.engine import Engine, evaluating
from nanogpt2.generation.processors import RAW, processors_for
from nanogpt2.generation.request import Request
from nanogpt2.generation.search.diverse import Diversity, chain_with
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Candidate:
    """A possible next token. `probabilities`: raw, then after each processor."""

    token: int
    text: str
    rank: int  # by raw probability; 1 is the likeliest
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Explanation:
    """A chosen token and its alternatives."""

    position: int  # 0 is the first new token
    entropy: float  # of the raw distribution, in nats
    stages: tuple[str, ...]  # "raw", then the processors' options, in order
    chosen: Candidate
    runners_up: tuple[Candidate, ...]

    def as_json(self) -> dict[str, Any]:
        """Return plain dicts and lists, for --json."""
        return asdict(self)


class Watch:
    """Keeps the scores of a step, raw and after each processor; for Request.watch."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.scores: list[Tensor] = []  # each (N, V)

    def __call__(self, name: str, scores: Tensor) -> None:
        """Take a stage's scores; RAW begins a step."""
        if name == RAW:
            self.names, self.scores = [], []
        self.names.append(name)
        self.scores.append(scores)

    def row(self, n: int) -> list[Tensor]:
        """Return the stages of row n, each (1, V)."""
        return [scores[n : n + 1] for scores in self.scores]


@torch.no_grad()
def stages(
    model: GPT,
    request: Request,
    token_ids: Sequence[int],
    avoided: Sequence[Sequence[int]] = (),
) -> Iterator[tuple[list[str], list[Tensor]]]:
    """Yield the stages' names and scores, each (1, V), at each new token of the first prompt.

    avoided: diverse beam search only: for each new token, the tokens that earlier groups chose.
    """
    request = replace(request, ids=request.ids[:1], mask=request.mask[:1], rows=1)
    engine, chain = Engine(model, request), processors_for(request)
    diversity = Diversity(request)
    if request.config.num_beam_groups > 1:
        chain = chain_with(diversity, chain)
    names = [RAW, *(name for name, _ in chain)]
    searches = request.config.num_beams > 1 and not request.config.stochastic_beams
    ids = request.ids  # (1, T)
    with evaluating(model):
        for position, token in enumerate(token_ids):
            scores = engine.next_scores(ids)  # (1, V)
            # processors get log-probabilities in a beam search and logits elsewhere
            rows = [scores.log_softmax(dim=1) if searches else scores]
            diversity.begin_step()
            if avoided:
                diversity.add(ids.new_tensor([avoided[position]]))
            for _, process in chain:
                rows.append(process(ids, rows[-1]))
            yield names, rows
            ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1)


def explain(
    model: GPT,
    request: Request,
    token_ids: Sequence[int],
    tokenizer: Tokenizer,
    avoided: Sequence[Sequence[int]] = (),
    alternatives: int = 4,
) -> Iterator[Explanation]:
    """Explain the new tokens of a request's first prompt, one by one.

    avoided: as for `stages`. alternatives: how many other tokens to show beside each chosen one.
    """
    found = stages(model, request, token_ids, avoided)
    for position, (token, (names, rows)) in enumerate(zip(token_ids, found, strict=True)):
        yield explanation(position, names, rows, token, tokenizer, alternatives)


@torch.no_grad()
def explanation(
    position: int,
    names: Sequence[str],
    rows: Sequence[Tensor],
    token: int,
    tokenizer: Tokenizer,
    alternatives: int,
) -> Explanation:
    """Explain a chosen token by the scores of each stage, each (1, V)."""
    logp = rows[0].log_softmax(dim=1)
    entropy = float(-(logp.exp() * logp).nansum())
    p = torch.cat([*rows]).softmax(dim=1)  # (stages, V)
    count = min(alternatives + 1, logp.size(1))
    # alternate the likeliest after processing with the likeliest raw tokens, banned or not
    best = torch.stack([p[-1].topk(count).indices, logp[0].topk(count).indices], dim=1)
    best[:, 0] = best[:, 0].where(p[-1, best[:, 0]] > 0, best[:, 1])
    others = [i for i in dict.fromkeys(best.flatten().tolist()) if i != token]
    chosen, *runners_up = (
        _candidate(i, logp[0], p, tokenizer) for i in (token, *others[:alternatives])
    )
    return Explanation(position, entropy, tuple(names), chosen, tuple(runners_up))


def kl_divergence(logp: Tensor, other: Tensor) -> float:
    """KL(p || q) in nats, of log-probabilities (V,)."""
    return float((logp.exp() * (logp - other)).nansum())


def _candidate(token: int, logp: Tensor, p: Tensor, tokenizer: Tokenizer) -> Candidate:
    rank = 1 + int((logp > logp[token]).sum())
    return Candidate(token, tokenizer.decode([token]), rank, tuple(p[:, token].tolist()))
