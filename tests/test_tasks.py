"""A wrong or missing --task: the columns tell the right one. Forms of a chat that are read."""

import json

import pytest

from nanogpt2.data.corpus import Columns, load_corpus
from nanogpt2.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
TALK = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A boat."}]
WORDS = "A boat crossed the river, and nobody on the other side had seen it come. "
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock"}}]}


def written(path, *records, count=8):
    path.write_text("".join(json.dumps(record) + "\n" for record in records * count))
    return str(path)


CHATS = {
    "messages": {"messages": TALK},
    "conversations": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt"}]},
    "prompt": {"prompt": "a", "completion": " b"},
    "instruction": {"instruction": "a", "output": "b"},
    "array": TALK,
}


@pytest.mark.parametrize("task", ["lm", "classify"])
@pytest.mark.parametrize("form", CHATS)
def test_a_chat_under_another_task(tmp_path, task, form):
    source = written(tmp_path / "c.jsonl", CHATS[form])
    with pytest.raises(
        ValueError,
        match=r"c\.jsonl' \w+ 1 has no column 'text', but '\w+'.*: --task chat reads these",
    ):
        load_corpus(source, BYTES, task)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": WORDS}, "has no column 'prompt', but 'text': --task lm learns it"),
        ({"text": WORDS, "label": "x"}, "--task classify learns 'label', --task lm the texts"),
        ({"text": WORDS, "class": 1}, "--task classify --label_column class learns 'class'"),
    ],
)
def test_texts_under_chat(tmp_path, record, said):
    with pytest.raises(ValueError, match="line 1 has no column 'prompt'") as raised:
        load_corpus(written(tmp_path / "t.jsonl", record), BYTES, "chat")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("task", "record", "said"),
    [
        ("lm", {"id": "7", "body": WORDS}, "columns found: 'id', 'body'; try --text_column body"),
        ("lm", {"a b": WORDS}, "try --text_column 'a b'"),
        ("classify", {"body": WORDS, "label": "x"}, "try --text_column body"),
        ("classify", {"text": WORDS, "class": "x"}, "try --label_column class"),
        ("lm", {f"column {i}": WORDS[:i] for i in range(40)}, "try --text_column 'column 39'"),
    ],
)
def test_columns_by_other_names(tmp_path, task, record, said):
    with pytest.raises(ValueError, match="line 1 has no column") as raised:
        load_corpus(written(tmp_path / "t.jsonl", record), BYTES, task)
    assert said in str(raised.value) and len(str(raised.value).replace(str(tmp_path), "")) < 170


def test_texts_that_could_be_more(tmp_path):
    def note(*records, **options):
        said = load_corpus(written(tmp_path / "n.jsonl", *records), BYTES, **options).describe(64)
        return said.partition("note: ")[2]

    spam, ham = {"text": WORDS, "label": "spam"}, {"text": WORDS, "label": "ham"}
    assert note(spam, ham) == "the records have 'label' too: --task classify would learn to tell it"
    # from the cache, too
    assert note(spam, ham).startswith("the records have 'label' too")
    assert "--task classify --label_column class " in note({"text": WORDS, "class": 3})
    assert "--task chat would learn the answers" in note({"text": WORDS, "messages": TALK})
    assert note({"text": WORDS, "title": "x"}) == note({"text": WORDS, "label": WORDS}) == ""
    assert note(spam, ham, task="classify") == ""
    assert note({"body": WORDS, "sentiment": 1}, columns=Columns("body")) == (
        "the records have 'sentiment' too: --task classify --label_column sentiment would learn to "
        "tell it"
    )


def test_folders_that_could_be_labels(tmp_path):
    for label in ("good", "bad"):
        (tmp_path / "t" / label).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "t" / label / f"{i}.txt").write_text(f"{label} {i} {WORDS}")
    said = "note: the texts lie in 2 folders (bad, good): --task classify would learn them"
    assert load_corpus(str(tmp_path / "t"), BYTES).describe(64).endswith(said)
    assert load_corpus(str(tmp_path / "t"), BYTES).describe(64).endswith(said)
    assert "note" not in load_corpus(str(tmp_path / "t"), BYTES, "classify").describe(64)
    assert "note" not in load_corpus(str(tmp_path / "t/good"), BYTES).describe(64)


@pytest.mark.parametrize("task", ["chat", "classify"])
def test_a_text_file_under_another_task(tmp_path, task):
    (tmp_path / "book.txt").write_text(WORDS * 9)
    with pytest.raises(ValueError, match="--task lm learns texts"):
        load_corpus(str(tmp_path / "book.txt"), BYTES, task)


@pytest.mark.parametrize(
    "text",
    [
        # an array of messages a line; one array of such arrays; arrays over several lines
        "\n".join([json.dumps(TALK)] * 4),
        json.dumps([TALK] * 4),
        json.dumps([TALK] * 4, indent=1),
        json.dumps([{"messages": TALK}] * 4, indent=1),
        "\n".join([json.dumps(TALK, indent=1)] * 4),
        "\n".join([json.dumps({"prompt": TALK[:1], "completion": "A boat."})] * 4),
        "\n".join([json.dumps({"prompt": TALK[:1], "completion": TALK[1:]})] * 4),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_forms_of_a_chat(tmp_path, text, suffix):
    path = tmp_path / f"c{suffix}"
    path.write_text(text)
    corpus = load_corpus(str(path), BYTES, "chat")
    assert corpus.readings[0].records == 4
    inputs, _ = corpus.train.example(0, 99)
    assert BYTES.decode(inputs.tolist()).startswith("You: Who are you?\nFriend: A boat.")


def test_one_conversation_is_one_record(tmp_path):
    path = tmp_path / "c.json"
    for text in (json.dumps(TALK), json.dumps(TALK, indent=1)):
        path.write_text(text)
        with pytest.raises(ValueError, match="too few records to hold one out"):
            load_corpus(str(path), BYTES, "chat")


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([TALK[0], CALL], "has no answer but calls of tools ('clock'), which are not learnt"),
        ([TALK[0], CALL, {"role": "tool", "content": "5"}], "has no answer but calls of tools"),
        ([CALL, CALL], "calls of tools ('clock'), which"),
        ([*TALK, TALK[0], CALL], "ends with a call of a tool ('clock'), which are not learnt"),
        ([TALK[0], {"role": "assistant", "function_call": {"name": "f"}}], "tools ('f')"),
        ([TALK[0], {"role": "assistant", "tool_calls": [7, {"name": "g"}]}], "tools ('g')"),
    ],
)
def test_a_record_of_tool_calls_alone_is_refused_by_name(tmp_path, turns, said):
    source = written(tmp_path / "c.jsonl", {"messages": turns}, count=1)
    with pytest.raises(ValueError, match="line 1 ") as raised:
        load_corpus(source, BYTES, "chat")
    assert said in str(raised.value)
