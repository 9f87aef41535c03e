"""Vocabularies that tiktoken cannot reproduce, through Hugging Face's library `tokenizers`.

Those are the files with a normalizer, another pre-tokenizer than GPT-2's, a space in front of each
text, merges that depend on more than their order, or another model than byte-level BPE. The library
is an extra: `pip install 'nanogpt2[tokenizers]'`. It reads the content of tokenizer.json.

A text is encoded without the tokens that a post-processor puts around it. `decode` is the
library's. `decode_bytes` joins the texts that the tokens have within a text, because a completion
continues one: a word keeps the space before it.

A long text is encoded in windows, as in tokenizer.py. Where no seam holds, as with a space in front
of each text, the window grows to the whole text.

This file does not know models, checkpoints or prompts.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from typing_extensions import override

from nanogpt2.added_tokens import AddedToken
from nanogpt2.tokenizer import (
    EQUAL_TOKENS,
    OVERLAPS,
    WINDOW,
    Tokenizer,
    printable_bytes,
    sound,
)

BYTE = re.compile("<0x([0-9A-F]{2})>")  # how a model with byte_fallback names a byte


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the library, with the interface of ours.

    stated: the content of tokenizer.json.
    """

    shows_merges = False

    def __init__(
        self,
        stated: Mapping[str, Any],
        added: Iterable[AddedToken],
        roles: Mapping[str, str],
        end: int | None,
    ) -> None:
        """Build the library's tokenizer; the arguments are those of Tokenizer.

        Raises ValueError without the library, and for content that the library cannot read.
        """
        self.name, self.merges, self.is_own = "library", "", True
        self.roles, self.stated = dict(roles), dict(stated)
        self._take(added)
        self.vocabulary = self._engines[True].get_vocab(with_added_tokens=False)
        eos = self._ids_of().get(self.roles.get("eos_token", ""))
        self._end = end if eos is None else eos

    @override
    def _take(self, added: Iterable[AddedToken]) -> None:
        self.added = tuple(added)
        self.stated = {**self.stated, "added_tokens": [vars(token) for token in self.added]}
        # two, because several threads may encode at once
        self._engines = {allow: self._engine(allow) for allow in (False, True)}
        found = self._engines[True].get_vocab(with_added_tokens=True)
        for token in self.added:
            if found.get(token.content) != token.id:
                raise ValueError(f"token {token.content[:40]!r} cannot have the id {token.id}")
        with _told("the library tokenizers cannot decode its tokens"):
            self._bytes = self._texts(max(found.values(), default=-1) + 1)

    def _engine(self, allow_special: bool) -> Any:
        try:
            import tokenizers
        except ImportError:
            raise ValueError(
                "this vocabulary needs the library tokenizers: pip install 'nanogpt2[tokenizers]'"
            ) from None
        # tokens around a text belong to no prompt and no part of a corpus
        alone = {"truncation": None, "padding": None, "post_processor": None}
        with _told("the library tokenizers cannot read it"):
            engine = tokenizers.Tokenizer.from_str(json.dumps(self.stated | alone))
        engine.encode_special_tokens = not allow_special
        return engine

    def _texts(self, size: int) -> list[bytes]:
        """Return the text that each token has behind another one."""
        engine = self._engines[True]
        is_byte_level = "ByteLevel" in json.dumps(self.stated.get("decoder"))
        byte_of = {char: byte for byte, char in printable_bytes().items()}
        first = next((i for i in range(size) if engine.id_to_token(i) is not None), 0)
        before = engine.decode([first], skip_special_tokens=False)
        found = []
        for i in range(size):
            token = engine.id_to_token(i)
            byte = BYTE.fullmatch(token or "")
            if token is not None and is_byte_level and byte_of.keys() >= {*token}:
                found.append(bytes(byte_of[char] for char in token))
            elif byte is not None:
                found.append(bytes([int(byte[1], 16)]))
            else:
                both = engine.decode([first, i], skip_special_tokens=False)
                found.append(both.removeprefix(before).encode())
        return found

    @property
    @override
    def end_text(self) -> str:
        return str(self._engines[True].id_to_token(self.end_of_text))

    @override
    def _content(self) -> str:
        return json.dumps(self.stated, sort_keys=True) + repr(self._end)

    @override
    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        return [i for ids in self.encode_parts([text], allow_special) for i in ids]

    @override
    def encode_parts(
        self, parts: Iterable[str], allow_special: bool = False
    ) -> Iterator[list[int]]:
        window = _Window(self._engines[allow_special], "")
        new, enough = "", WINDOW
        for part in map(sound, parts):
            for start in range(0, len(part), WINDOW):
                new += part[start : start + WINDOW]
                if len(new) >= enough:
                    final, window = window.continued(new)
                    yield final
                    # without a seam the window grows: twice as much must come before the next try
                    new, enough = "", max(WINDOW, len(window.text) // 2)
        final, window = window.continued(new)
        yield final
        yield window.ids

    @override
    def decode(self, ids: Any) -> str:
        # checks the ids
        self.decode_bytes(ids)
        with _told("the model's tokenizer cannot decode the ids"):
            return str(self._engines[True].decode([*map(int, ids)], skip_special_tokens=False))


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Raise ValueError for an error of the library. Its panics are no Exception of Python's."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        line = " ".join(str(error).split())[:80]
        raise ValueError(f"{what}: {line}") from None


class _Window:
    """A part of a text, encoded; its last ids may change with the text behind it."""

    def __init__(self, engine: Any, text: str) -> None:
        self._engine, self.text = engine, text
        # a word without a token, in a model that has no token for unknown words
        with _told("the model's tokenizer cannot encode the text"):
            found = engine.encode(text, add_special_tokens=False)
        self.ids: list[int] = found.ids
        self._ends = [end for _, end in found.offsets]

    def continued(self, new: str) -> tuple[list[int], "_Window"]:
        """Return the final ids, and the next window, which ends in the text `new`."""
        for start in self._starts():
            text = self.text[self._ends[start - 1] :] + new
            window = _Window(self._engine, text)
            if window.ids[:EQUAL_TOKENS] == self.ids[start : start + EQUAL_TOKENS]:
                return self.ids[:start], window
        return [], _Window(self._engine, self.text + new)

    def _starts(self) -> Iterator[int]:
        """Yield tokens where the next window may begin: behind a space, or anywhere."""
        for overlap in OVERLAPS:
            start = len(self.ids) - overlap
            if start <= 0:
                return
            word = start
            while word > 0 and not self._begins_with_space(word):
                word -= 1
            yield from (place for place in (word, start) if place > 0)

    def _begins_with_space(self, token: int) -> bool:
        place = self._ends[token - 1]
        return self.text[place : place + 1].isspace()
