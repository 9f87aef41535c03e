"""One decoding step: the tokens so far -> the scores of the next one, computing only what is new.

This file does not know how a token is chosen.
"""

import torch
from torch import Tensor

from nanogpt2.model import GPT


class Engine:
    """Runs a model over rows of tokens that grow at their right end.

    A context longer than block_size slides: its oldest tokens are dropped, and the rest is read
    again, with room for half a context of new ones.
    """

    def __init__(
        self, model: GPT, attention_mask: Tensor, max_length: int, num_return_sequences: int
    ) -> None:
        """attention_mask: bool (B, T), False at the prompts' padding, which is on the left."""
        self.model = model
        self.max_length = max_length
        self.block_size = model.config.block_size
        self.returns = num_return_sequences
        # padding of prompts, then all the tokens to come: bool (N, max_length)
        pads = max_length - attention_mask.size(1)
        mask = attention_mask.repeat_interleave(num_return_sequences, dim=0)
        self.mask = torch.nn.functional.pad(mask, (0, pads), value=True)
        self.padded = not bool(attention_mask.all())
        self.cache = model.new_cache(len(attention_mask), min(self.block_size, max_length))
        self.start = 0  # the first token that is still in the context

    def next_scores(self, ids: Tensor) -> Tensor:
        """Score what follows: int64 (N, T), all tokens so far -> float32 (N, V)."""
        length = ids.size(1)
        if length - self.start > self.block_size:
            self.start = context_start(length, self.max_length, self.block_size)
            self.cache.length = 0
        known = self.start + self.cache.length
        # the rows of one prompt are the same until the first token is drawn: it is read once
        shared = self.cache.batch_size < len(ids)
        rows = slice(None, None, self.returns if shared else 1)
        positions, mask = self._positions_and_mask(known, length, rows)
        x = self.model.hidden_states(ids[rows, known:], positions, mask, self.cache)
        scores = self.model.logits(x[:, -1]).float()  # (B, V) or (N, V)
        if shared:
            self.cache.repeat_interleave(self.returns)
            scores = scores.repeat_interleave(self.returns, dim=0)
        return scores

    def _positions_and_mask(
        self, known: int, length: int, rows: slice
    ) -> tuple[Tensor | None, Tensor | None]:
        """For tokens [known, length): positions (B, T) that skip padding, and mask (B, 1, T, S)."""
        if not self.padded:
            return None, None
        keys = self.mask[rows, self.start : length]  # (B, S)
        positions = (keys.cumsum(1) - 1).clamp(min=0)[:, known - self.start :]  # (B, T)
        T, S = length - known, length - self.start
        square = torch.ones(T, S, dtype=torch.bool, device=keys.device)
        # padding sees itself: a row of attention that is masked whole would be 0 / 0
        itself = square.tril(S - T).triu(S - T)
        return positions, square.tril(S - T) & (keys[:, None, None, :] | itself)


def context_start(length: int, max_length: int, block_size: int) -> int:
    """The first of `length` tokens that a model still sees, with room for the tokens to come."""
    if length <= block_size:
        return 0
    return length - block_size + min(max_length - length, block_size // 2)
