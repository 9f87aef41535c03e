"""The lesson: GPT-2 writes one token after the other, greedily or by chance.

Each step reads only the new token: the cache keeps the keys and values of all tokens before it.
`generate` of this package gives the same tokens for the same seed. It adds transformers' options,
padding, beams, end tokens and texts longer than the context, which this file does not know.
"""

import torch
from torch import Tensor

from nanogpt2.model import GPT


@torch.no_grad()
def plain_generate(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue texts of equal length: int64 (B, T) -> (B, T + max_new_tokens).

    temperature: 0 is greedy. top_k: draw from the k likeliest tokens, by default from all.
    generator: by default torch's global one. The model must be in eval mode.
    Raises ValueError where the model would read more than block_size tokens.
    """
    cache = model.new_cache(len(ids), max_length=ids.size(1) + max_new_tokens)
    new = ids  # (B, T), then (B, 1)
    for _ in range(max_new_tokens):
        x = model.hidden_states(new, cache=cache)[:, -1]  # (B, C)
        scores = model.logits(x).float()  # (B, V)
        if temperature == 0:
            new = scores.argmax(dim=1, keepdim=True)  # (B, 1)
        else:
            scores = scores / temperature
            if top_k is not None:
                kth = scores.topk(min(top_k, scores.size(1)), dim=1).values[:, -1:]  # (B, 1)
                scores = scores.masked_fill(scores < kth, -torch.inf)
            new = torch.multinomial(scores.softmax(dim=1), 1, generator=generator)  # (B, 1)
        ids = torch.cat([ids, new], dim=1)
    return ids
