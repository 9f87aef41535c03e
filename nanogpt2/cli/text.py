"""Token ids -> the text a person sees, while it is made: whole characters, stop strings cut off.

This file does not know how tokens are chosen.
"""

from collections.abc import Sequence
from typing import Any

from nanogpt2.tokenizer import Tokenizer


class Completion:
    """One continuation while it grows: `text` is what is certain so far.

    Characters whose bytes are incomplete are held back, and so is what may turn out to be the
    beginning of a stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: str, ends: Sequence[int], stops: Sequence[str] = ()
    ) -> None:
        """ends: the token ids that end a text; stops: the strings that do."""
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason = "length"
        self._ends, self._stops = frozenset(ends), stops
        self._stream = tokenizer.stream()
        self._held = ""
        self._is_cut = False
        # a stop string may begin in the prompt
        self._before = prompt[-max(map(len, stops), default=0) :] if stops else ""

    def add(self, token: int) -> str:
        """Take the next token and return the text that is now certain."""
        self.token_ids.append(token)
        if token in self._ends:
            self.finish_reason = "stop"
            return ""
        self._held += self._stream.feed([token])
        if self._cut():
            return ""
        return self._release(len(self._held) - self._doubtful())

    def finish(self) -> str:
        """Return what was held back: no more tokens will come."""
        if not self._is_cut:
            self._held += self._stream.finish()
            self._cut()
        return self._release(len(self._held))

    def _cut(self) -> bool:
        """Cut off at the first stop string, if there is one."""
        seen = self._before + self.text + self._held
        starts = [seen.find(stop, self._searchable(stop)) for stop in self._stops]
        starts = [start for start in starts if start >= 0]
        if not starts:
            return False
        certain = len(self._before) + len(self.text)
        self._held = seen[certain : max(certain, min(starts))]
        self.finish_reason, self._is_cut = "stop", True
        return True

    def _searchable(self, stop: str) -> int:
        """A stop string that lies in the prompt alone ends nothing."""
        return max(0, len(self._before) - len(stop) + 1)

    def _doubtful(self) -> int:
        """How many of the held characters may begin a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _release(self, size: int) -> str:
        piece, self._held = self._held[:size], self._held[size:]
        self.text += piece
        return piece


def as_json(
    prompt: str, index: int, completion: Completion, score: float | None, seed: int | None
) -> dict[str, Any]:
    """The object that --json prints for a text."""
    return {
        "prompt": prompt,
        "index": index,
        "text": prompt + completion.text,
        "completion": completion.text,
        "token_ids": completion.token_ids,
        "score": score,
        "finish_reason": completion.finish_reason,
        "seed": seed,
    }
