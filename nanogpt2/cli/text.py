"""Token ids -> the text on the screen, while decoding: whole characters, stop strings cut off.

This file does not know how tokens are chosen.
"""

import codecs
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nanogpt2 import terminal
from nanogpt2.cpu.decoder import can_run
from nanogpt2.cpu.prepared import prepared_for
from nanogpt2.generation.stopping import stop_bytes, stop_start
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer


class Completion:
    """One continuation while it grows; `text` holds the characters that are final.

    Bytes of an incomplete character are held back. So are bytes that may begin a stop string.
    Tokens after the end are ignored.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        ends: Sequence[int],
        stops: str | Sequence[str] = (),
        continues: bool = False,
    ) -> None:
        """ends: token ids that end the text; stops: strings that end it.

        continues: the first bytes may complete a character of the prompt.
        """
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason = "length"
        self._tokenizer, self._ends = tokenizer, frozenset(ends)
        self._stops = stop_bytes(stops) if stops else []
        self._longest = max(map(len, self._stops), default=1)
        # a stop string may begin in the prompt or in final text, so keep the last bytes of both
        self._before = tokenizer.decode_bytes(prompt_ids[-self._longest :]) if stops else b""
        self._held = b""
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        if continues:
            # three tokens hold every incomplete character
            self._utf8.decode(tokenizer.decode_bytes(prompt_ids[-3:]))
        self._size = 0  # bytes released

    def add(self, token: int) -> str:
        """Take the next token and return the text that became final."""
        if self.finish_reason == "stop":
            return ""
        self.token_ids.append(token)
        if token in self._ends:
            self.finish_reason = "stop"
            return ""
        new = self._tokenizer.decode_bytes([token])
        self._held += new
        start = stop_start(self._before + self._held, len(new), self._stops)
        if start is not None:
            self.finish_reason = "stop"
            self._held = self._held[: max(0, start - len(self._before))]
            return ""
        return self._release(len(self._held) - self._uncertain_bytes())

    def finish(self, cut: bool = True) -> str:
        """End the text and return the characters that were held back.

        cut: show an incomplete character as U+FFFD; otherwise leave it to a further text.
        """
        return self._release(len(self._held), final=cut)

    def kept_ids(self) -> list[int]:
        """Return the ids of the text: without its end token, cut where a stop string begins.

        Call it after `finish`.
        """
        kept: list[int] = []
        size = self._size
        for token in self.token_ids:
            data = self._tokenizer.decode_bytes([token])
            if len(data) > size or token in self._ends:
                kept += _encode_bytes(self._tokenizer, data[:size] if size < len(data) else b"")
                break
            kept.append(token)
            size -= len(data)
        return kept

    def _uncertain_bytes(self) -> int:
        """Return how many of the held bytes may belong to an incomplete stop string."""
        seen = self._before + self._held
        for n in range(min(self._longest - 1, len(seen)), 0, -1):
            if any(stop.startswith(seen[-n:]) for stop in self._stops):
                return min(n, len(self._held))
        return 0

    def _release(self, size: int, final: bool = False) -> str:
        piece, self._held = self._held[:size], self._held[size:]
        self._before = (self._before + piece)[-self._longest :]
        self._size += len(piece)
        text = self._utf8.decode(piece, final)
        self.text += text
        return text


def _encode_bytes(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Return the ids of any bytes; those outside UTF-8 become a token each."""
    try:
        return tokenizer.encode(data.decode("utf-8"))
    except UnicodeDecodeError:
        # the first 256 ids of every vocabulary are the single bytes
        single = {tokenizer.decode_bytes([i]): i for i in range(256)}
        return [single[bytes([byte])] for byte in data]


def pieces(tokenizer: Tokenizer, completion: Completion) -> Iterator[tuple[str, slice]]:
    """Split a text into the shortest pieces of whole characters and whole tokens.

    Yields (piece, slice of completion.token_ids).
    """
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    left, piece, first = completion.text, "", 0
    for i, token in enumerate(completion.token_ids, start=1):
        is_last = i == len(completion.token_ids)
        piece += utf8.decode(tokenizer.decode_bytes([token]), final=is_last)
        unfinished, _ = utf8.getstate()
        if not unfinished:
            # an end token or stop string has no text left
            if left:
                yield left[: len(piece)], slice(first, i)
            left, piece, first = left[len(piece) :], "", i


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text, or its bytes if they are not valid UTF-8."""
    data = tokenizer.decode_bytes([token])
    try:
        return repr(data.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(data)


def shown(text: str) -> str:
    """Return a text for standard output: on a terminal its control characters become escapes."""
    return terminal.visible(text) if sys.stdout.isatty() else text


def ignored(model: GPT) -> str:
    """Return a note on the options in the model's generation_config.json."""
    names = ", ".join(model.generation_options or ())
    return names and f"note: generation_config.json sets {names}; only the flags count here"


def as_line(value: Any) -> str:
    """Return a value as a line of JSON."""
    return terminal.json_line(value)


def as_json(
    prompt: str, index: int, completion: Completion, score: float | None, seed: int | None
) -> dict[str, Any]:
    """Return the object that --json prints for a text."""
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


def about_speed(model: GPT) -> str:
    """Say how a model's last text was computed: its kernels, or its layouts and threads."""
    if not can_run(model):
        return f"kernels {model.kernels}"
    prepared = prepared_for(model)
    layouts = ", ".join(f"{name} {layout}" for name, layout in prepared.layouts().items())
    return f"layouts: {layouts}; threads: {prepared.pace.threads} of {torch.get_num_threads()}"
