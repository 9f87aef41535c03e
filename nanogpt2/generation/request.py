"""A prompt with its options, checked: all that decoding needs to know about its task.

This file does not know how tokens are scored or chosen.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanogpt2.config import FROM_CHECKPOINT, GenerationConfig, GPTConfig
from nanogpt2.config.flags import show
from nanogpt2.tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 20
MOST_DRAWN = 2**24
Processor = Callable[[Tensor, Tensor], Tensor]
PrefixAllowedTokens = Callable[[int, Tensor], list[int]]
# takes a processor's name and the scores after it
Watcher = Callable[[str, Tensor], None]
StoppingCriterion = Callable[[Tensor, tuple[Tensor, ...] | None], Tensor | bool]


@dataclass(frozen=True)
class Request:
    """The prompts and how to continue them. Axes: B prompts, T tokens in the longest."""

    config: GenerationConfig
    ids: Tensor  # int64 (B, T), T >= 1
    mask: Tensor  # bool (B, T), False at padding
    eos: Tensor  # int64 (E,), the ids that end a text
    pad: int | None
    max_length: int
    vocab_size: int
    rows: int  # decoded side by side for each prompt
    tokenizer: Tokenizer | None = None
    user_processors: tuple[Processor, ...] = ()
    prefix_allowed_tokens: PrefixAllowedTokens | None = None
    stopping_criteria: tuple[StoppingCriterion, ...] = ()
    seeds: tuple[int, ...] | None = None  # one for each prompt; by default config.seed for all
    watch: Watcher | None = None  # sees the scores of each step, raw and after each processor

    @property
    def prompt_length(self) -> int:
        """T, padding included."""
        return self.ids.size(1)


def prepare(
    model_config: GPTConfig,
    device: torch.device,
    config: GenerationConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    tokenizer: Tokenizer | None = None,
    user_processors: tuple[Processor, ...] = (),
    prefix_allowed_tokens: PrefixAllowedTokens | None = None,
    stopping_criteria: tuple[StoppingCriterion, ...] = (),
) -> Request:
    """Check prompts, whole numbers (B, T), and fill in the checkpoint's end and pad tokens.

    Raises ValueError for a wrong shape, an id outside the vocabulary, a prompt of max_length.
    """
    ids = _start_ids(model_config, input_ids).to(device)
    eos = (
        model_config.eos_token_id if config.eos_token_id == FROM_CHECKPOINT else config.eos_token_id
    )
    eos = eos if isinstance(eos, tuple) else () if eos is None else (eos,)
    pad = model_config.pad_token_id if config.pad_token_id is None else config.pad_token_id
    if config.stop_strings is not None and tokenizer is None:
        raise ValueError("stop_strings must come with tokenizer=, which turns ids into text")
    if not all(map(callable, stopping_criteria)):
        raise ValueError("stopping_criteria must be functions of (ids, scores)")
    V = model_config.vocab_size
    if config.eos_token_id != FROM_CHECKPOINT and any(i >= V for i in eos):
        raise ValueError(f"eos_token_id must be below {V}, not {eos}")
    if pad is not None and pad >= V:
        raise ValueError(f"pad_token_id must be below {V}, not {pad}")
    _check_draw(config, V)
    mask = _prompt_mask(ids, attention_mask, eos, pad)
    if not mask[:, -1].all():
        warnings.warn(
            "a prompt ends with padding, which the text would continue: pad on the left",
            stacklevel=3,
        )
    return Request(
        config=config,
        ids=ids,
        mask=mask,
        eos=torch.tensor(eos, dtype=torch.int64, device=device),
        pad=pad,
        max_length=_max_length(config, ids.size(1), model_config.block_size),
        vocab_size=V,
        rows=config.num_beams if config.num_beams > 1 else config.num_return_sequences,
        tokenizer=tokenizer,
        user_processors=user_processors,
        prefix_allowed_tokens=prefix_allowed_tokens,
        stopping_criteria=stopping_criteria,
    )


def encode_prompts(
    prompts: Any, attention_mask: Tensor | None, tokenizer: Tokenizer | None
) -> tuple[Tensor, Tensor]:
    """Encode a text or several: ids, int64 (B, T), left-padded, and their mask.

    Raises TypeError for anything else than texts, ValueError without a tokenizer.
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not (isinstance(texts, Sequence) and texts and all(isinstance(t, str) for t in texts)):
        raise TypeError(f"input_ids must be a tensor, a text or texts, not {show(prompts)}")
    if tokenizer is None:
        raise ValueError("input_ids must come with tokenizer=, which encodes the text")
    if attention_mask is not None:
        raise ValueError("attention_mask must be left out with texts")
    rows = [tokenizer.encode(text) for text in texts]
    longest = max(map(len, rows))
    if min(map(len, rows)) == 0 < longest:
        raise ValueError("input_ids must not mix empty texts with others")
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return ids.long(), mask.long()


def _start_ids(model_config: GPTConfig, ids: Tensor) -> Tensor:
    """Check (B, T) and return int64; an empty prompt becomes the model's bos_token_id."""
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.dim() != 2 or len(ids) == 0 or not whole:
        raise ValueError(
            f"input_ids must be whole numbers (B, T) with B >= 1, not {ids.dtype} "
            f"{tuple(ids.shape)}"
        )
    ids = ids.long()
    if ids.numel() == 0:
        if model_config.bos_token_id is None:
            raise ValueError("an empty prompt needs a model with a bos_token_id; this one has none")
        return ids.new_full((len(ids), 1), model_config.bos_token_id)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= model_config.vocab_size:
        raise ValueError(
            f"token id {low if low < 0 else high} is outside the vocabulary of "
            f"{model_config.vocab_size}"
        )
    return ids


def _prompt_mask(
    ids: Tensor, attention_mask: Tensor | None, eos: tuple[int, ...], pad: int | None
) -> Tensor:
    """Bool (B, T), False at padding: without a mask, the pad tokens, unless a pad ends texts."""
    if attention_mask is not None and (given := torch.as_tensor(attention_mask)).numel():
        if given.shape != ids.shape:
            raise ValueError(
                f"attention_mask must be {tuple(ids.shape)} as input_ids, not {tuple(given.shape)}"
            )
        return given.to(ids.device).bool()
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


def _check_draw(config: GenerationConfig, vocab_size: int) -> None:
    """Raise ValueError where beams draw from more continuations than torch.multinomial can."""
    drawn = config.samples and config.noise == "hf" and not config.stochastic_beams
    most = max(1, MOST_DRAWN // vocab_size)
    if drawn and config.num_beams > most:
        raise ValueError(
            f"num_beams must be <= {most} with do_sample (torch.multinomial draws from 2^24 "
            f"continuations at most), not {config.num_beams}; noise counter has no such limit"
        )


def check_least(request: Request) -> None:
    """Raise ValueError where the least length of a text is above its greatest.

    generate() accepts this, as transformers does with a warning, and stops at the greatest.
    """
    config, most = request.config, request.max_length
    if config.min_new_tokens is not None:
        name, least, most = "min_new_tokens", config.min_new_tokens, most - request.prompt_length
    else:
        name, least = "min_length", config.min_length
    if least > most:
        raise ValueError(f"{name} must be <= {most}, the most tokens of this text, not {least}")
