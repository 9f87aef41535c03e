"""Entries -> inputs and targets: masking, truncation, numbers of labels."""

import numpy as np
import pytest

from nanogpt2.data.encode import encode_chat, encode_labelled
from nanogpt2.data.examples import chat_examples, labelled_examples
from nanogpt2.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()


def chat(*conversations):
    return chat_examples(np.concatenate([encode_chat(parts, BYTES) for parts in conversations]))


def labelled(*pairs, labels=()):
    stream = np.concatenate([encode_labelled(text, label, BYTES) for text, label in pairs])
    return labelled_examples(stream, labels)


def lists(pair):
    return [ids.tolist() for ids in pair]


def test_a_chat_trains_on_completions_and_their_end():
    examples = chat(
        [("ab", False), ("cd", True)],
        [("x", False), ("y", True), ("z", False), ("w", True)],
    )
    assert len(examples) == 2 and examples.longest == 4 and examples.tokens == 8
    assert lists(examples.example(0, 99)) == [[*b"abcd"], [-100, *b"cd", 256]]
    assert lists(examples.example(1, 99)) == [[*b"xyzw"], [*b"y", -100, *b"w", 256]]
    assert examples.example(0, 99)[0].dtype == examples.example(0, 99)[1].dtype == np.int64


def test_a_long_chat_keeps_its_end():
    examples = chat([("prompt", False), ("end", True)])
    assert lists(examples.example(0, 9)) == lists(examples.example(0, 99))
    assert lists(examples.example(0, 5)) == [[*b"ptend"], [-100, *b"end", 256]]
    assert lists(examples.example(0, 2)) == [[*b"nd"], [*b"d", 256]]
    assert lists(examples.example(0, 1)) == [[*b"d"], [256]]
    assert examples.longest == 9


def test_a_classification_has_one_target_at_the_last_token_kept():
    examples = labelled(("good", "up"), ("a", "down"), ("worse", "down"))
    assert examples.labels == ("down", "up") and examples.longest == 5 and examples.tokens == 10
    assert lists(examples.example(0, 99)) == [[*b"good"], [-100, -100, -100, 1]]
    assert lists(examples.example(1, 99)) == [[*b"a"], [0]]
    assert lists(examples.example(2, 2)) == [[*b"wo"], [-100, 0]]


def test_labels_are_sorted_numbers_as_numbers():
    pairs = [("x", label) for label in ("10", "b", "9", "-1", "a", "é", "b", "10")]
    examples = labelled(*pairs)
    assert examples.labels == ("-1", "9", "10", "a", "b", "é")
    assert [examples.labels[c] for c in examples.classes] == [label for _, label in pairs]


def test_unknown_labels_are_refused():
    given = ("up", "down", "never seen")
    examples = labelled(("x", "down"), ("y", "up"), labels=given)
    assert examples.labels == given and examples.classes.tolist() == [1, 0]
    with pytest.raises(ValueError, match="labels unseen in training: '9', '10', 'left'"):
        labelled(("x", "left"), ("y", "10"), ("x", "9"), ("y", "up"), labels=given)


def test_examples_are_selected_by_index():
    examples = labelled(("one", "a"), ("two", "b"), ("three", "a")).select(np.array([2, 1]))
    assert len(examples) == 2 and examples.tokens == 8 and examples.labels == ("a", "b")
    assert lists(examples.example(0, 9)) == [[*b"three"], [-100] * 4 + [0]]
    assert lists(examples.example(1, 9)) == [[*b"two"], [-100, -100, 1]]
