"""Conversations: their text, their trained parts, and the same tokens in sampling."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt2.config.presets import TASKS
from nanogpt2.data.chat import segments
from nanogpt2.data.records import Record
from nanogpt2.tokenizer import gpt2_tokenizer


def cut(**values):
    return segments(Record("'x.jsonl' line 3", values))


def messages(*pairs):
    return cut(messages=[{"role": role, "content": content} for role, content in pairs])


def test_prompt_and_completion_stand_as_they_are():
    assert cut(prompt="Q: 1 \n", completion=" yes ") == [("Q: 1 \n", False), (" yes ", True)]


def test_messages():
    parts = messages(
        ("system", "Be kind.\n"), ("user", " hi "), ("user", "there"), ("assistant", "Hello!"),
        ("user", "bye"), ("assistant", " Bye. "),
    )  # fmt: skip
    assert parts == [
        ("Be kind.\nYou: hi\nYou: there\nFriend:", False),
        (" Hello!\n", True),
        ("You: bye\nFriend:", False),
        (" Bye.", True),
    ]


words = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_the_dialogue_preset_meets_the_tokens_that_were_trained_on(turns):
    tokenizer, preset = gpt2_tokenizer(), TASKS["dialogue"]
    parts = messages(
        *(pair for ask, answer in turns for pair in (("user", ask), ("assistant", answer)))
    )
    # the first question, as sample.py writes and tokenises it
    prompt = preset.template.format(turns[0][0].strip())
    assert parts[0] == (prompt, False)
    # a conversation so far, tokenised as one text
    *asked, (last, trained) = parts
    assert trained and last == f" {turns[-1][1].strip()}"
    in_parts = [i for text, _ in asked for i in tokenizer.encode(text)]
    assert in_parts == tokenizer.encode("".join(text for text, _ in asked))
    # a reply ends with the preset's stop string
    (stop,) = preset.options["stop_strings"]
    for (reply, trained), (question, _) in pairwise(parts):
        assert not trained or (reply[-1] + question).startswith(stop)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "a"}, "line 3 has no column 'completion'; columns found: 'prompt'"),
        ({"text": "a"}, "line 3 has no column 'prompt'; columns found: 'text'"),
        ({"prompt": "", "completion": "b"}, "line 3: 'prompt' is empty"),
        ({"prompt": "a", "completion": 5}, "line 3: 'completion' must be text, not '5'"),
        ({"messages": []}, "'messages' must be a list of messages"),
        ({"messages": "hi"}, "'messages' must be a list of messages, not 'hi'"),
        ({"messages": ["hi"]}, "message 1 must have a role and a content, not 'hi'"),
        ({"messages": [{"content": "a"}]}, "message 1 has no column 'role'"),
        ({"messages": [{"role": "user", "content": " "}]}, "message 1: 'content' is empty"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "message 1: role must be system, user, assistant, not 'tool'",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "line 3: the last message must be the assistant's, not user's",
        ),
    ],
)
def test_malformed_conversations(values, message):
    with pytest.raises(ValueError, match=message):
        cut(**values)
