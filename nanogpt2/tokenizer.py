"""Text <-> token ids: byte-pair encoding by GPT-2's merges, by other ones, or by none (bytes).

tiktoken does the merging. The merges are packaged with the project, so nothing is downloaded.
`assets/vocab.bpe` equals OpenAI's file to the byte: a version line, then one merge a line, the most
frequent first. Its tokens are written in a printable alphabet, one character a byte. GPT-2's other
file, encoder.json, follows from it: 256 single bytes, then one token a merge, then <|endoftext|>.

tiktoken needs about 50 bytes of memory for each byte of a word, and panics at a million blanks. So
a long text is encoded in windows. A window drops its last tokens, and the next window starts where
they start. The joined ids are those of the whole text if the next window begins with the dropped
tokens: merges have one order everywhere, so tokens are the encoding of their text exactly if each
two neighbours are the encoding of theirs. Otherwise the seam moves back. If no seam holds, which no
known text causes, the text is cut at the window's end. Time is linear in the text, and the work
needs the memory of two windows, less than 10 MB, whatever the text. The ids come on top.

Another vocabulary has its own merges and may number its tokens in any order. Tokens added to a
vocabulary are found first, by added_tokens.py; the text between them is encoded as above.
`reproduces` tells which merges tiktoken applies exactly; library_tokenizer.py has the others.

This file does not know models, checkpoints or prompts.
Sources: Sennrich et al. 2016; openai/gpt-2 src/encoder.py; tiktoken_ext/openai_public.py.
"""

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from typing import Any, Self

import tiktoken

from nanogpt2.added_tokens import AddedToken, Search

END_OF_TEXT = "<|endoftext|>"
# the digests that tiktoken checks GPT-2's two files against
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
# contractions, words, numbers and other runs, each with at most one leading space; white space
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

WINDOW = 1 << 14  # characters
OVERLAPS = (16, 64, 256, 1024)  # tokens that a window drops, in the order of the attempts
# a window that starts inside a contraction may split it otherwise; 3 bytes later both agree
EQUAL_TOKENS = 4
SURROGATE = re.compile("[\ud800-\udfff]")


# what a vocabulary calls its special tokens, as tokenizer_config.json does
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
READY = 1 << 12  # ids that are yielded at once, or more


class Tokenizer:
    """`encode` and `decode` over one vocabulary.

    Ids are `0 <= id < vocab_size`; the id `end_of_text` separates texts.
    """

    shows_merges = True  # `merges` and `vocabulary` are in GPT-2's format

    def __init__(
        self,
        name: str,
        merges: str,
        vocabulary: Mapping[str, int] | None = None,
        added: Iterable[AddedToken] | None = None,
        roles: Mapping[str, str] | None = None,
        end: int | None = None,
    ) -> None:
        """Build the vocabulary `name` from the text of a vocab.bpe file.

        vocabulary: {token: id}, where the ids are not GPT-2's: bytes, merges, <|endoftext|>. added:
        the added tokens, where they are not <|endoftext|> alone. roles: the text of each special
        token, by ROLES. end: the id that separates texts, where no role names it.
        """
        self.name, self.merges = name, merges
        self.vocabulary = dict(vocabulary or _vocabulary(merges))
        self.roles = dict.fromkeys(ROLES, END_OF_TEXT) if roles is None else dict(roles)
        self.is_own = vocabulary is not None or added is not None
        if added is None:
            added = [AddedToken(END_OF_TEXT, self.vocabulary[END_OF_TEXT], True, False)]
        self._take(added)
        ids = self._ids_of()
        eos = ids.get(self.roles.get("eos_token", ""))
        self._end = end if eos is None else eos
        tokens = _tokens(merges)
        self._encoding = tiktoken.Encoding(
            name=name,
            pat_str=PATTERN,
            mergeable_ranks={_bytes(token): rank for rank, token in enumerate(tokens)},
            special_tokens={},
        )
        order = [self.vocabulary[token] for token in tokens]
        # rank -> id, where they differ
        self._ids = None if order == [*range(len(order))] else order

    def arguments(self) -> dict[str, Any]:
        """Return plain values, of which `of` makes an equal tokenizer."""
        own = {
            "vocabulary": self.vocabulary,
            "added": [asdict(token) for token in self.added],
            "roles": self.roles,
            "end": self._end,
        }
        return {"name": self.name, "merges": self.merges, **(own if self.is_own else {})}

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Make a tokenizer by its `arguments`."""
        added = arguments.get("added")
        tokens = None if added is None else [AddedToken(**token) for token in added]
        return cls(**{**arguments, "added": tokens})

    def _take(self, added: Iterable[AddedToken]) -> None:
        """Use these added tokens."""
        self.added = tuple(added)
        self._searches = {allow: Search(self.added, allow) for allow in (False, True)}
        ids = self._ids_of()
        # an id without a token, if any, is no text
        self._bytes = [b""] * (max(ids.values()) + 1)
        for token, i in ids.items():
            self._bytes[i] = _bytes(token)
        # one object for each id: a list of ids needs 8 bytes an id, not 36
        self._shared_ids = [*range(len(self._bytes))]

    def _ids_of(self) -> dict[str, int]:
        return self.vocabulary | {token.content: token.id for token in self.added}

    @property
    def vocab_size(self) -> int:
        """Number of ids: 50257 for GPT-2's vocabulary, 257 for bytes."""
        return len(self._bytes)

    @property
    def end_of_text(self) -> int:
        """The id that ends a text: <|endoftext|>'s. Raises ValueError where there is none."""
        if self._end is None:
            raise ValueError("the tokenizer has no eos_token, the id that ends a text")
        return self._end

    @property
    def end_text(self) -> str:
        """The text of `end_of_text`: <|endoftext|>, unless the vocabulary has another."""
        return self.decode([self.end_of_text])

    def ends(self, token: int) -> bool:
        """Tell whether a token ends a text."""
        return token == self._end

    @property
    def key(self) -> str:
        """A short name that no other tokenizer has: the one's cache is not read for the other."""
        return f"{self.name}-{hashlib.sha256(self._content().encode()).hexdigest()[:8]}"

    def _content(self) -> str:
        """Return all that decides which ids a text has."""
        own = json.dumps(sorted(self.vocabulary.items())) + repr((self.added, self._end))
        return self.merges + (own if self.is_own else "")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def with_added(self, texts: Sequence[str]) -> Self:
        """Return the tokenizer with a further token for each text, which encode always finds.

        The ids follow the vocabulary's. Raises ValueError for a text that cannot be a new token.
        """
        grown = copy.copy(self)
        grown.is_own = True
        for text in texts:
            shown = repr(text)[:60]
            if SURROGATE.search(text):
                raise ValueError(f"a token must be text that UTF-8 can encode, not {shown}")
            ids = grown.encode(text, allow_special=True)
            if text in grown._ids_of() or (len(ids) < 2 and grown.decode(ids) == text):
                raise ValueError(f"{shown} is a token already")
            grown._take([*grown.added, AddedToken(text, grown.vocab_size)])
            if (written := grown.decode([grown.vocab_size - 1])) != text:
                raise ValueError(f"{shown} cannot be a token: it would be written {written!r}")
        return grown

    def split(self, text: str, allow_special: bool = False) -> Iterator[str | int]:
        """Yield the ids of a text's added tokens, and the texts between them."""
        return self._searches[allow_special].split([sound(text)])

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Text -> ids. Special tokens, as <|endoftext|>, are ordinary text unless `allow_special`.

        Added tokens that are not special are always found.
        """
        shared = self._shared_ids
        return [shared[i] for ids in self.encode_parts([text], allow_special) for i in ids]

    def encode_parts(
        self, parts: Iterable[str], allow_special: bool = False
    ) -> Iterator[list[int]]:
        """Yield the ids of a text given in parts, in pieces: the same ids, however it is cut."""
        ready: list[int] = []
        ranks: list[int] = []
        for window in _windows(self._searches[allow_special].split(map(sound, parts))):
            if isinstance(window, int):
                ready += [*self._named(ranks), window]
                ranks = []
            else:
                final, ranks = self._continue(ranks, window)
                ready += self._named(final)
            if len(ready) >= READY:
                yield ready
                ready = []
        yield ready + self._named(ranks)

    def _named(self, ranks: list[int]) -> list[int]:
        """Merges' ranks -> ids."""
        return ranks if self._ids is None else [self._ids[rank] for rank in ranks]

    def _continue(self, ids: list[int], text: str) -> tuple[list[int], list[int]]:
        """Return the final ids of a window, and the ids of the next window, which ends in `text`.

        ids: the window's, the final and the others, by tiktoken's numbers.
        """
        for overlap in OVERLAPS:
            start = len(ids) - overlap
            # a window starts with a whole character: never with a byte 10xxxxxx
            while start > 0 and self._encoding.decode_single_token_bytes(ids[start])[0] >> 6 == 2:
                start -= 1
            if start <= 0:
                break
            tail = self._encoding.decode_bytes(ids[start:]).decode("utf-8")
            found = self._encoding.encode_ordinary(tail + text)
            if found[:EQUAL_TOKENS] == ids[start : start + EQUAL_TOKENS]:
                return ids[:start], found
        return ids, self._encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text; bytes that are not UTF-8 become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Ids -> bytes. Raises ValueError for an id outside the vocabulary."""
        # a row of generate()'s tensor
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        return b"".join(map(self._bytes.__getitem__, ids))

    def encoder_json(self) -> str:
        """Return the text of vocab.json; GPT-2's equals OpenAI's encoder.json to the byte."""
        return json.dumps(self.vocabulary)


@cache
def gpt2_tokenizer() -> Tokenizer:
    """Return GPT-2's tokenizer, 50257 ids. Raises ValueError if the packaged file is damaged."""
    data = files("nanogpt2").joinpath("assets/vocab.bpe").read_bytes()
    if hashlib.sha256(data).hexdigest() != VOCAB_BPE_SHA256:
        raise ValueError("nanogpt2/assets/vocab.bpe is damaged: reinstall nanogpt2")
    return Tokenizer("gpt2", data.decode("utf-8"))


@cache
def byte_tokenizer() -> Tokenizer:
    """Return a byte tokenizer, for models trained in minutes: ids 0-255 and <|endoftext|>."""
    return Tokenizer("bytes", "")


def reproduces(pairs: Sequence[tuple[str, str]], vocabulary: Mapping[str, int]) -> bool:
    """Tell whether tiktoken merges exactly these pairs of a byte-level vocabulary, in this order.

    tiktoken joins any neighbours whose bytes make a token, in the order of the tokens. Those are
    the given pairs if the parts of each pair come before it, no token has two pairs, and the merges
    lead from each token's bytes to the token: then no other two parts of it can meet.
    """
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    # a token -> its rank and its parts
    made = dict.fromkeys(printable_bytes().values(), (-1, "", ""))
    for rank, (left, right) in enumerate(pairs):
        if left not in made or right not in made or left + right in made:
            return False
        if not _meet(left, right, ranks, made):
            return False
        made[left + right] = rank, left, right
    return made.keys() <= vocabulary.keys()


def _meet(
    left: str,
    right: str,
    ranks: Mapping[tuple[str, str], int],
    made: Mapping[str, tuple[int, str, str]],
) -> bool:
    """Tell whether the merges of `left` and of `right` leave the border between the two.

    Go back in time: the part at the border that was made last falls apart. Two parts at the border
    merge if their rank comes before either one's end; of equal ranks the left merge comes first.
    """
    while True:
        (left_rank, _, left_end), (right_rank, right_start, _) = made[left], made[right]
        if left_rank == right_rank == -1:
            return True
        if left_rank > right_rank:
            left, limit = left_end, left_rank
        else:
            right, limit = right_start, right_rank + 1
        if ranks.get((left, right), limit) < limit:
            return False


def sound(part: str) -> str:
    """Join pairs of surrogates and replace lone ones, before a cut can part a pair."""
    if part.isascii() or not SURROGATE.search(part):
        return part
    return part.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _windows(pieces: Iterable[str | int]) -> Iterator[str | int]:
    """Cut a text anew, every WINDOW characters or a little later, and at each id."""
    held = ""
    for piece in pieces:
        if isinstance(piece, int):
            if held:
                yield held
            yield piece
            held = ""
            continue
        for start in range(0, len(piece), WINDOW):
            held += piece[start : start + WINDOW]
            if len(held) >= WINDOW:
                yield held
                held = ""
    if held:
        yield held


@cache
def printable_bytes() -> dict[int, str]:
    """GPT-2's alphabet, byte -> character, in the order of the ids; unprintable bytes come last."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    shifted = {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return {byte: chr(byte) for byte in printable} | shifted


@cache
def _byte_of() -> dict[int, int]:
    """The alphabet's characters -> bytes, by number: Latin-1 encodes the number n as the byte n."""
    return {ord(char): byte for byte, char in printable_bytes().items()}


# kept: all are needed twice at the start, and again for each token that is added
@cache
def _bytes(token: str) -> bytes:
    """Return a token's bytes. A token with characters outside the alphabet is its own text."""
    if _byte_of().keys() >= {*map(ord, token)}:
        return token.translate(_byte_of()).encode("latin-1")
    return token.encode()


def _tokens(merges: str) -> list[str]:
    """The text of vocab.bpe -> the tokens in the order of their ranks: the bytes, the merges."""
    alphabet = printable_bytes()
    lines = merges.splitlines()[1:]
    tokens = [*alphabet.values()] if lines else [alphabet[byte] for byte in range(256)]
    return tokens + [line.replace(" ", "") for line in lines]


def _vocabulary(merges: str) -> dict[str, int]:
    """The text of vocab.bpe -> {token: id}. Without merges the id of a byte is its value."""
    return {token: i for i, token in enumerate([*_tokens(merges), END_OF_TEXT])}
