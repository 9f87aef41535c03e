"""The model's work of OpenAI's endpoints: texts for prompts, and their tokens' probabilities.

Each prompt is continued by itself, so its tokens are those of generate() for this prompt alone.
This file does not know HTTP.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from nanogpt2.config import GenerationConfig
from nanogpt2.generation import search, steps
from nanogpt2.generation.beam import best
from nanogpt2.generation.engine import evaluating
from nanogpt2.generation.explain import Watch, stages
from nanogpt2.generation.request import Request
from nanogpt2.generation.search.diverse import avoided
from nanogpt2.generation.text import completed, completions, request_for_ids
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer

MOST_PROMPT_TOKENS = 2**14
MOST_TEXTS = 64  # side by side, of one prompt
MOST_NUMBERS = 2**18  # of a request: its new tokens and the likeliest ones named beside each
CHUNK = 64  # rows of logits computed at once


@dataclass(frozen=True)
class Served:
    """A model that answers requests."""

    name: str
    model: GPT
    tokenizer: Tokenizer
    is_chat: bool


class Prompt(NamedTuple):
    """Token ids, then a text in parts, each tokenized by itself."""

    parts: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    literal: bool = False  # <|endoftext|> in the text is characters

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Return all ids. Raises ValueError for too many."""
        ids = [*self.ids]
        for part in self.parts:
            ids += tokenizer.encode(part, allow_special=not self.literal)
        if len(ids) > MOST_PROMPT_TOKENS:
            most = f"{MOST_PROMPT_TOKENS:,} tokens at most"
            raise ValueError(f"prompt must have {most}, not {len(ids):,}")
        return ids

    def shown(self, tokenizer: Tokenizer) -> str:
        """Return the text."""
        return tokenizer.decode(self.ids) + "".join(self.parts)


class Scored(NamedTuple):
    """A token, its log-probability and rank, and the likeliest tokens in its place.

    The first token of a text has neither.
    """

    token: int
    logprob: float | None = None
    rank: int | None = None
    entropy: float | None = None  # of the distribution, in nats
    likeliest: list[tuple[int, float]] | None = None


@dataclass
class Piece:
    """What a text gains in a step."""

    index: int  # the text's, among all of the request
    text: str = ""
    scored: list[Scored] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # given with the last piece
    score: float | None = None  # of a beam's text


class Usage(NamedTuple):
    """How many tokens were read or written."""

    prompt: int = 0
    unseen: int = 0  # written in texts that are not among the answers


@dataclass(frozen=True)
class Task:
    """What to write. options: None writes nothing, for prompts to echo."""

    prompts: Sequence[Prompt]
    options: GenerationConfig | None
    n: int  # texts for each prompt
    best_of: int  # texts to choose them from
    likeliest: int | None  # how many likeliest tokens to name; None: no probabilities
    echo: bool = False


def prepared(served: Served, ids: list[int], options: GenerationConfig, most_new: int) -> Request:
    """Make a request for a prompt. Raises ValueError for a wrong option or too many tokens."""
    rows = max(options.num_beams, options.num_return_sequences)
    if options.penalty_alpha is not None:
        # contrastive search tries top_k texts; the configuration has checked that it is given
        rows = options.top_k or served.model.config.vocab_size
    if rows > MOST_TEXTS:
        name = "top_k" if options.penalty_alpha is not None else "num_beams"
        raise ValueError(f"{name} must be {MOST_TEXTS} at most, not {rows}")
    request = request_for_ids(served.model, served.tokenizer, [ids], options)
    new = request.max_length - request.prompt_length
    if new > most_new:
        name = "max_length" if options.max_new_tokens is None else "max_tokens"
        raise ValueError(f"{name} must add {most_new:,} tokens at most, not {new:,}")
    return request


def write(served: Served, task: Task, most_new: int) -> Iterator[Usage | Piece | None]:
    """Yield the pieces of all texts, and for each token at least something.

    The first thing is a Usage, once all prompts are checked. Raises ValueError for a wrong option.
    """
    rows = [prompt.encode(served.tokenizer) for prompt in task.prompts]
    requests = None
    if task.options is not None:
        requests = [prepared(served, ids, task.options, most_new) for ids in rows]
    longest, block_size = max(map(len, rows)), served.model.config.block_size
    if task.echo and task.likeliest is not None and longest > block_size:
        raise ValueError(
            f"prompt must have {block_size} tokens at most with echo and logprobs, not {longest}"
        )
    longest_new = max((r.max_length - r.prompt_length for r in requests or []), default=0)
    numbers = len(rows) * task.best_of * longest_new * (1 + (task.likeliest or 0))
    if numbers > (most := max(MOST_NUMBERS, most_new)):
        raise ValueError(
            f"max_tokens must be lower: texts x max_tokens x (1 + logprobs) may be {most:,} at "
            f"most, not {numbers:,}"
        )
    if task.echo and task.likeliest is not None:
        numbers = sum(map(len, rows)) * task.n * (1 + task.likeliest)
        if numbers > MOST_NUMBERS:
            raise ValueError(
                "prompt must be shorter: with echo, its tokens x n x (1 + logprobs) may be "
                f"{MOST_NUMBERS:,} at most, not {numbers:,}"
            )
    yield Usage(prompt=sum(map(len, rows)))
    for number, (prompt, ids) in enumerate(zip(task.prompts, rows, strict=True)):
        places = range(number * task.n, (number + 1) * task.n)
        if task.echo:
            scored = [Scored(ids[0])] if ids and task.likeliest is not None else []
            if task.likeliest is not None:
                for some in scores_of(served.model, ids, task.likeliest):
                    scored += some
                    yield None
            for index in places:
                yield Piece(index, prompt.shown(served.tokenizer), scored)
        if requests is None:
            yield from (Piece(index, finish_reason="length") for index in places)
            continue
        found = _texts(served, requests[number], task)
        for piece in found if task.best_of == task.n else _chosen(found, task.n):
            if isinstance(piece, Piece):
                piece.index += places.start
            yield piece


def _texts(served: Served, request: Request, task: Task) -> Iterator[Piece | None]:
    """Write the texts of a prompt, numbered from 0."""
    likeliest = task.likeliest
    if likeliest is None and task.best_of > task.n:
        likeliest = 0
    if request.config.num_beams > 1:
        yield from _beams(served, request, likeliest)
        return
    for piece in _rows(served, request, likeliest):
        # greedy texts are all the same, so only one is written
        copies = task.best_of // request.rows if piece is not None else 1
        for copy in range(copies):
            yield replace(piece, index=piece.index + copy) if piece is not None else None


def _rows(served: Served, request: Request, likeliest: int | None) -> Iterator[Piece | None]:
    watch = Watch()
    if likeliest is not None:
        request = replace(request, watch=watch)
    (texts,) = completions(served.tokenizer, request, request.rows)
    for step in steps(served.model, request):
        yield None
        logp = None if likeliest is None else watch.scores[0].log_softmax(dim=1)  # (N, V)
        chosen = zip(texts, step.tokens.tolist(), step.running.tolist(), strict=True)
        for row, (text, token, is_running) in enumerate(chosen):
            if not is_running:
                continue
            scored = [] if logp is None else [score(logp[row], token, likeliest or 0)]
            yield Piece(row, text.add(token), scored, [token])
    for row, text in enumerate(texts):
        yield Piece(row, text.finish(), finish_reason=text.finish_reason)


def _beams(served: Served, request: Request, likeliest: int | None) -> Iterator[Piece | None]:
    found = search(served.model, request)
    beams = next(found)
    for later in found:
        beams = later
        yield None
    group = best(request, beams)
    (texts,) = completed(served.tokenizer, request, group)
    ends = zip(texts, group.scores[0].tolist(), group.beams[0], strict=True)
    for row, (text, total, rows) in enumerate(ends):
        scored: list[Scored] = []
        if likeliest is not None:
            others = avoided(request, beams, rows)
            ids = text.token_ids
            for token, (_, (raw, *_)) in zip(
                ids, stages(served.model, request, ids, others), strict=True
            ):
                scored.append(score(raw[0].log_softmax(dim=0), token, likeliest))
                yield None
        yield Piece(row, text.text, scored, text.token_ids, text.finish_reason, total)


def _chosen(pieces: Iterator[Piece | None], count: int) -> Iterator[Piece | Usage | None]:
    """Yield the texts whose tokens have the largest mean log-probability, the best first."""
    texts: dict[int, Piece] = {}
    for piece in pieces:
        if piece is None:
            yield None
            continue
        text = texts.setdefault(piece.index, Piece(piece.index))
        text.text += piece.text
        text.scored += piece.scored
        text.ids += piece.ids
        text.finish_reason, text.score = piece.finish_reason, piece.score
    ranked = sorted(texts.values(), key=_mean, reverse=True)
    yield Usage(unseen=sum(len(text.ids) for text in ranked[count:]))
    for index, text in enumerate(ranked[:count]):
        yield replace(text, index=index)


def _mean(text: Piece) -> float:
    return sum(each.logprob or 0.0 for each in text.scored) / len(text.scored)


def score(logp: Tensor, token: int, likeliest: int) -> Scored:
    """Look a token up in log-probabilities (V,), with the likeliest tokens beside it."""
    values, ids = logp.topk(min(likeliest, len(logp)))
    own = logp[token]
    return Scored(
        token,
        float(own),
        1 + int((logp > own).sum()),
        float(-(logp.exp() * logp).nansum()),
        [*zip(ids.tolist(), values.tolist(), strict=True)],
    )


@torch.no_grad()
def scores_of(model: GPT, ids: Sequence[int], likeliest: int) -> Iterator[list[Scored]]:
    """Score a text's tokens from the second on, some at a time."""
    with evaluating(model):
        idx = torch.tensor([ids[:-1]], dtype=torch.int64, device=model.wte.weight.device)
        if idx.numel() == 0:
            return
        x = model.hidden_states(idx)[0]  # (T - 1, C)
        for start in range(0, len(x), CHUNK):
            logp = model.logits(x[start : start + CHUNK]).float().log_softmax(dim=1)
            if not logp.amax(dim=1).isfinite().all():
                raise FloatingPointError("the model's scores are not finite numbers")
            following = ids[start + 1 : start + 1 + len(logp)]
            yield [score(row, token, likeliest) for row, token in zip(logp, following, strict=True)]
