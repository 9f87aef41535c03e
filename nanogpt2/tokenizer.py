"""Text <-> token ids: GPT-2's byte-pair encoding, and a plain byte-level one for tiny models.

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

This file does not know models, checkpoints or prompts.
Sources: Sennrich et al. 2016; openai/gpt-2 src/encoder.py; tiktoken_ext/openai_public.py.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.resources import files

import tiktoken

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


class Tokenizer:
    """`encode` and `decode` over one vocabulary.

    Ids are `0 <= id < vocab_size`; the last id, `end_of_text`, separates texts.
    """

    def __init__(self, name: str, merges: str) -> None:
        """Build the vocabulary `name` from the text of a vocab.bpe file."""
        self.name = name
        self.merges = merges
        self.vocabulary = _vocabulary(merges)
        # Latin-1 encodes the character with number n as the byte n
        byte_of = {ord(char): byte for byte, char in _printable_bytes().items()}
        self._encoding = tiktoken.Encoding(
            name=name,
            pat_str=PATTERN,
            mergeable_ranks={
                token.translate(byte_of).encode("latin-1"): rank
                for token, rank in self.vocabulary.items()
                if token != END_OF_TEXT
            },
            special_tokens={END_OF_TEXT: self.vocabulary[END_OF_TEXT]},
        )
        # one object for each id: a list of ids needs 8 bytes an id, not 36
        self._shared_ids = [*range(len(self.vocabulary))]

    @property
    def vocab_size(self) -> int:
        """Number of ids: 50257 for GPT-2's vocabulary, 257 for bytes."""
        return len(self.vocabulary)

    @property
    def end_of_text(self) -> int:
        """The id of <|endoftext|>."""
        return self.vocabulary[END_OF_TEXT]

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Text -> ids. "<|endoftext|>" is ordinary text unless `allow_special`."""
        if allow_special:
            first, *others = map(self.encode, text.split(END_OF_TEXT))
            return first + [i for ids in others for i in (self.end_of_text, *ids)]
        shared = self._shared_ids
        return [shared[i] for ids in self.encode_parts([text]) for i in ids]

    def encode_parts(self, parts: Iterable[str]) -> Iterator[list[int]]:
        """Yield the ids of a text given in parts, in pieces: the same ids, however it is cut."""
        ids: list[int] = []
        for window in _windows(parts):
            final, ids = self._continue(ids, window)
            yield final
        yield ids

    def _continue(self, ids: list[int], text: str) -> tuple[list[int], list[int]]:
        """Return the final ids of a window, and the ids of the next window, which ends in `text`.

        ids: the window's, the final and the others.
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
        return self._encoding.decode_bytes(ids)

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


def _windows(parts: Iterable[str]) -> Iterator[str]:
    """Cut a text anew, every WINDOW characters or a little later."""
    held = ""
    for part in parts:
        if not part.isascii() and SURROGATE.search(part):
            # join pairs and replace lone ones before a cut can part a pair, as tiktoken does
            part = part.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        for start in range(0, len(part), WINDOW):
            held += part[start : start + WINDOW]
            if len(held) >= WINDOW:
                yield held
                held = ""
    if held:
        yield held


def _printable_bytes() -> dict[int, str]:
    """GPT-2's alphabet, byte -> character, in the order of the ids; unprintable bytes come last."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    shifted = {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return {byte: chr(byte) for byte in printable} | shifted


def _vocabulary(merges: str) -> dict[str, int]:
    """The text of vocab.bpe -> {token: id}. Without merges the id of a byte is its value."""
    alphabet = _printable_bytes()
    lines = merges.splitlines()[1:]
    tokens = [*alphabet.values()] if lines else [alphabet[byte] for byte in range(256)]
    tokens += [line.replace(" ", "") for line in lines]
    return {token: i for i, token in enumerate([*tokens, END_OF_TEXT])}
