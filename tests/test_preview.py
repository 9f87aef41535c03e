"""The preview of a batch: the mask of the training step."""

import numpy as np

from nanogpt2.data.encode import encode_chat, encode_labelled
from nanogpt2.data.examples import chat_examples, labelled_examples
from nanogpt2.data.loader import make_batches
from nanogpt2.data.preview import preview
from nanogpt2.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
CONVERSATIONS = [
    [("You: hi\nFriend:", False), (" hello", True)],
    [("a", False), ("b", True), ("c", False), ("de", True)],
]
SHOWN = [
    [
        "21 tokens:",
        "  [not trained] 'You: hi\\nFriend:'",
        "  [trained    ] ' hello<|endoftext|>'",
    ],
    [
        "5 tokens:",
        "  [not trained] 'a'",
        "  [trained    ] 'b'",
        "  [not trained] 'c'",
        "  [trained    ] 'de<|endoftext|>'",
    ],
]


def batches(examples, block_size=99, seed=0):
    return make_batches(examples, block_size, seed)


def chat():
    return chat_examples(np.concatenate([encode_chat(parts, BYTES) for parts in CONVERSATIONS]))


def labelled(*pairs):
    return labelled_examples(np.concatenate([encode_labelled(*pair, BYTES) for pair in pairs]))


def test_a_preview_shows_the_mask_in_the_order_of_the_batch():
    orders = set()
    for seed in range(8):
        found = batches(chat(), seed=seed)
        order = [found.rows(n, 1)[0].size(1) == 5 for n in range(2)]
        orders.add(tuple(order))
        expected = [f"example {n + 1}, " + "\n".join(SHOWN[i]) for n, i in enumerate(order)]
        assert preview(*found.rows(0, 2), BYTES) == "\n".join(expected)
    assert len(orders) == 2


def test_a_long_chat_shows_its_trained_end():
    conversation = chat_examples(encode_chat(CONVERSATIONS[0], BYTES))
    assert preview(*batches(conversation, block_size=3).rows(0, 1), BYTES) == (
        "example 1, 3 tokens:\n"
        # the first token kept belongs to a completion, but no input predicts it
        "  [not trained] 'l'\n"
        "  [trained    ] 'lo<|endoftext|>'"
    )


def test_a_classification_shows_the_label_and_the_text_that_is_kept():
    examples = labelled(("good", "up"), ("bad", "down"))
    found = batches(examples, block_size=3)
    texts = {"up": "goo", "down": "bad"}
    labels = [examples.labels[int(y.max())] for y in found.rows(0, 2)[1]]
    assert preview(*found.rows(0, 2), BYTES, examples.labels) == "\n".join(
        f"example {n}, 3 tokens:\n  [not trained] {texts[label]!r}\n  [trained    ] label {label!r}"
        for n, label in enumerate(labels, start=1)
    )


def test_a_long_text_is_shortened():
    examples = labelled(("ab " * 5000, "x"), ("ab " * 5000, "y"))
    long = preview(*batches(examples, 20_000).rows(0, 1), BYTES, examples.labels)
    assert " ... " in long and len(long) < 600
