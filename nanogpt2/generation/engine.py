"""One decoding step: the tokens so far -> the scores of the next token. Reads only new tokens.

This file does not know how a token is chosen.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from nanogpt2.devices import memory_of
from nanogpt2.generation.decoder import decoder_for
from nanogpt2.generation.request import Request
from nanogpt2.model import GPT


class Engine:
    """Runs a model over rows of tokens that grow at their right end: N = B prompts x rows each.

    The model reads a prompt once for all of its rows. A row longer than block_size slides: the
    engine drops its oldest tokens and reads the rest again, which leaves half a context for new
    tokens. The time of a slide depends on the row alone, not on the rest of its batch.
    """

    def __init__(self, model: GPT, request: Request, rows: int | None = None) -> None:
        """rows: those of each prompt, by default the request's."""
        self.rows = request.rows if rows is None else rows
        self.max_length = request.max_length
        self.block_size = model.config.block_size
        # bool (N, max_length), False at the prompts' padding
        mask = request.mask.repeat_interleave(self.rows, dim=0)
        new = request.max_length - request.prompt_length
        self.mask = torch.nn.functional.pad(mask, (0, new), value=True)
        self.holes = not bool(request.mask.all())
        # each row's first token within the context, and the cache's first position
        self.starts: list[int] = mask.int().argmax(dim=1).tolist()
        self.base = 0
        length = min(self.block_size, self.max_length)
        left = request.is_left_padded
        self.decoder = decoder_for(model, len(request.ids), self.rows, length, left)
        # the hidden states of the last reading: (B or N, T, C) for its T tokens
        self.hidden = torch.empty(0)

    def next_scores(self, ids: Tensor) -> Tensor:
        """Score the next token: int64 (N, T), all tokens so far -> float32 (N, V).

        Raises FloatingPointError where the model's best score is not finite.
        """
        # until the first choice, the rows of a prompt are equal, and the model reads one of them
        one = not self.decoder.forked
        is_step = self.base + self.decoder.length + 1 == ids.size(1)
        with self.decoder.pace if is_step else nullcontext():
            scores = self._scores(self._read(ids)[:, -1])  # (B, V) or (N, V)
        if one:
            self.decoder.fork()
            scores = scores.repeat_interleave(self.rows, dim=0)
        return scores

    def _read(self, ids: Tensor) -> Tensor:
        """Read the new tokens: int64 (N, T), all tokens so far -> (B or N, new, C)."""
        length = ids.size(1)
        if self.room(length) <= 0:
            self._slide(length)
        known = self.base + self.decoder.length
        rows = slice(None, None, 1 if self.decoder.forked else self.rows)
        positions, mask = self._positions_and_mask(known, length, rows)
        self.hidden = self.decoder.read(ids[rows, known:], positions, mask)
        return self.hidden

    def room(self, length: int) -> int:
        """Return how many tokens texts of this length can get before the context slides."""
        return self.base + self.block_size + 1 - length

    def _scores(self, x: Tensor) -> Tensor:
        """(R, C) -> float32 (R, V). Raises FloatingPointError as next_scores does."""
        scores = self.decoder.logits(x).float()
        if not scores.amax(dim=1).isfinite().all():
            raise FloatingPointError(
                "the model's scores are not finite numbers: are its weights damaged, or its dtype "
                "too narrow?"
            )
        return scores

    def _slide(self, length: int) -> None:
        """Drop the oldest tokens of the rows longer than the context; forget what was read."""
        start = context_start(length, self.max_length, self.block_size)
        self.starts = [s if length - s <= self.block_size else start for s in self.starts]
        for row, first in enumerate(self.starts):
            self.mask[row, :first] = False
        self.base = min(self.starts)
        self.decoder.forget()
        self.holes = self.holes or self.base < max(self.starts)

    def reorder(self, parents: Tensor) -> None:
        """Make row n the continuation of row parents[n], int64 (N,), of the same prompt."""
        self.decoder.reorder(parents)

    def _positions_and_mask(
        self, known: int, length: int, rows: slice
    ) -> tuple[Tensor | None, Tensor | None]:
        """For tokens [known, length): positions (B, T) that skip padding, and mask (B, 1, T, S).

        Both are None without padding.
        """
        if not self.holes:
            return None, None
        keys = self.mask[rows, self.base : length]  # (B, S)
        positions = (keys.cumsum(1) - 1).clamp(min=0)[:, known - self.base :]  # (B, T)
        T, S = length - known, length - self.base
        square = torch.ones(T, S, dtype=torch.bool, device=keys.device)
        # padding sees itself: attention to nothing would compute 0 / 0
        itself = square.tril(S - T).triu(S - T)
        return positions, square.tril(S - T) & (keys[:, None, None, :] | itself)


def context_start(length: int, max_length: int, block_size: int) -> int:
    """The first of `length` tokens to keep; new tokens get at most half of the context."""
    if length <= block_size:
        return 0
    return length - block_size + min(max_length - length, block_size // 2)


def check_memory(model: GPT, request: Request) -> None:
    """Raise ValueError where a request certainly needs more memory than its device has.

    Counts the memory that grows with the rows: the new tokens' keys and values, the scores and two
    copies of them; a token's id, 64 bytes in tensors and lists. A system that overcommits memory
    would kill the process without a message.
    """
    config, shape = request.config, model.config
    name, number = "num_return_sequences", request.rows
    if config.num_beams > 1:
        name, number = "num_beams", config.num_beams
    elif config.penalty_alpha is not None:
        name, number = "top_k", min(config.top_k or shape.vocab_size, shape.vocab_size)
    length = min(shape.block_size, request.max_length - request.prompt_length)
    cache = 2 * shape.n_layer * shape.n_embd * length * model.wpe.weight.element_size()
    row = cache + 3 * 4 * shape.vocab_size
    total = memory_of(request.ids.device)
    most = total // (len(request.ids) * (row + 64 * request.max_length))
    if number <= most:
        return
    if most == 0 and row + 64 * request.prompt_length < total:
        # one row alone is too long
        name = "max_length" if config.max_new_tokens is None else "max_new_tokens"
        most = (total // len(request.ids) - row) // 64
        number = getattr(config, name)
    raise ValueError(
        f"{name} must be <= {most:,} in {total / 2**30:,.0f} GiB of memory, not {number} "
        f"(a text has {length:,} tokens in the model's context)"
    )


@contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """Run the model in eval mode inside; restore each module's mode afterwards."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
