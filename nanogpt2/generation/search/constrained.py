"""Constrained beam search: texts that contain given words, wherever the words fit best.

A constraint is a word, that is a list of token ids, or a list of alternative words of which one is
enough. All words of all constraints form a forest. Node e is a token that follows `parent[e]`; a
word's first token follows NOWHERE; a leaf completes its constraint. A text's progress is the set of
constraints it has met and its current node. A text is within one constraint at a time. A token that
does not continue the constraint loses its begun part, and is not tried as a new beginning. A lost
constraint comes last when the next constraint is chosen.

A step takes the K best continuations by score, and all continuations that make progress. Each goes
to a bank, numbered by the tokens of the met constraints and of the begun constraint. The next K
texts are the best of each bank, then the second best of each, and so on, from the most advanced
bank down. So the search always follows texts close to meeting the constraints, however unlikely.

Only a text that has met all constraints may end. If fewer than num_return_sequences of the running
texts have met all at the last step, all running texts compete, as in 4.x. So a short max_length may
give texts without the words. hypotheses.py holds the other rules.

The tokens are those of transformers 4.x, the last version with this search built in: the prompt
counts, padding included, and 100 nats separate the banks.

Sources: Post and Vilar 2018, "Fast Lexically Constrained Decoding with Dynamic Beam Allocation";
transformers 4.49, ConstrainedBeamSearchScorer and ConstraintListState, but for its mistake of
letting the continuations of one text share their progress within alternatives.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from nanogpt2.generation.beam import Beams, continuations, pick, totals, width
from nanogpt2.generation.engine import Engine, evaluating
from nanogpt2.generation.processors import INF, processors_for
from nanogpt2.generation.request import Request
from nanogpt2.generation.sampling import filler_token
from nanogpt2.generation.search.hypotheses import close, finish, ranked, start
from nanogpt2.generation.stopping import Stopping
from nanogpt2.model import GPT

BANK = 100  # nats between banks
NOWHERE = -1  # the node of a text outside any constraint


@dataclass
class Progress:
    """The progress of N texts for each of B prompts. W constraints."""

    met: Tensor  # bool (B, N, W)
    order: Tensor  # int64 (B, N, W): a token that could begin several constraints begins the least
    node: Tensor  # int64 (B, N), the text's place within a constraint, or NOWHERE

    def pick(self, places: Tensor) -> "Progress":
        """Take the texts at `places`, int64 (B, M)."""
        return Progress(*(pick(getattr(self, f.name), places) for f in fields(self)))

    def complete(self) -> Tensor:
        """Bool (B, N): the text has met all constraints."""
        return self.met.all(dim=2)


class Constraints:
    """The forest of all words: E nodes; node e belongs to constraint `owner[e]`."""

    def __init__(self, words: list[list[list[int]]], device: torch.device) -> None:
        """words: the alternatives of each constraint, each a list of ids."""
        nodes: dict[tuple[int, int, int], int] = {}  # (owner, parent, token) -> node
        depths = []
        for owner, alternatives in enumerate(words):
            for word in alternatives:
                node = NOWHERE
                for depth, token in enumerate(word, start=1):
                    key = (owner, node, token)
                    if key not in nodes:
                        depths.append(depth)
                    node = nodes.setdefault(key, len(nodes))
        longest = torch.tensor([max(map(len, word)) for word in words], device=device)  # (W,)
        self.owner, self.parent, self.token = torch.tensor([*nodes], device=device).T  # (E,)
        self.is_leaf = ~torch.isin(torch.arange(len(nodes), device=device), self.parent)  # (E,)
        self.longest = int(longest.max())
        self._remaining = longest[self.owner] - torch.tensor(depths, device=device)  # (E,)
        self._count = len(words)

    def begin(self, prompts: Tensor, count: int) -> Progress:
        """Progress of `count` copies of each prompt, int64 (B, T)."""
        B, device, W = len(prompts), prompts.device, self._count
        progress = Progress(
            met=torch.zeros(B, 1, W, dtype=torch.bool, device=device),
            order=torch.arange(W, device=device).expand(B, 1, W),
            node=torch.full((B, 1), NOWHERE, device=device),
        )
        for tokens in prompts.T:
            progress = self.advance(progress, tokens[:, None])
        return progress.pick(torch.zeros(B, count, dtype=torch.int64, device=device))

    def ahead(self, progress: Progress) -> Tensor:
        """Bool (B, N, E): the text can reach this node with the next token."""
        return (self.parent == progress.node[:, :, None]) & ~progress.met[:, :, self.owner]

    def advance(self, progress: Progress, tokens: Tensor) -> Progress:
        """Append a token to each text, int64 (B, N)."""
        reached = self.ahead(progress) & (self.token == tokens[:, :, None])  # (B, N, E)
        order = progress.order[:, :, self.owner]
        node = order.masked_fill(~reached, torch.iinfo(order.dtype).max).argmin(dim=2)  # (B, N)
        stepped = reached.any(dim=2)
        done = stepped & self.is_leaf[node]
        lost = ~stepped & (progress.node >= 0)
        last = progress.order.amax(dim=2, keepdim=True) + 1
        return Progress(
            met=progress.met | self._of(node, done),
            order=progress.order.where(~self._of(progress.node, lost), last),
            node=node.where(stepped & ~done, NOWHERE),
        )

    def bank(self, progress: Progress) -> Tensor:
        """Int64 (B, N): the progress in tokens, of the met constraints and of the begun one."""
        begun = (self.longest - self._remaining[progress.node]) * (progress.node >= 0)
        return progress.met.sum(dim=2) * self.longest + begun

    def _of(self, node: Tensor, where: Tensor) -> Tensor:
        """Bool (B, N, W): this constraint owns the text's node, and `where` holds."""
        W = torch.arange(self._count, device=node.device)
        return (self.owner[node][:, :, None] == W) & where[:, :, None]


@torch.no_grad()
def constrained_search(model: GPT, request: Request) -> Iterator[Beams]:
    """Yield the state after every step; the last one is `done`.

    Raises ValueError for invalid force_words_ids.
    """
    config, B, K = request.config, len(request.ids), request.config.num_beams
    device, filler = request.ids.device, filler_token(request)
    constraints = Constraints(_words(config.force_words_ids, request), device)
    engine, stopping = Engine(model, request), Stopping(request)
    chain = [process for _, process in processors_for(request)]
    rows = torch.arange(B * K, device=device).view(B, K)
    beams = start(request, K)
    progress = constraints.begin(request.ids, K)
    with evaluating(model):
        while not beams.done:
            ids = beams.running.ids.flatten(0, 1)  # (B * K, T)
            scores = engine.next_scores(ids).log_softmax(dim=1)  # (B * K, V)
            for process in chain:
                scores = process(ids, scores)
            if config.output_scores:
                beams.scores.append(scores)
            progress = _step(request, beams, progress, constraints, scores, rows, stopping, filler)
            if not beams.improvable.any() or stopping.must_stop(ids.size(1) + 1):
                complete = progress.complete()  # (B, K)
                few = complete.sum(dim=1, keepdim=True) < config.num_return_sequences
                close(request, beams, complete | few)
                beams.finished = ranked(beams.finished)
            engine.reorder(beams.running.beams[:, :, -1].flatten().long())
            yield beams


def _step(
    request: Request,
    beams: Beams,
    progress: Progress,
    constraints: Constraints,
    scores: Tensor,
    rows: Tensor,
    stopping: Stopping,
    filler: int,
) -> Progress:
    """Lengthen the texts, by scores (B * K, V); return the progress of the new running texts."""
    before, V = beams.running, scores.size(1)
    total = totals(before, scores)  # (B, K * V)
    likeliest = total.topk(width(request, before))[1]  # (B, N)
    candidates = continuations(before, total, likeliest, rows)
    ended = stopping.ended_by_token(candidates.ids.flatten(0, 1)).view(likeliest.shape)
    # the progress before the end token, which adds none
    complete = progress.pick(likeliest // V).complete()
    finish(request, beams, candidates, ended & complete, filler)

    K = before.scores.size(1)
    best = likeliest.gather(1, ended.int().argsort(dim=1, stable=True)[:, :K])  # (B, K)
    towards = torch.arange(K, device=rows.device)[:, None] * V + constraints.token  # (K, E)
    places = torch.cat([best, towards.flatten().expand(len(best), -1)], dim=1)  # (B, M)
    valid = torch.cat([torch.ones_like(best).bool(), constraints.ahead(progress).flatten(1)], dim=1)
    valid &= ~_repeated(before.ids, places, valid, V)
    after = constraints.advance(progress.pick(places // V), places % V)
    chosen = _by_banks(total.gather(1, places), constraints.bank(after), valid, K)  # (B, K)
    beams.running = continuations(before, total, places.gather(1, chosen), rows)
    return after.pick(chosen)


def _repeated(ids: Tensor, places: Tensor, valid: Tensor, vocab_size: int) -> Tensor:
    """Bool (B, M): an earlier valid place leads to the same text. ids: (B, K, T)."""
    # at the first step all running texts are equal
    same = (ids[:, :, None] == ids[:, None]).all(dim=3)  # (B, K, K)
    first = same.int().argmax(dim=2)  # (B, K)
    text = first.gather(1, places // vocab_size) * vocab_size + places % vocab_size  # (B, M)
    equal = (text[:, :, None] == text[:, None]) & valid[:, None]  # (B, M, M)
    return equal.tril(-1).any(dim=2)


def _by_banks(scores: Tensor, banks: Tensor, valid: Tensor, count: int) -> Tensor:
    """Return int64 (B, count): each bank's best, then each bank's second best; inputs (B, M)."""
    key = (banks * BANK + scores).clamp(min=torch.finfo(scores.dtype).min)
    order = key.masked_fill(~valid, -INF).argsort(dim=1, descending=True, stable=True)
    banks, valid = banks.gather(1, order), valid.gather(1, order)
    place = torch.arange(order.size(1), device=order.device).expand_as(order)
    # a text's rank is its distance from the first text of its bank
    begins = torch.ones_like(valid)
    begins[:, 1:] = banks[:, 1:] != banks[:, :-1]
    rank = place - (place * begins).cummax(dim=1).values
    # invalid places come after all valid places
    rank = rank.masked_fill(~valid, order.size(1))
    return order.gather(1, rank.argsort(dim=1, stable=True)[:, :count])


def _words(value: Any, request: Request) -> list[list[list[int]]]:
    """Return the alternatives of each constraint. Raises ValueError for any other form."""
    V, eos = request.vocab_size, set(request.eos.tolist())

    def is_word(ids: Any) -> bool:
        return _is_list(ids) and all(type(i) is int and 0 <= i < V for i in ids)

    if not _is_list(value) or not all(
        is_word(word) or (_is_list(word) and all(map(is_word, word))) for word in value
    ):
        raise ValueError(
            f"force_words_ids must be a list of lists of ids below {V}, or of lists of such lists, "
            f"not {value!r}"
        )
    constraints = [[word] if is_word(word) else word for word in value]
    for alternatives in constraints:
        for word in alternatives:
            if any(word == [*other][: len(word)] for other in alternatives if other is not word):
                raise ValueError(
                    f"force_words_ids must not hold both {word!r} and a word that begins with it"
                )
            if eos & {*word}:
                raise ValueError(f"force_words_ids must not hold an end token, as {word!r} does")
    return [[[*word] for word in alternatives] for alternatives in constraints]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0
