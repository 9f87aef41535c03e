"""generate(): from a prompt to its continuations, with transformers' options and results.

The steps and who does them: engine.py scores the next token, processors.py changes the scores,
sampling.py draws from them. None of it knows training or text.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanogpt2.config import GenerationConfig
from nanogpt2.generation.sampling import decode, start_ids
from nanogpt2.model import GPT


@dataclass(frozen=True)
class GenerationOutput:
    """What generate() returns.

    sequences: int64 (N, T), prompts included, on the prompts' device; rows that ended earlier are
    filled with the pad token. N = B * num_return_sequences, the texts of one prompt side by side.
    sequences_scores: float32 (N,) for beams, else None.
    """

    sequences: Tensor
    sequences_scores: Tensor | None = None


def generate(
    model: GPT, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> GenerationOutput:
    """Continue prompts, token for token as transformers' `generate` does.

    input_ids: int64 (B, T), left-padded where lengths differ; T = 0 starts from the model's
    bos_token_id. attention_mask: (B, T), 0 at padding; None infers it as transformers does.
    options: the fields of GenerationConfig.

    The model runs in eval mode and is left as it was. Draws come from torch's global generator, or
    from one of their own where `seed` is given; both give transformers' tokens for the same seed.
    Raises ValueError for an unusable prompt, TypeError for an option that does not exist.
    """
    config = GenerationConfig(**options)
    ids = start_ids(model, input_ids)
    columns = [ids.repeat_interleave(config.num_return_sequences, dim=0)]
    columns += [
        tokens[:, None].to(ids.device) for tokens in decode(model, ids, attention_mask, config)
    ]
    return GenerationOutput(torch.cat(columns, dim=1))
