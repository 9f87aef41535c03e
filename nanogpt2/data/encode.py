"""Texts and records -> arrays of token ids, in pieces. They need 2 bytes an id, or 4 in records.

A text for language modelling becomes its ids and <|endoftext|>. An example of a chat or a
classification becomes a run of int32 entries that ends with END. A token that is only read is
stored as its id, a token that is trained on as the complement, ~id < 0. A classification trains on
the label's name, stored in UTF-8 with one complemented byte an entry. The class numbers are
assigned later, when all labels are known. This file does not know files.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from nanogpt2.tokenizer import Tokenizer

END = np.int32(-(2**31))


def encode_text(parts: Iterable[str], tokenizer: Tokenizer) -> list[NDArray[np.integer]]:
    """Return a text's ids and <|endoftext|>, in pieces; an empty list for a blank text."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    blank = True

    def seen() -> Iterator[str]:
        nonlocal blank
        for part in parts:
            blank = blank and not part.strip()
            yield part

    pieces = [np.array(ids, dtype) for ids in tokenizer.encode_parts(seen()) if ids]
    return [] if blank else [*pieces, np.array([tokenizer.end_of_text], dtype)]


def encode_chat(segments: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> NDArray[np.int32]:
    """Return the entries of a conversation; <|endoftext|> ends its last completion."""
    entries = []
    for text, trained in segments:
        ids = _entries(text, tokenizer)
        entries.append(~ids if trained else ids)
    return np.concatenate([*entries, np.array([~tokenizer.end_of_text, END], np.int32)])


def encode_labelled(text: str, label: str, tokenizer: Tokenizer) -> NDArray[np.int32]:
    """Return the entries of a text and its label."""
    spelled = [~byte for byte in label.encode("utf-8", "surrogatepass")]
    return np.concatenate([_entries(text, tokenizer), np.array([*spelled, END], np.int32)])


def _entries(text: str, tokenizer: Tokenizer) -> NDArray[np.int32]:
    return np.concatenate([np.array(ids, np.int32) for ids in tokenizer.encode_parts([text])])
