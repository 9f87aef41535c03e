"""Texts and records -> arrays of token ids, in pieces. They need 2 bytes an id, or 4 in records.

A text for language modelling becomes its ids and <|endoftext|>. An example of a chat or a
classification becomes a run of int32 entries that ends with END. A token that is only read is
stored as its id, a token that is trained on as the complement, ~id < 0. A classification trains on
the label's name, stored in UTF-8 with one complemented byte an entry. The class numbers are
assigned later, when all labels are known. This file does not know files.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from nanogpt2.tokenizer import Tokenizer

END = np.int32(-(2**31))


def split_texts(parts: Iterable[str], end: str) -> Iterator[Iterator[str]]:
    """Cut a text, given in parts, at the text of its end token. Read each before the next one."""
    source, texts = iter(parts), deque([""])
    # a part of a text may end within it
    held = len(end) - 1

    def text() -> Iterator[str]:
        while len(texts) == 1 and (part := next(source, None)) is not None:
            texts.extend((texts.pop() + part).split(end))
            if len(texts) == 1:
                begun = texts.pop()
                size = max(0, len(begun) - held)
                yield begun[:size]
                texts.append(begun[size:])
        yield texts.popleft()

    while texts:
        yield text()


def id_type(tokenizer: Tokenizer) -> np.dtype:
    """Return the type of a text's ids: uint16 for 65,536 ids at most, else uint32."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def encode_texts(parts: Iterable[str], tokenizer: Tokenizer) -> Iterator[NDArray[np.integer]]:
    """Yield the ids of texts that are joined by the end token's text, in pieces, with that token.

    A written special token is the token, as in a prompt of sample.py.
    """
    dtype = id_type(tokenizer)
    for number, text in enumerate(split_texts(parts, tokenizer.end_text)):
        if number:
            yield np.array([tokenizer.end_of_text], dtype)
        pieces = tokenizer.encode_parts(text, allow_special=True)
        yield from (np.array(ids, dtype) for ids in pieces if ids)


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
