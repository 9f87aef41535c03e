"""Greedy decoding and sampling: one token a row and step, until every row has ended.

This file does not know the model's inside, nor text.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nanogpt2.generation.engine import Engine, evaluating
from nanogpt2.generation.noise import CounterNoise, Noise, StreamNoise
from nanogpt2.generation.processors import processors_for
from nanogpt2.generation.request import Request
from nanogpt2.generation.stopping import Stopping
from nanogpt2.model import GPT


@dataclass(frozen=True)
class Step:
    """One token for each of N rows."""

    tokens: Tensor  # int64 (N,), the filler in rows that had ended before
    running: Tensor  # bool (N,), False in rows that had ended before
    scores: Tensor  # float32 (N, V), processed


@torch.no_grad()
def decode(model: GPT, request: Request) -> Iterator[Step]:
    """Yield step after step; N = B * num_return_sequences, the rows of a prompt side by side."""
    config, device = request.config, request.ids.device
    engine, stopping = Engine(model, request), Stopping(request)
    chain = [process for _, process in processors_for(request)]
    noise = make_noise(request)
    ids = request.ids.repeat_interleave(request.rows, dim=0)  # (N, T)
    running = torch.ones(len(ids), dtype=torch.bool, device=device)  # (N,)
    filler = torch.tensor(filler_token(request), device=device)
    with evaluating(model):
        while running.any():
            scores = engine.next_scores(ids)  # (N, V)
            for process in chain:
                scores = process(ids, scores)
            if config.samples:
                # rows that ended draw too: transformers' random stream counts them
                step = ids.size(1) - request.prompt_length
                tokens = noise.draw(scores.softmax(dim=1), 1, step).squeeze(1)  # (N,)
            else:
                tokens = scores.argmax(dim=1)  # (N,)
            tokens = tokens.where(running, filler)
            ids = torch.cat([ids, tokens[:, None]], dim=1)
            yield Step(tokens, running, scores)
            running = running & ~stopping.ended(ids)


def make_noise(request: Request) -> Noise:
    """The source of chance that a request asks for."""
    config, device = request.config, request.ids.device
    if config.noise == "hf" or config.seed is None:
        return StreamNoise(config.seed, device)
    samples = torch.arange(config.first_sample, config.first_sample + request.rows, device=device)
    if config.num_beams > 1:
        # the beams of a prompt draw together, as one row
        samples = samples[:1]
    return CounterNoise(config.seed, samples.repeat(len(request.ids)))


def filler_token(request: Request) -> int:
    """What rows that ended are filled up with."""
    if request.pad is not None:
        return request.pad
    return int(request.eos[0]) if len(request.eos) else 0
