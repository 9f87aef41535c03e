"""Greedy decoding and sampling: one token for each row and step, until every row has ended.

With Triton's kernels, noise "counter" and no processors but FUSED, a single kernel draws the token.
Its noise equals CounterNoise's to the bit. So its token is the same, except where two tokens are
equally likely up to rounding; on a GPU the scores may differ in their last bit.

This file does not know the model's inside, nor text.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nanogpt2 import ops
from nanogpt2.config import GenerationConfig
from nanogpt2.generation.engine import Engine, evaluating
from nanogpt2.generation.lookup import LookupEngine
from nanogpt2.generation.noise import (
    CounterNoise,
    Noise,
    SeparateNoise,
    StreamNoise,
    nothing_left,
)
from nanogpt2.generation.processors import likeliest, processors_for
from nanogpt2.generation.request import Processor, Request
from nanogpt2.generation.stopping import Stopping
from nanogpt2.model import GPT

# the processors that the sampling kernel computes itself
FUSED = {"no_repeat_ngram_size", "temperature", "top_k"}


@dataclass(frozen=True)
class Step:
    """One token for each of N rows."""

    tokens: Tensor  # int64 (N,), the filler in rows that ended before
    running: Tensor  # bool (N,), False in rows that ended before
    scores: Tensor  # float32 (N, V), processed; empty where a CUDA graph chose the token


@torch.no_grad()
def decode(model: GPT, request: Request) -> Iterator[Step]:
    """Yield a Step for each token; N = B * num_return_sequences, a prompt's rows side by side."""
    device = request.ids.device
    ids = request.ids.repeat_interleave(request.rows, dim=0)  # (N, T)
    looks_up = request.config.prompt_lookup_num_tokens is not None and len(ids) == 1
    engine = (LookupEngine if looks_up else Engine)(model, request)
    stopping = Stopping(request)
    choose = chooser(model, request)
    history: list[Tensor] = []
    running = torch.ones(len(ids), dtype=torch.bool, device=device)  # (N,)
    filler = torch.tensor(filler_token(request), device=device)
    with evaluating(model):
        while running.any():
            step = ids.size(1) - request.prompt_length
            tokens, scores = choose(ids, engine.next_scores(ids), step)  # (N,), (N, V)
            tokens = tokens.where(running, filler)
            ids = torch.cat([ids, tokens[:, None]], dim=1)
            yield Step(tokens, running, scores)
            if request.config.output_scores:
                history.append(scores)
            running = running & ~stopping.ended(ids, history)


def chooser(model: GPT, request: Request) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """Return the function (ids (N, T), scores (N, V), step) -> tokens (N,), processed scores."""
    config, chain, noise = request.config, processors_for(request), make_noise(request)
    fuses = model.kernels == "triton" and {name for name, _ in chain} <= FUSED
    if fuses and config.samples and isinstance(noise, CounterNoise):
        return partial(_draw_fused, config, noise)
    return partial(_choose, config, noise, [process for _, process in chain])


def _choose(
    config: GenerationConfig,
    noise: Noise,
    chain: list[Processor],
    ids: Tensor,
    scores: Tensor,
    step: int,
) -> tuple[Tensor, Tensor]:
    for process in chain:
        scores = process(ids, scores)
    if config.samples:
        # ended rows draw as well, as in transformers' random stream
        return noise.draw(scores.softmax(dim=1), 1, step).squeeze(1), scores
    return likeliest(scores), scores


def _draw_fused(
    config: GenerationConfig, noise: CounterNoise, ids: Tensor, scores: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    tokens, scores = ops.sample(
        scores,
        ids,
        noise.seed,
        noise.samples,
        step,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        temperature=config.temperature,
        top_k=config.top_k or 0,
    )
    if (tokens < 0).any():
        raise nothing_left(step)
    return tokens, scores


def make_noise(request: Request) -> Noise:
    """Make the source of random numbers that a request asks for."""
    config, device, seeds = request.config, request.ids.device, request.seeds
    if config.noise == "hf" or config.seed is None:
        if seeds is None:
            return StreamNoise(config.seed, device)
        return SeparateNoise([StreamNoise(seed, device) for seed in seeds])
    samples = torch.arange(config.first_sample, config.first_sample + request.rows, device=device)
    if config.num_beams > 1:
        # the beams of a prompt draw together, as a single row
        samples = samples[:1]
    row_seeds = None if seeds is None else [seed for seed in seeds for _ in samples]
    return CounterNoise(config.seed, samples.repeat(len(request.ids)), row_seeds)


def filler_token(request: Request) -> int:
    """The token that pads rows after their end."""
    if request.pad is not None:
        return request.pad
    return int(request.eos[0]) if len(request.eos) else 0
