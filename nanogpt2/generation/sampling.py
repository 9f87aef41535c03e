"""Greedy decoding and sampling: one token a row and step, until every row has ended.

This file does not know the model's inside, nor text.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanogpt2.config import FROM_CHECKPOINT, GenerationConfig
from nanogpt2.generation.engine import Engine
from nanogpt2.generation.processors import processors_for
from nanogpt2.model import GPT

DEFAULT_NEW_TOKENS = 20


@torch.no_grad()
def decode(
    model: GPT, input_ids: Tensor, attention_mask: Tensor | None, config: GenerationConfig
) -> Iterator[Tensor]:
    """Yield the next token of every row, int64 (N,), step by step, N = B * num_return_sequences.

    Arguments and errors are generate()'s, but that T >= 1.
    """
    device = model.wte.weight.device
    eos, pad = special_ids(model, config)
    ids = input_ids.to(device)
    mask = _prompt_mask(ids, attention_mask, eos, pad)
    max_length = _max_length(config, ids.size(1), model.config.block_size)
    engine = Engine(model, mask, max_length, config.num_return_sequences)
    ids = ids.repeat_interleave(config.num_return_sequences, dim=0)  # (N, T)
    processors = processors_for(config, mask.repeat_interleave(config.num_return_sequences, dim=0))
    generator = None
    if config.seed is not None:
        generator = torch.Generator(device).manual_seed(config.seed)
    was_training = model.training
    model.eval()
    try:
        running = torch.ones(len(ids), dtype=torch.bool, device=device)  # (N,)
        stops = torch.tensor(eos, dtype=torch.int64, device=device)
        pad = pad if pad is not None else eos[0] if eos else 0
        filler = torch.tensor(pad, device=device)
        while ids.size(1) < max_length and running.any():
            scores = engine.next_scores(ids)  # (N, V)
            for process in processors:
                scores = process(ids, scores)
            tokens = _choose(scores, config.samples, generator).where(running, filler)  # (N,)
            running &= ~torch.isin(tokens, stops)
            ids = torch.cat([ids, tokens[:, None]], dim=1)
            yield tokens
    finally:
        model.train(was_training)


def _choose(scores: Tensor, samples: bool, generator: torch.Generator | None) -> Tensor:
    if not samples:
        return scores.argmax(dim=1)
    # rows that ended draw too: transformers' random stream counts them
    return torch.multinomial(scores.softmax(dim=1), 1, generator=generator).squeeze(1)


def _prompt_mask(
    ids: Tensor, attention_mask: Tensor | None, eos: list[int], pad: int | None
) -> Tensor:
    """Bool (B, T), False at padding. Pads are told from the ids only where no pad ends a text."""
    if attention_mask is not None and attention_mask.numel():
        if attention_mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must be {tuple(ids.shape)} as input_ids, "
                f"not {tuple(attention_mask.shape)}"
            )
        return attention_mask.to(ids.device).bool()
    if pad is not None and pad not in eos:
        return ids != pad
    return torch.ones_like(ids, dtype=torch.bool)


def _max_length(config: GenerationConfig, length: int, block_size: int) -> int:
    if config.max_new_tokens is not None:
        return length + config.max_new_tokens
    if config.max_length is None:
        return max(length + 1, min(length + DEFAULT_NEW_TOKENS, block_size))
    if config.max_length <= length:
        raise ValueError(f"max_length must be > {length}, the prompt's, not {config.max_length}")
    return config.max_length


def start_ids(model: GPT, input_ids: Tensor) -> Tensor:
    """Return int64 (B, T) with T >= 1: an empty prompt becomes the model's bos_token_id.

    Raises ValueError for a wrong shape or dtype, and for an id outside the vocabulary.
    """
    if input_ids.dim() != 2 or len(input_ids) == 0 or input_ids.dtype != torch.int64:
        shape, dtype = tuple(input_ids.shape), input_ids.dtype
        raise ValueError(f"input_ids must be int64 (B, T) with B >= 1, not {dtype} {shape}")
    if input_ids.numel() == 0:
        bos = model.config.bos_token_id
        if bos is None:
            raise ValueError("an empty prompt needs a model with a bos_token_id; this one has none")
        return input_ids.new_full((len(input_ids), 1), bos)
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= model.config.vocab_size:
        outside = low if low < 0 else high
        raise ValueError(
            f"token id {outside} is outside the vocabulary of {model.config.vocab_size}"
        )
    return input_ids


def special_ids(model: GPT, config: GenerationConfig) -> tuple[list[int], int | None]:
    """Return the ids that end a row and the one that fills it up; left out, the checkpoint's."""
    eos = config.eos_token_id
    if eos == FROM_CHECKPOINT:
        eos = model.config.eos_token_id
    pad = model.config.pad_token_id if config.pad_token_id is None else config.pad_token_id
    return [*eos] if isinstance(eos, tuple) else [] if eos is None else [int(eos)], pad
