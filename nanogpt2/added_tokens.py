"""Tokens added to a vocabulary, found in a text before the rest of it is encoded.

The search is that of Hugging Face's library. It goes through a text twice: for the tokens that are
not `normalized`, then, between them, for those that are. Each time it takes the first match, of
several at one place the longest. A `single_word` token must not touch a letter, digit or
underscore. `lstrip` and `rstrip` take the white space beside the token too. A match that may not be
used stays text, all of it: a special token where none is allowed, and a part of a word.

A text may come in parts. A part's end is held until no token can reach across it.
This file does not know how the text between the tokens is encoded.
Source: huggingface/tokenizers src/tokenizer/added_vocabulary.rs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import regex

# as the library's \w and \s; Python's differ from them in marks, fractions and separators
WORD = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")
BLANKS = regex.compile(r"\p{White_Space}*")


@dataclass(frozen=True)
class AddedToken:
    """A text with an id of its own. special: an ordinary text may not contain it."""

    content: str
    id: int
    special: bool = False
    normalized: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False


class Search:
    """Finds the added tokens in a text. allow_special: special ones too."""

    def __init__(self, tokens: Iterable[AddedToken], allow_special: bool) -> None:
        listed = [*tokens]
        passes = [[t for t in listed if t.normalized is kind] for kind in (False, True)]
        # where no token may be used, the text stays whole
        is_needed = any(allow_special or not token.special for token in listed)
        self._passes = [_Pass(each, allow_special) for each in passes if each and is_needed]

    def split(self, parts: Iterable[str]) -> Iterator[str | int]:
        """Yield the text and the ids of its added tokens, in order; a text may come in pieces."""
        pieces: Iterable[str | int] = parts
        for each in self._passes:
            pieces = each.split(pieces)
        return iter(pieces)


class _Pass:
    """One search through a text."""

    def __init__(self, tokens: Sequence[AddedToken], allow_special: bool) -> None:
        self._tokens = {token.content: token for token in tokens}
        self._allow_special = allow_special
        self._lengths = sorted({len(content) for content in self._tokens}, reverse=True)
        # the places where a token may begin
        firsts = {content[0] for content in self._tokens}
        self._firsts = regex.compile("|".join(map(regex.escape, sorted(firsts))))
        self._strips = any(token.lstrip for token in tokens)

    def split(self, pieces: Iterable[str | int]) -> Iterator[str | int]:
        """Search each run of text between the ids found before."""
        held, before, taken, enough = "", "", 0, 0
        for piece in pieces:
            if isinstance(piece, int):
                yield from self._cut(held, before, taken, is_last=True)[0]
                yield piece
                held, before, taken, enough = "", "", 0, 0
                continue
            held += piece
            # search a held text again only when it has doubled: a run of blanks may be long
            if len(held) >= enough:
                found, size, taken = self._cut(held, before, taken, is_last=False)
                yield from found
                before, held = held[:size][-1:] or before, held[size:]
                enough = 2 * len(held)
        yield from self._cut(held, before, taken, is_last=True)[0]

    def _cut(
        self, text: str, before: str, taken: int, is_last: bool
    ) -> tuple[list[str | int], int, int]:
        """Split a text as far as the text behind it cannot matter; return how far that is.

        before: the character in front of the text, or nothing. taken: characters at the start that
        an earlier token took as its white space, where another token may still begin. The last
        value returned is that number for the rest of the text.
        """
        # behind `end` a longer token may begin, or the neighbour of a match is still unknown
        end = len(text) if is_last else len(text) - self._lengths[0]
        found: list[str | int] = []
        done, place, matched = taken, 0, 0  # yielded; searched; the end of the last match
        while place < end and (first := self._firsts.search(text, place, end)) is not None:
            start = first.start()
            token = self._token_at(text, start)
            if token is None:
                place = start + 1
                continue
            stop = start + len(token.content)
            if self._may_use(token, text, before, start, stop):
                start = max(done, _blanks_before(text, start)) if token.lstrip else start
                after = BLANKS.match(text, stop).end() if token.rstrip else stop
                if token.rstrip and after == len(text) and not is_last:
                    # more white space may follow
                    place = end = max(matched, min(start, first.start()))
                    break
                found += [text[done:start], token.id] if done < start else [token.id]
                done = after
            place = matched = stop
        size = max(place, end)
        if self._strips and not is_last:
            # a token that follows may take the white space before it
            size = max(matched, _blanks_before(text, size))
        return [*found, text[done:size]] if done < size else found, size, max(0, done - size)

    def _token_at(self, text: str, start: int) -> AddedToken | None:
        for length in self._lengths:
            if (token := self._tokens.get(text[start : start + length])) is not None:
                return token
        return None

    def _may_use(self, token: AddedToken, text: str, before: str, start: int, stop: int) -> bool:
        if token.special and not self._allow_special:
            return False
        if not token.single_word:
            return True
        last = text[start - 1] if start else before
        return not (WORD.match(last) or WORD.match(text[stop : stop + 1]))


def _blanks_before(text: str, place: int) -> int:
    """Return where the white space begins that ends at a place."""
    while place > 0 and BLANKS.fullmatch(text[place - 1]):
        place -= 1
    return place
