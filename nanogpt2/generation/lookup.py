"""Prompt lookup: several tokens for one reading of the weights, the same tokens as without.

A text often repeats itself: a name, a phrase, a line of code. So this engine looks up the last
tokens in the text before them, and guesses that the same tokens follow again. The model reads the
guess together with the last token and scores every position of the guess at once. Where reading the
weights takes most of the time, this takes little longer than reading the last token alone.

A guess decides nothing. The engine returns the scores of a position only after the tokens before it
were chosen as usual. Where the choice differs from the guess, the engine forgets the rest of the
guess. Processors, draws and ends are those of plain decoding; only rounding can differ.

Sources: Saxena 2023, "Prompt Lookup Decoding"; transformers' option prompt_lookup_num_tokens. This
file does not know how tokens are chosen.
"""

import torch
from torch import Tensor
from typing_extensions import override

from nanogpt2.generation.engine import Engine
from nanogpt2.generation.request import Request
from nanogpt2.model import GPT

LENGTHS = (3, 2)  # tokens to look up, the longest match first


class LookupEngine(Engine):
    """An Engine for one row that reads ahead where the text repeats itself."""

    def __init__(self, model: GPT, request: Request) -> None:
        super().__init__(model, request)
        self._most = request.config.prompt_lookup_num_tokens or 0
        # guessed tokens not chosen yet, and the scores (1, V) of the token after each
        self._guess: list[int] = []
        self._ahead: list[Tensor] = []

    @override
    def next_scores(self, ids: Tensor) -> Tensor:
        if self._guess and int(ids[0, -1]) == self._guess[0]:
            self._guess.pop(0)
            return self._ahead.pop(0)
        self.decoder.drop(len(self._guess))
        length = ids.size(1)
        # the text's very last token is never read, and a guess must not cause a slide
        count = min(self._most, self.max_length - 1 - length, self.base + self.block_size - length)
        guess = look_up(ids[0], count)
        x = self._read(torch.cat([ids, guess[None]], dim=1))  # (1, new, C)
        scores, *self._ahead = self._scores(x[0, -1 - len(guess) :]).split(1)  # each (1, V)
        self._guess = guess.tolist()
        return scores


def look_up(ids: Tensor, most: int) -> Tensor:
    """Guess `most` tokens after int64 (T,): those that followed an earlier copy of the last tokens.

    A guess that reaches the text's end starts over, as a text that repeats itself does. The guess
    is empty where the last tokens have no earlier copy.
    """
    for count in LENGTHS:
        if most > 0 and len(ids) > count:
            # without the last token, so that the text's end does not match itself
            places = (ids[:-1].unfold(0, count, 1) == ids[-count:]).all(dim=1).nonzero()
            if len(places):
                followed = ids[int(places[-1]) + count :]
                return followed.repeat(-(-most // len(followed)))[:most]
    return ids[:0]
