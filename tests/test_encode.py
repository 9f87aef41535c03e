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
    return [int(i) for text in encode_texts(parts, tokenizer) for piece in text for i in piece]


@settings(max_examples=500)
@given(st.lists(texts))
def test_pieces_give_the_ids_of_the_whole(parts):
    text = "".join(parts)
    found = [one for one in text.split("<|endoftext|>") if one.strip()]
    assert ids_of(parts) == [i for one in found for i in [*GPT2.encode(one), GPT2.end_of_text]]


def test_a_text_is_arrays_that_end_in_end_of_text():
    (pieces,) = encode_texts(["a b ", "c d"], BYTES)
    assert np.concatenate(pieces).tolist() == [*b"a b c d", 256]
    assert {piece.dtype for piece in pieces} == {np.dtype(np.uint16)}
    assert [*encode_texts([" \n", "\t"], BYTES)] == [*encode_texts([], BYTES)] == []


def test_a_written_end_of_text_ends_a_text_wherever_a_part_ends():
    text = "one<|endoftext|><|endoftext|> \n<|endoftext|>two<|endoftext|"
    expected = [[*b"one", 256], [*b"two<|endoftext|", 256]]
    for cut in range(len(text) + 1):
        found = encode_texts([text[:cut], text[cut : cut + 3], text[cut + 3 :]], BYTES)
        assert [np.concatenate(pieces).tolist() for pieces in found] == expected
    found = encode_texts(text, BYTES)
    assert [np.concatenate(pieces).tolist() for pieces in found] == expected
    entries = encode_chat([("a<|endoftext|>b", False), ("c", True)], BYTES)
    assert entries.tolist() == [97, 256, 98, ~99, ~256, int(END)]


def test_entries_of_a_chat_and_of_a_label():
    entries = encode_chat([("ab", False), ("c", True), ("d", False), ("e", True)], BYTES)
    assert entries.tolist() == [97, 98, ~99, 100, ~101, ~256, int(END)]
    assert encode_labelled("ab", "é", BYTES).tolist() == [97, 98, ~0xC3, ~0xA9, int(END)]
    assert entries.dtype == np.int32
