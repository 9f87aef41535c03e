"""Texts and records -> arrays of token ids, in pieces. They need 2 bytes an id, or 4 in records.

A text for language modelling becomes its ids and <|endoftext|>. In a file that token may be written
out, between texts. An example of a chat or a classification becomes a run of int32 entries that
ends with END. A token that is only read is stored as its id, a token that is trained on as the
complement, ~id < 0. A classification trains on the label's name, stored in UTF-8 with one
complemented byte an entry. The class numbers are assigned later, when all labels are known. This
file does not know files.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from nanogpt2.tokenizer import END_OF_TEXT, Tokenizer

END = np.int32(-(2**31))


def encode_texts(parts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[NDArray[np.integer]]]:
    """Yield each text's ids and <|endoftext|>, in pieces. A written <|endoftext|> ends a text.

    Blank texts are dropped.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    end: NDArray[np.integer] = np.array([tokenizer.end_of_text], dtype)
    for _, numbered in groupby(_texts(parts), key=itemgetter(0)):
        found = tokenizer.encode_parts(part for _, part in numbered)
        pieces: list[NDArray[np.integer]] = [np.array(ids, dtype) for ids in found if ids]
        # a piece is whole characters
        if any(tokenizer.decode(piece.tolist()).strip() for piece in pieces):
            yield [*pieces, end]


def _texts(parts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Cut the parts at each <|endoftext|>: yield (the text's number, a part of the text)."""
    number, held = 0, ""
    for part in parts:
        *ended, rest = (held + part).split(END_OF_TEXT)
        for text in ended:
            yield number, text
            number += 1
        # the next part may continue an <|endoftext|> that begins here
        cut = max(0, len(rest) - len(END_OF_TEXT) + 1)
        yield number, rest[:cut]
        held = rest[cut:]
    yield number, held


def encode_chat(segments: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> NDArray[np.int32]:
    """Return the entries of a conversation; <|endoftext|> ends its last completion.

    A written <|endoftext|> is that token too.
    """
    entries = []
    for text, trained in segments:
        ids = np.array(tokenizer.encode(text, allow_special=True), np.int32)
        entries.append(~ids if trained else ids)
    return np.concatenate([*entries, np.array([~tokenizer.end_of_text, END], np.int32)])


def encode_labelled(text: str, label: str, tokenizer: Tokenizer) -> NDArray[np.int32]:
    """Return the entries of a text and its label."""
    spelled = [~byte for byte in label.encode("utf-8", "surrogatepass")]
    ids = np.array(tokenizer.encode(text), np.int32)
    return np.concatenate([ids, np.array([*spelled, END], np.int32)])
