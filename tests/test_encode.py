"""Texts in pieces: the ids of the whole text, however it is cut."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt2.data.encode import END, encode_chat, encode_labelled, encode_texts
from nanogpt2.tokenizer import byte_tokenizer, gpt2_tokenizer

GPT2, BYTES = gpt2_tokenizer(), byte_tokenizer()

# text that tests GPT-2's pattern: white space, contractions, letters, numbers, marks
PARTS = [" ", "\n", "\t", "\r", "\xa0", "\u2028", "\x1c", "'s", "'", "ll", "the", "é", "٣"]
PARTS += ["5", "!", "😀", "\u0301", "<|endoftext|>", " the", "\n\n", "  ", "\0"]
texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=3)).map("".join)


def ids_of(parts, tokenizer=GPT2):
    return [int(i) for piece in encode_texts(parts, tokenizer) for i in piece]


@settings(max_examples=500)
@given(st.lists(texts))
def test_pieces_give_the_ids_of_the_whole(parts):
    assert ids_of(parts) == GPT2.encode("".join(parts), allow_special=True)


def test_texts_are_arrays_with_end_of_text_between():
    pieces = [*encode_texts(["a b ", "c d<|endof", "text|> e"], BYTES)]
    assert np.concatenate(pieces).tolist() == [*b"a b c d", 256, *b" e"]
    assert {piece.dtype for piece in pieces} == {np.dtype(np.uint16)}
    assert not [*encode_texts([], BYTES)]


def test_entries_of_a_chat_and_of_a_label():
    entries = encode_chat([("ab", False), ("c", True), ("d", False), ("e", True)], BYTES)
    assert entries.tolist() == [97, 98, ~99, 100, ~101, ~256, int(END)]
    assert encode_labelled("ab", "é", BYTES).tolist() == [97, 98, ~0xC3, ~0xA9, int(END)]
    assert entries.dtype == np.int32
