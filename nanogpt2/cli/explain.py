"""sample.py --explain and --color: each token's probability, raw and after each processor.

`explain` runs a finished text through the model again, token by token, with the processors of its
request. The probabilities equal those of the decoding, whatever the algorithm. In diverse beam
search the text does not show the choices of earlier groups, so the caller passes them. This file
does not know how tokens are chosen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanogpt2 import terminal
from nanogpt2.generation.engine import Engine, evaluating
from nanogpt2.generation.processors import processors_for
from nanogpt2.generation.replay import describe
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


@torch.no_grad()
def explain(
    model: GPT,
    request: Request,
    token_ids: Sequence[int],
    tokenizer: Tokenizer,
    avoided: Sequence[Sequence[int]] = (),
    alternatives: int = 4,
) -> Iterator[Explanation]:
    """Explain the new tokens of a request's first prompt, one by one.

    On a GPU a note says first which part of a step was a CUDA graph.

    avoided: diverse beam search only: for each new token, the tokens that earlier groups chose.
    alternatives: how many other tokens to show beside each chosen one.
    """
    terminal.note_once(describe(model, request))
    request = replace(request, ids=request.ids[:1], mask=request.mask[:1], rows=1)
    engine, chain = Engine(model, request), processors_for(request)
    diversity = Diversity(request)
    if request.config.num_beam_groups > 1:
        chain = chain_with(diversity, chain)
    stages = ("raw", *(name for name, _ in chain))
    searches = request.config.num_beams > 1 and not request.config.stochastic_beams
    ids = request.ids  # (1, T)
    with evaluating(model):
        for position, token in enumerate(token_ids):
            scores = engine.next_scores(ids)  # (1, V)
            logp = scores.log_softmax(dim=1)
            entropy = float(-(logp.exp() * logp).nansum())
            order = logp[0].argsort(descending=True)
            # processors get log-probabilities in a beam search and logits elsewhere
            rows = [logp if searches else scores]
            diversity.begin_step()
            if avoided:
                diversity.add(ids.new_tensor([avoided[position]]))
            for _, process in chain:
                rows.append(process(ids, rows[-1]))
            p = torch.cat(rows).softmax(dim=1)  # (stages, V)
            # alternate the likeliest after processing with the likeliest raw tokens, banned or not
            likeliest = p[-1].topk(alternatives + 1).indices
            best = torch.stack([likeliest, order[: alternatives + 1]], dim=1)
            best[:, 0] = best[:, 0].where(p[-1, best[:, 0]] > 0, best[:, 1])
            others = [i for i in dict.fromkeys(best.flatten().tolist()) if i != token]
            shown = (token, *others[:alternatives])
            chosen, *runners_up = (_candidate(i, order, p, tokenizer) for i in shown)
            yield Explanation(position, entropy, stages, chosen, tuple(runners_up))
            ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1)


def _candidate(token: int, order: Tensor, p: Tensor, tokenizer: Tokenizer) -> Candidate:
    rank = int((order == token).nonzero()) + 1
    return Candidate(token, tokenizer.decode([token]), rank, tuple(p[:, token].tolist()))


def draw(explanation: Explanation) -> str:
    """Draw a table of probabilities: the chosen token (>) and its runners-up, stage by stage."""
    heads = [name.replace("_", " ") for name in explanation.stages]
    rows = [["", "rank", *heads]]
    for candidate in (explanation.chosen, *explanation.runners_up):
        mark = ">" if candidate is explanation.chosen else " "
        cells = ["-" if p == 0 else f"{p:.2%}" for p in candidate.probabilities]
        rows.append([f"{mark} {candidate.text!r}", str(candidate.rank), *cells])
    title = f"token {explanation.position + 1}, entropy {explanation.entropy:.2f} nats"
    return f"{title}\n{terminal.table(rows)}"


def shade(explanation: Explanation, by: str, vocab_size: int) -> float:
    """Return the chosen token's colour, from 0 (red) to 1 (green).

    by: "prob" (raw probability), "entropy" (of the raw distribution) or "rank".
    """
    chosen = explanation.chosen
    if by == "prob":
        return chosen.probabilities[0] ** 0.5
    if by == "entropy":
        return 1 - explanation.entropy / torch.tensor(float(vocab_size)).log().item()
    return 1 / (1 + torch.tensor(float(chosen.rank)).log2().item())
