"""Token ids <-> texts while decoding: a request of texts, a text that grows, the texts of a search.

A text shows whole characters only, and nothing of a stop string. This file does not know how tokens
are chosen, nor where a text goes.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from nanogpt2.config import GenerationConfig
from nanogpt2.generation.beam import Group
from nanogpt2.generation.engine import check_memory
from nanogpt2.generation.processors import processors_for
from nanogpt2.generation.request import Request, check_least, prepare
from nanogpt2.generation.stopping import stop_bytes, stop_start
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer


def request_for(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: list[str],
    options: GenerationConfig,
    literal: bool = False,
    seeds: Sequence[int] | None = None,
) -> Request:
    """Make a request for prompts of equal length in tokens.

    The prompts need equal lengths because padding would count as prompt. literal: <|endoftext|> is
    characters, not the token. seeds: one for each prompt; by default all draw from options.seed.
    Raises ValueError for invalid options or a prompt that leaves no room for new tokens.
    """
    rows = [tokenizer.encode(prompt, allow_special=not literal) for prompt in prompts]
    request = request_for_ids(model, tokenizer, rows, options)
    return request if seeds is None else replace(request, seeds=tuple(seeds))


def request_for_ids(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[list[int]], options: GenerationConfig
) -> Request:
    """Make a request for prompts given as equally many token ids each; errors as request_for."""
    bos = model.config.bos_token_id
    if bos is None and not all(prompts):
        raise ValueError("PROMPT must not be empty: the model has no bos_token_id to start from")
    ids = torch.tensor([row or [bos] for row in prompts], dtype=torch.int64)
    mask = torch.ones_like(ids)
    request = prepare(model.config, model.wte.weight.device, options, ids, mask, tokenizer)
    # check all options now, before any output
    check_memory(model, request)
    check_least(request)
    processors_for(request)
    if options.stop_strings is not None:
        stop_bytes(options.stop_strings)
    return request


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


def completions(
    tokenizer: Tokenizer, request: Request, count: int, continues: bool = False
) -> list[list[Completion]]:
    """Return `count` empty texts for each prompt; continues: as for Completion."""
    ends, stops = request.eos.tolist(), request.config.stop_strings or ()
    return [
        [Completion(tokenizer, ids, ends, stops, continues) for _ in range(count)]
        for ids in request.ids.tolist()
    ]


def completed(
    tokenizer: Tokenizer, request: Request, group: Group, continues: bool = False
) -> list[list[Completion]]:
    """Return the finished texts of a search, (B, K, T), for each prompt; continues: as above."""
    texts = completions(tokenizer, request, group.ids.size(1), continues)
    for row, ids, rows in zip(texts, group.ids, group.beams, strict=True):
        for text, tokens, beam in zip(row, ids, rows, strict=True):
            for token in tokens[request.prompt_length :][beam >= 0].tolist():
                text.add(token)
            text.finish(cut=not continues)
    return texts


def _encode_bytes(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Return the ids of any bytes; those outside UTF-8 become a token each."""
    try:
        return tokenizer.encode(data.decode("utf-8"))
    except UnicodeDecodeError:
        # a vocabulary without a token for each byte leaves them out
        single = {tokenizer.decode_bytes([i]): i for i in reversed(range(tokenizer.vocab_size))}
        return [single[one] for byte in data if (one := bytes([byte])) in single]


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
