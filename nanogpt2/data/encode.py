"""Texts and records -> arrays of token ids, in pieces. They need 2 bytes an id, or 4 in records.

A text for language modelling becomes its ids and <|endoftext|>. An example of a chat or a
classification becomes a run of int32 entries that ends with END. A token that is only read is
stored as its id, a token that is trained on as the complement, ~id < 0. A classification trains on
the label's name, stored in UTF-8 with one complemented byte an entry. The class numbers are
assigned later, when all labels are known. This file does not know files.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from nanogpt2.tokenizer import Tokenizer

END = np.int32(-(2**31))


def encode_text(parts: Iterable[str], tokenizer: Tokenizer) -> list[NDArray[np.integer]]:
    """Return a text's ids and <|endoftext|>, in pieces; an empty list for a blank text.

    A written special token is the token, as in a prompt of sample.py.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    pieces: list[NDArray[np.integer]] = [
        np.array(ids, dtype) for ids in tokenizer.encode_parts(parts, allow_special=True) if ids
    ]
    # each piece is whole characters
    if not any(tokenizer.decode(piece.tolist()).strip() for piece in pieces):
        return []
    return [*pieces, np.array([tokenizer.end_of_text], dtype)]


def encode_chat(segments: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> NDArray[np.int32]:
    """Return the entries of a conversation; <|endoftext|> ends its last completion.

    A written special token is the token, as in a prompt of sample.py.
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
