"""When a text ends: an end token, its length, a string, the clock.

A string ends a text at the token that completes the string; the text is cut at the string's start.
Only this file decides where. It compares bytes, because a string may begin within one token and end
within another, and a token may hold half a character. This file does not know how tokens are
chosen.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from nanogpt2.generation.request import Request
from nanogpt2.tokenizer import Tokenizer


class Stopping:
    """Tells, after each token, which rows have ended."""

    def __init__(self, request: Request) -> None:
        """Raise ValueError for invalid stop strings."""
        self._eos, self._criteria = request.eos, request.stopping_criteria
        self._max_length = request.max_length
        self._deadline = None
        if request.config.max_time is not None:
            self._deadline = time.monotonic() + request.config.max_time
        self._strings = None
        if request.config.stop_strings is not None and request.tokenizer is not None:
            self._strings = StopStrings(request.config.stop_strings, request.tokenizer)

    def ended(self, ids: Tensor, scores: Sequence[Tensor] = ()) -> Tensor:
        """Int64 (N, T), all tokens so far -> bool (N,): the last one ended the row.

        scores: those of every step, where asked for.
        """
        ended = self.ended_by_token(ids, scores)
        return torch.ones_like(ended) if self.must_stop(ids.size(1)) else ended

    def ended_by_token(self, ids: Tensor, scores: Sequence[Tensor] = ()) -> Tensor:
        """Int64 (N, T) -> bool (N,): the last token ends the row, whatever its length."""
        ended = torch.isin(ids[:, -1], self._eos)
        if self._strings is not None:
            ended |= self._strings.ended(ids)
        for criterion in self._criteria:
            found = torch.as_tensor(criterion(ids, tuple(scores) or None), device=ids.device)
            if found.shape not in ((), ended.shape):
                raise ValueError(
                    f"stopping_criteria must return a bool, or one for each of {len(ids)} rows, "
                    f"not a tensor {tuple(found.shape)}"
                )
            ended = ended | found.bool()
        return ended

    def must_stop(self, length: int) -> bool:
        """Tell whether all rows, of this length, must end now."""
        out_of_time = self._deadline is not None and time.monotonic() > self._deadline
        return length >= self._max_length or out_of_time


class StopStrings:
    """Ends a row whose last token completes one of the strings, anywhere within the token."""

    def __init__(self, strings: str | list[str], tokenizer: Tokenizer) -> None:
        """Raise ValueError for an empty string, or for anything but strings."""
        self._strings = stop_bytes(strings)
        self._longest = max(map(len, self._strings))
        self._tokenizer = tokenizer
        # only a token that holds a string's last byte can complete the string
        last_bytes = {string[-1] for string in self._strings}
        self._may_end = torch.tensor(
            [bool(last_bytes & {*tokenizer.decode_bytes([i])}) for i in range(tokenizer.vocab_size)]
        )

    def ended(self, ids: Tensor) -> Tensor:
        """Int64 (N, T) -> bool (N,)."""
        ended = self._may_end.to(ids.device)[ids[:, -1]]
        for row in ended.nonzero().flatten().tolist():
            # a token has at least one byte, so these tokens hold the longest string
            last_ids = ids[row, -self._longest - 1 :].tolist()
            last = len(self._tokenizer.decode_bytes(last_ids[-1:]))
            text = self._tokenizer.decode_bytes(last_ids)
            ended[row] = stop_start(text, last, self._strings) is not None
        return ended


def stop_bytes(strings: str | Sequence[str]) -> list[bytes]:
    """Encode the stop strings as the bytes to search for.

    Raises ValueError for an empty string, for anything but strings, for half a surrogate pair.
    """
    listed = [strings] if isinstance(strings, str) else strings
    texts = isinstance(listed, list | tuple) and all(isinstance(each, str) for each in listed)
    if not texts or not all(listed) or not listed:
        raise ValueError(
            f"stop_strings must be a text or a list of texts, none empty, not {strings!r}"
        )
    try:
        return [each.encode("utf-8") for each in listed]
    except UnicodeEncodeError as error:
        raise ValueError(
            f"stop_strings must be text that UTF-8 can encode, not {error.object!r}"
        ) from None


def stop_start(text: bytes, last: int, strings: Sequence[bytes]) -> int | None:
    """Find the first start of a string that ends within the `last` bytes of a text, if any."""
    starts = [text.find(each, max(0, len(text) - last - len(each) + 1)) for each in strings]
    return min((start for start in starts if start >= 0), default=None)
