"""Conversations: their text, their trained parts, and the same tokens in sampling."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt2.config.presets import TASKS
from nanogpt2.data.chat import segments
from nanogpt2.data.records import Record, RecordError
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


def test_messages_by_other_names():
    turns = [("human", "hi"), ("gpt", "Hello!")]
    parts = [("You: hi\nFriend:", False), (" Hello!", True)]
    for name in ("conversations", "conversation", "messages"):
        assert cut(**{name: [{"from": role, "value": text} for role, text in turns]}) == parts
    content = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]
    assert messages(("user", "hi"), ("assistant", content)) == parts
    system = [("Be kind.\n" + parts[0][0], False), parts[1]]
    for role in ("system", "developer"):
        assert messages((role, "Be kind."), ("user", "hi"), ("assistant", "Hello!")) == system
    assert messages(("system", ""), ("user", "hi"), ("assistant", "Hello!")) == parts
    pair = {"prompt": [{"role": "user", "content": "hi"}]}
    pair["completion"] = [{"role": "assistant", "content": "Hello!"}]
    assert cut(**pair) == parts


@pytest.mark.parametrize("empty", ["", None, " \n"])
def test_instructions(empty):
    parts = [("You: Add.\n1 and 2\nFriend:", False), (" 3", True)]
    assert cut(instruction="Add.", input="1 and 2", output="3") == parts
    assert cut(instruction="Add.", context=" 1 and 2 ", response="3 ", category="x") == parts
    alone = [("You: Add.\nFriend:", False), (" 3", True)]
    assert cut(instruction="Add.", input=empty, output="3") == alone
    assert cut(instruction="Add.", output="3") == alone


def test_calls_of_tools_and_their_results_are_left_out():
    left_out = []
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "t"}]}
    old = {"role": "assistant", "function_call": {"name": "clock"}}
    asked, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    parts = [("You: hi\nFriend:", False), (" yes", True)]
    for used, role in ((call, "tool"), (old, "function")):
        turns = [asked, used, {"role": role, "content": "5"}, answer]
        record = Record("'x.jsonl' line 3", {"messages": turns})
        assert segments(record, lambda reason, where: left_out.append(where)) == parts
    assert left_out == [f"'x.jsonl' line 3, message {n}" for n in (2, 3, 2, 3)]
    # words beside a call are trained on
    said = [asked, call | {"content": "One moment."}, {"role": "tool", "content": "5"}, answer]
    assert cut(messages=said)[1] == (" One moment.\n", True)


@pytest.mark.parametrize("text", [None, 5, {"value": "hi"}, ["hi"]])
def test_parts_of_a_message_must_be_texts(text):
    parts = [{"type": "text", "text": "hi"}, {"type": "text", "text": text}]
    with pytest.raises(RecordError, match="message 1: 'content' must be text"):
        cut(messages=[{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}])


def test_a_time_that_python_cannot_express_within_a_message():
    class Values(dict):
        def __getitem__(self, name):
            raise ValueError("nanoseconds")

    for name in ("messages", "prompt", "instruction"):
        record = Record("row 3", Values({name: [], "completion": "a", "output": "a"}))
        with pytest.raises(RecordError, match=f"row 3: '{name}' cannot be read: nanoseconds"):
            segments(record)


def test_an_empty_prompt_and_a_written_end():
    assert cut(prompt="", completion="b") == [("", False), ("b", True)]
    for end in ("<|endoftext|>", " <|endoftext|>\n", "<|endoftext|><|endoftext|>"):
        assert cut(prompt="a", completion=f" b{end}") == [("a", False), (" b", True)]
        assert messages(("user", "a"), ("assistant", f"b{end}"))[1] == (" b", True)
    with pytest.raises(RecordError, match="line 3: 'completion' is empty"):
        cut(prompt="a", completion="<|endoftext|>")


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
        (
            {"text": "a"},
            r"line 3 has no column 'prompt' \(nor 'messages', .*'instruction'\); .* found: 'text'",
        ),
        ({"prompt": None, "completion": "b"}, "line 3: 'prompt' must be text, not 'None'"),
        ({"prompt": "a", "completion": ""}, "line 3: 'completion' is empty"),
        ({"instruction": "a"}, "line 3 has no column 'output'"),
        ({"instruction": "a", "input": 5, "output": "b"}, "line 3: 'input' must be text, not '5'"),
        ({"instruction": "a", "output": None}, "line 3: 'output' must be text, not 'None'"),
        ({"conversations": None}, "'conversations' must be a list of messages, not 'None'"),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            "line 3, message 1: 'content' must be text, not 'None'",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]},
            "line 3 has no answer but calls of tools, which are not learnt",
        ),
        ({"prompt": "a", "completion": 5}, "line 3: 'completion' must be text, not '5'"),
        ({"messages": []}, "'messages' must be a list of messages"),
        ({"messages": "hi"}, "'messages' must be a list of messages, not 'hi'"),
        ({"messages": ["hi"]}, "message 1 must have a role and a content, not 'hi'"),
        ({"messages": [{"content": "a"}]}, "message 1 has no column 'role'"),
        ({"messages": [{"role": "user", "content": " "}]}, "message 1: 'content' is empty"),
        (
            {"messages": [{"role": "robot", "content": "a"}]},
            "message 1: role must be system, user, assistant, not 'robot'",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "line 3: the last message must be the assistant's, not user's",
        ),
    ],
)
def test_malformed_conversations(values, message):
    with pytest.raises(RecordError, match=message):
        cut(**values)
