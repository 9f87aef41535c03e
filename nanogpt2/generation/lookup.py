"""Prompt lookup: several tokens for one reading of the weights, the same tokens as without.

A text often repeats itself: a name, a phrase, a line of code. So its last tokens are looked up in
what came before, and what followed there is guessed to follow here. The model reads the guess
together with the last token, which takes a little longer than that token alone where the time is
that of reading the weights, and so scores each place of the guess at once.

A guess decides nothing. The scores of a place are handed out once the tokens before it have been
chosen, by whatever chooses; where another token is chosen, what was read of the guess is forgotten.
Processors, draws and ends are those of plain decoding; only rounding could tell the difference.

Sources: Saxena 2023, "Prompt Lookup Decoding"; transformers' option prompt_lookup_num_tokens. This
file does not know how tokens are chosen.
"""

import torch
from torch import Tensor

from nanogpt2.generation.engine import Engine
from nanogpt2.generation.request import Request
from nanogpt2.model import GPT

LENGTHS = (3, 2)  # tokens that are looked up, the longest match first


class LookupEngine(Engine):
    """An Engine for one row that reads ahead where the text seems to repeat itself."""

    def __init__(self, model: GPT, request: Request) -> None:
        super().__init__(model, request)
        self._most = request.config.prompt_lookup_num_tokens or 0
        # of the tokens guessed and not chosen yet: they themselves, and what follows each (1, V)
        self._guess: list[int] = []
        self._ahead: list[Tensor] = []

    def next_scores(self, ids: Tensor) -> Tensor:
        """See Engine: int64 (1, T) -> float32 (1, V)."""
        if self._guess and int(ids[0, -1]) == self._guess[0]:
            self._guess.pop(0)
            return self._ahead.pop(0)
        self.decoder.drop(len(self._guess))
        length = ids.size(1)
        # the last token of all is never read, and a guess is not worth a slide
        room = min(self._most, self.max_length - 1 - length, self.base + self.block_size - length)
        guess = look_up(ids[0], room)
        x = self._read(torch.cat([ids, guess[None]], dim=1))  # (1, new ones, C)
        scores, *self._ahead = self._scores(x[0, -1 - len(guess) :]).split(1)  # each (1, V)
        self._guess = guess.tolist()
        return scores


def look_up(ids: Tensor, most: int) -> Tensor:
    """Guess `most` tokens after int64 (T,): what followed the last ones where they stood before.

    Where that reaches the text's end it begins again, as a text would that turns in a circle. Empty
    where the last tokens are new.
    """
    for count in LENGTHS:
        if most > 0 and len(ids) > count:
            # the last ones themselves are not among them
            places = (ids[:-1].unfold(0, count, 1) == ids[-count:]).all(dim=1).nonzero()
            if len(places):
                followed = ids[int(places[-1]) + count :]
                return followed.repeat(-(-most // len(followed)))[:most]
    return ids[:0]
