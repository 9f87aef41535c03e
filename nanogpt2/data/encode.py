"""Texts and records -> arrays of token ids. A long text is encoded in pieces, to save memory.

A text for language modelling becomes its ids and <|endoftext|>. An example of a chat or a
classification becomes a run of int32 entries that ends with END. A token that is only read is
stored as its id, a token that is trained on as the complement, ~id < 0. A classification trains on
the label's name, stored in UTF-8 with one complemented byte an entry. The class numbers are
assigned later, when all labels are known. This file does not know files.
"""

import re
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from nanogpt2.tokenizer import Tokenizer

END = np.int32(-(2**31))
SAFE_CUT = re.compile(r"(?<=\S)[ \n]")


def safe_pieces(parts: Iterable[str]) -> Iterator[str]:
    """Cut a text into other pieces whose ids, joined, equal the ids of the whole text.

    Byte pairs are merged only within a word of GPT-2's pattern. A word has white space only at its
    start, so a cut is safe wherever white space follows another character.
    """
    held: list[str] = []
    for part in parts:
        cut = SAFE_CUT.search(part)
        if held and cut:
            yield "".join([*held, part[: cut.start()]])
            held, part = [], part[cut.start() :]
        held.append(part)
    yield "".join(held)


def encode_text(parts: Iterable[str], tokenizer: Tokenizer) -> list[NDArray[np.integer]]:
    """Return a text's ids and <|endoftext|>, in pieces; an empty list for a blank text."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    pieces: list[NDArray[np.integer]] = []
    blank = True
    for piece in safe_pieces(parts):
        pieces.append(np.array(tokenizer.encode(piece), dtype))
        blank = blank and not piece.strip()
    return [] if blank else [*pieces, np.array([tokenizer.end_of_text], dtype)]


def encode_chat(segments: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> NDArray[np.int32]:
    """Return the entries of a conversation; <|endoftext|> ends its last completion."""
    entries: list[int] = []
    for text, trained in segments:
        ids = tokenizer.encode(text)
        entries += [~i for i in ids] if trained else ids
    return np.array([*entries, ~tokenizer.end_of_text, END], np.int32)


def encode_labelled(text: str, label: str, tokenizer: Tokenizer) -> NDArray[np.int32]:
    """Return the entries of a text and its label."""
    spelled = [~byte for byte in label.encode("utf-8", "surrogatepass")]
    return np.array([*tokenizer.encode(text), *spelled, END], np.int32)
