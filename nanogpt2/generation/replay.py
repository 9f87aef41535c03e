"""Decoding on a GPU as one graph per token: sampling.py's and beam.py's loops over static buffers.

The model, the processors and the choice are one function of tensors that stay where they are, which
cuda/graph.py replays. The host never waits for a token. Every `every` tokens it fetches them, and

- cuts what came after the end of the texts;
- raises where the model's scores were not finite, or no token was left.

The choice itself is sampling.py's and beam.py's, so the texts are theirs. The differences: the
texts are the first columns of a buffer, and its length is a tensor. `left_out` names the options
that cannot be part of a graph; with these the plain loops run, and only the model is replayed.

This file does not know the model's inside, nor text.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from nanogpt2.cuda import ops as step_ops
from nanogpt2.cuda.decoder import CUDADecoder, can_run
from nanogpt2.generation.beam import (
    Beams,
    Group,
    begin,
    filler_of,
    finish,
    run_on,
    totals,
    width,
)
from nanogpt2.generation.engine import Engine, evaluating
from nanogpt2.generation.noise import CounterNoise, nothing_left
from nanogpt2.generation.processors import INF, processors_for
from nanogpt2.generation.request import Processor, Request
from nanogpt2.generation.sampling import Step, filler_token, make_noise
from nanogpt2.generation.stopping import Stopping
from nanogpt2.model import GPT

EVERY = 16  # tokens from one look of the host to the next
# processors that neither wait for the GPU nor read the texts
OF_SCORES = ("temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "renormalize_logits")
OF_TEXTS = ("repetition_penalty", "no_repeat_ngram_size")
# those that Triton's kernels of the draw compute
FUSED = (*OF_TEXTS, "temperature", "top_k", "top_p")
# a processor of (texts (N, L), their length (1,), scores (N, V))
BufferProcessor = Callable[[Tensor, Tensor, Tensor], Tensor]


def left_out(model: GPT, request: Request) -> list[str] | None:
    """Name the options that keep the choice of tokens out of the graph.

    [] where the graph holds all of a step, None where no graph runs at all.
    """
    if not (can_run(model) and request.is_left_padded):
        return None
    c, beams = request.config, request.config.num_beams > 1
    known = OF_SCORES + OF_TEXTS
    found = [name for name, _ in processors_for(request) if name not in known]
    others = {
        "noise hf": c.samples and not isinstance(make_noise(request), CounterNoise),
        "output_scores": c.output_scores,
        "stopping_criteria": request.stopping_criteria,
        "stop_strings": beams and c.stop_strings is not None,
        "prompt_lookup_num_tokens": c.prompt_lookup_num_tokens is not None,
        "penalty_alpha": c.penalty_alpha is not None,
        "num_beam_groups": c.num_beam_groups > 1,
        "force_words_ids": c.force_words_ids is not None,
        "stochastic_beams": c.stochastic_beams,
    }
    return found + [name for name, is_set in others.items() if is_set]


def describe(model: GPT, request: Request) -> str:
    """Say in one line what a CUDA graph decodes; say nothing where none runs."""
    out = left_out(model, request)
    if out is None:
        return ""
    if out:
        return f"decoding: the model is a CUDA graph; outside it: {', '.join(out)}"
    every = _every(request, EVERY)
    return f"decoding: one CUDA graph a token; the host looks every {every} token{'s'[: every - 1]}"


@torch.no_grad()
def decode(model: GPT, request: Request, every: int = EVERY) -> Iterator[Step]:
    """Yield a Step for each token, as sampling.decode does, but on the CPU and without scores."""
    engine, rows = Engine(model, request), Rows(request)
    # the host ends the texts, by copies of their tokens
    stopping = Stopping(replace(request, eos=request.eos.cpu()))
    filler, nothing = filler_token(request), torch.empty(0)
    ids = rows.ids.to("cpu", copy=True)  # (N, L)
    running = torch.ones(len(ids), dtype=torch.bool)  # (N,)
    with evaluating(model):
        while running.any():
            length = rows.length
            rows.advance(engine, _every(request, every))
            for at, tokens in enumerate(rows.fetch(engine, length), start=length):
                tokens = tokens.where(running, filler)
                ids[:, at] = tokens
                yield Step(tokens, running, nothing)
                running = running & ~stopping.ended(ids[:, : at + 1])
                if not running.any():
                    break


@torch.no_grad()
def beam_search(model: GPT, request: Request, every: int = EVERY) -> Iterator[Beams]:
    """Yield the state after every `every` tokens, as beam.beam_search does after each."""
    engine, search = Engine(model, request), Search(request)
    stopping = Stopping(request)
    with evaluating(model):
        while not search.done:
            search.advance(engine, _every(request, every), stopping)
            yield search.fetch(engine)


def _every(request: Request, every: int) -> int:
    # max_time is up at a token, not at the next look
    return 1 if request.config.max_time is not None else every


class Texts:
    """The texts in a buffer, and what each step changes: the part that rows and beams share."""

    NAME: ClassVar[str]

    def __init__(self, request: Request) -> None:
        self._request, self._eos = request, request.eos
        self._names = {name for name, _ in processors_for(request)}
        self._processors = buffer_processors(request)
        noise = make_noise(request) if request.config.samples else None
        assert noise is None or isinstance(noise, CounterNoise)
        self._noise = noise
        device, T = request.ids.device, request.prompt_length
        ids = request.ids.repeat_interleave(request.rows, dim=0)
        # int64 (N, L); 0 past the texts
        self.ids = F.pad(ids, (0, request.max_length - T))
        # int64 (2, N): the tokens of each text, and how many of them are new. Of a step all texts
        # have equally many
        self._counts = torch.tensor([[T], [0]], device=device).repeat(1, len(ids))
        self._at, self._step = self._counts[0, :1], self._counts[1, 0]
        # int32 (L + 1,): [t] is 1 if the model's scores were not finite for token t - 1, or no
        # token was left to choose
        self._faults = torch.zeros(request.max_length + 1, dtype=torch.int32, device=device)
        self.length = T  # the host's count
        self._decoder: CUDADecoder

    def advance(self, engine: Engine, most: int, stopping: Stopping | None = None) -> None:
        """Choose up to `most` tokens, but a single one where the texts must be read eagerly."""
        assert isinstance(engine.decoder, CUDADecoder)
        self._decoder = engine.decoder
        length, room = self.length, engine.room(self.length)
        reads = length == self._request.prompt_length or room <= 0
        for _ in range(1 if reads else min(most, room, self._request.max_length - length)):
            if stopping is not None and stopping.must_stop(self.length + 1):
                self.end_now()
            if reads:
                self.choose(engine.next_scores(self.ids[:, :length]))
            else:
                engine.decoder.replay(self.NAME, self._choose_from)
            self.length += 1

    def end_now(self) -> None:
        """Let the next token be the last."""

    def choose(self, scores: Tensor) -> None:
        """Choose a token for each row by its scores, float32 (N, V). Buffers only."""
        raise NotImplementedError

    def _choose_from(self, x: Tensor) -> None:
        """Choose by the last block's output, (N, C), and count the token in the cache."""
        self.choose(self._decoder.scores(x))
        self._decoder.lengths += 1

    def _note_fault(self, scores: Tensor, probabilities: Tensor | None) -> None:
        """Note at the present token whether the scores, or the draw's probabilities, are unfit."""
        fault = ~scores.amax(dim=1).isfinite().all()
        if probabilities is not None:
            fault |= probabilities.isnan().any()
        self._faults.index_copy_(0, self._at + 1, fault.int()[None])

    def without_fault(self, engine: Engine, first: int, length: int) -> Iterator[int]:
        """Yield the tokens [first, length), up to one with a fault: there raise its error."""
        for at, fault in enumerate(self._faults[first + 1 : length + 1].tolist(), start=first):
            if fault:
                # read the text anew: this raises where the scores are to blame
                engine.decoder.forget()
                engine.next_scores(self.ids[:, :at])
                raise nothing_left(at - self._request.prompt_length)
            yield at


class Rows(Texts):
    """Greedy decoding and sampling: rows that know nothing of one another."""

    NAME = "rows"

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self._filler = filler_token(request)
        # bool (N,), False in rows that an end token has ended
        self._running = torch.ones(len(self.ids), dtype=torch.bool, device=self.ids.device)
        self._failed = torch.zeros(1, dtype=torch.int32, device=self.ids.device)
        self._first = request.mask.int().argmax(dim=1).repeat_interleave(request.rows)

    @override
    def choose(self, scores: Tensor) -> None:
        raw, p = scores, None
        for process in self._processors:
            scores = process(self.ids, self._at, scores)
        if self._noise is None:
            tokens = scores.argmax(dim=1)
        else:
            p = scores.softmax(dim=1)
            tokens = self._noise.draw_unchecked(p, 1, self._step).squeeze(1)
        self._note_fault(raw, p)
        tokens = tokens.where(self._running, self._filler)
        self._running.logical_and_((tokens[:, None] != self._eos).all(dim=1))
        self.ids.index_copy_(1, self._at, tokens[:, None])
        self._decoder.tokens.copy_(tokens)
        self._counts += 1

    @override
    def _choose_from(self, x: Tensor) -> None:
        if not self._is_fused():
            super()._choose_from(x)
            return
        c, noise = self._request.config, self._noise
        options = {name: getattr(c, name) for name in (FUSED if c.samples else OF_TEXTS)}
        text = {"ids": self.ids, "first": self._first}
        text |= {"lengths": self._counts[0], "step": self._counts[1]}
        if noise is not None:
            options |= {"do_sample": True, "top_k": c.top_k or 0, "seed": noise.seed}
            text["samples"] = noise.samples
        state = {
            "running": self._running,
            "ends": self._eos if len(self._eos) else None,
            "filler": self._filler,
            "cache_lengths": self._decoder.lengths,
            "failed": self._failed,
        }
        tokens = step_ops.decode_draw(x, *self._decoder.head, options, text, state)
        self._decoder.tokens.copy_(tokens)
        # the draw has counted the token
        self._faults.index_copy_(0, self._at, self._failed)

    def _is_fused(self) -> bool:
        """Tell whether Triton's kernels choose as `choose` does."""
        names, request = self._names, self._request
        # a greedy text without a token left goes on with token 0, which the kernel does not do
        may_run_out = not request.config.samples and "no_repeat_ngram_size" in names
        runs_out = may_run_out and request.max_length > request.vocab_size
        return self._decoder.kernels == "triton" and names <= {*FUSED} and not runs_out

    def fetch(self, engine: Engine, first: int) -> Iterator[Tensor]:
        """Yield the tokens from `first` on, each int64 (N,) on the CPU. Waits for the GPU."""
        tokens = self.ids[:, first : self.length].cpu()
        for at in self.without_fault(engine, first, self.length):
            yield tokens[:, at - first]


class Search(Texts):
    """Beam search and beam sampling. A search that is done stays as it is."""

    NAME = "beams"

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        K, device = request.config.num_beams, request.ids.device
        start, new = begin(request, K), request.max_length - request.prompt_length
        B = len(request.ids)
        nothing = torch.full((B, K, new), -1, dtype=torch.int32, device=device)
        ids = self.ids.view(B, K, -1)
        self._beams = Beams(
            running=Group(ids, start.running.scores, nothing),
            finished=Group(ids.clone(), start.finished.scores, nothing.clone()),
            is_finished=start.is_finished,
            improvable=start.improvable,
        )
        self._done = torch.zeros((), dtype=torch.bool, device=device)
        self._last = torch.zeros((), dtype=torch.bool, device=device)
        self._rows = torch.arange(B * K, device=device).view(B, K)
        norms = [n**request.config.length_penalty for n in range(1, new + 1)]
        self._norms = torch.tensor(norms, dtype=torch.float32, device=device)
        self._filler = filler_of(request)
        self.done = False

    @override
    def end_now(self) -> None:
        self._last.fill_(True)

    @override
    def choose(self, scores: Tensor) -> None:
        raw, old = scores, self._beams
        scores = scores.log_softmax(dim=1)  # (B * K, V)
        for process in self._processors:
            scores = process(self.ids, self._at, scores)
        total = totals(old.running, scores)  # (B, K * V)
        places, p = self._candidates(total)
        self._note_fault(raw, p)

        at, step = self._at, self._step[None]
        V = scores.size(1)
        parents, tokens = places // V, places % V  # (B, N)
        texts = old.running.pick(parents)
        candidates = Group(
            texts.ids.index_copy(2, at, tokens[:, :, None]),
            total.gather(1, places),
            texts.beams.index_copy(2, step, self._rows.gather(1, parents).int()[:, :, None]),
        )
        ended = (tokens[:, :, None] == self._eos).any(dim=2) | self._last
        finished = Group(
            old.finished.ids.index_fill(2, at, self._filler),
            old.finished.scores,
            old.finished.beams.index_fill(2, step, -1),
        )
        new = Beams(old.running, finished, old.is_finished, old.improvable)
        norm = self._norms.index_select(0, step)
        finish(self._request, new, candidates, ended, norm)
        done = run_on(self._request, new, candidates, ended, norm)
        self._decoder.reorder(new.running.beams.index_select(2, step).flatten().long())
        self._decoder.tokens.copy_(new.running.ids.index_select(2, at).flatten())
        self._keep(new)
        self._counts += (~self._done).long()
        self._done.logical_or_(done)

    def _candidates(self, total: Tensor) -> tuple[Tensor, Tensor | None]:
        """beam.py's N continuations of each prompt, int64 (B, N), and what they were drawn by."""
        N = width(self._request, self._beams.running)
        if self._noise is None:
            return total.topk(N)[1], None
        p = total.softmax(dim=1)
        drawn = self._noise.draw_unchecked(p, N, self._step)  # (B, N), in draw order
        order = total.gather(1, drawn).sort(dim=1, descending=True).indices
        return drawn.gather(1, order), p

    def _keep(self, new: Beams) -> None:
        """Write the state into the buffers, unless the search was done before."""
        old = self._beams
        pairs = [(old.is_finished, new.is_finished), (old.improvable, new.improvable)]
        for a, b in ((old.running, new.running), (old.finished, new.finished)):
            pairs += [(a.ids, b.ids), (a.scores, b.scores), (a.beams, b.beams)]
        for buffer, value in pairs:
            buffer.copy_(torch.where(self._done, buffer, value))

    def fetch(self, engine: Engine) -> Beams:
        """Return the state of the search, cut to its length. Waits for the GPU."""
        done, length = torch.stack([self._done.long(), self._at[0]]).tolist()
        T = self._request.prompt_length
        for _ in self.without_fault(engine, T, length):
            pass
        self.done, state = bool(done), self._beams
        running, finished = (
            Group(each.ids[:, :, :length], each.scores, each.beams[:, :, : length - T])
            for each in (state.running, state.finished)
        )
        return Beams(running, finished, state.is_finished, state.improvable, self.done)


def buffer_processors(request: Request) -> list[BufferProcessor]:
    """Return a request's processors, in order, for texts in a buffer. None is in `left_out`."""
    n, first = request.config.no_repeat_ngram_size, request.mask.int().argmax(dim=1)
    of_texts: dict[str, BufferProcessor] = {
        "no_repeat_ngram_size": partial(ban_repeated_ngrams, n=n),
        "repetition_penalty": partial(
            penalise_repetition,
            penalty=request.config.repetition_penalty,
            first=first.repeat_interleave(request.rows),
        ),
    }
    chain = processors_for(request)
    return [of_texts.get(name, partial(_of_scores, process)) for name, process in chain]


def _of_scores(process: Processor, ids: Tensor, length: Tensor, scores: Tensor) -> Tensor:
    return process(ids, scores)


def ban_repeated_ngrams(ids: Tensor, length: Tensor, scores: Tensor, n: int) -> Tensor:
    """processors.ban_repeated_ngrams, for texts of `length` (1,) tokens in a buffer (N, L)."""
    L = ids.size(1)
    if n > L:
        return scores
    last = (length - (n - 1) + torch.arange(n - 1, device=ids.device)).clamp(min=0)  # (n - 1,)
    ngrams = ids.unfold(1, n, 1)  # (N, L - n + 1, n)
    repeats = (ngrams[:, :, :-1] == ids.index_select(1, last)[:, None]).all(dim=2)
    repeats &= torch.arange(n, L + 1, device=ids.device) <= length
    # the minimum with inf changes nothing
    least = torch.where(repeats, -INF, INF).to(scores.dtype)
    return scores.scatter_reduce(1, ngrams[:, :, -1], least, "amin")


def penalise_repetition(
    ids: Tensor, length: Tensor, scores: Tensor, penalty: float, first: Tensor
) -> Tensor:
    """processors.penalise_repetition, for texts of `length` (1,) tokens in a buffer (N, L)."""
    t = torch.arange(ids.size(1), device=ids.device)
    seen = (t >= first[:, None]) & (t < length)  # (N, L)
    ids = ids.where(seen, ids.index_select(1, length - 1))
    score = scores.gather(1, ids)  # (N, L)
    return scores.scatter(1, ids, torch.where(score < 0, score * penalty, score / penalty))
