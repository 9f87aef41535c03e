"""Texts and records -> arrays of token ids, in pieces: a long text is never one list of ids.

A text for language modelling is its ids and <|endoftext|>. An example of a chat or a classification
is a run of int32 entries, closed by END: an id that is only read stands as itself, what is trained
on as its complement, ~id < 0. A classification trains on its label's name, spelled in UTF-8: one
entry a byte; which class that is, only all the labels tell. This file does not know files.
"""

import re
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from nanogpt2.tokenizer import Tokenizer

END = np.int32(-(2**31))
SAFE = re.compile(r"(?<=\S)[ \n]")


def safe_pieces(parts: Iterable[str]) -> Iterator[str]:
    """Cut a text anew, where encoding the pieces gives the ids of the whole.

    Tokens are merged within GPT-2's words alone, and a word has white space only at its beginning:
    a new one begins wherever white space follows something else.
    """
    held: list[str] = []
    for part in parts:
        cut = SAFE.search(part)
        if held and cut:
            yield "".join([*held, part[: cut.start()]])
            held, part = [], part[cut.start() :]
        held.append(part)
    yield "".join(held)


def encode_text(parts: Iterable[str], tokenizer: Tokenizer) -> list[NDArray[np.integer]]:
    """Return a text's ids and <|endoftext|>, in pieces; none where the text is blank."""
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
