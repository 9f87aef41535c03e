"""A record of a conversation -> its text in segments, each trained on or only read.

A record has one of these forms:

    messages       a list of {"role": "system" | "user" | "assistant", "content": text}
    conversations  the same as {"from": "system" | "human" | "gpt", "value": text}
    instruction    a question, with `input` (or `context`), and its answer, `output` (or `response`)
    prompt         and `completion`, taken as they stand, or as lists of messages; `prompt` may be
                   empty

The first three end with an assistant's message. They are written in the format of sample.py's
preset `dialogue`, so that the preset works with the trained model:

    a system's text
    You: a user's text
    Friend: the assistant's text

The completions are trained on: " the assistant's text" and its end, which is <|endoftext|> at the
end of the record and a line feed elsewhere. Each segment is tokenised by itself, so that the tokens
of a prompt are the same in sampling as in training. White space around a message is dropped for the
same reason. A call of a tool and its result are left out: the model learns to write, not to call.
This file does not know tokens.
"""

import re
from typing import Any

from nanogpt2.config import Skip, no_report
from nanogpt2.data.records import Record, RecordError, excerpt
from nanogpt2.tokenizer import END_OF_TEXT

# a role in a record -> our role
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant")
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
LISTS = ("messages", "conversations", "conversation")


def segments(
    record: Record, skip: Skip = no_report, end: str = END_OF_TEXT
) -> list[tuple[str, bool]]:
    """Return the text in order, in segments, each with True if it is trained on.

    skip: told of each message left out. end: the text of the token that ends a text. Raises
    RecordError for a malformed conversation.
    """
    values = record.values
    for name in LISTS:
        if name in values:
            return _dialogue(record, name, record.value(name), skip, end)
    if "instruction" in values:
        answer = "output" if "output" in values or "response" not in values else "response"
        # an instruction needs no input
        more = [
            name
            for name in ("input", "context")
            if name in values and str(record.value(name) or "").strip()
        ]
        question = "\n".join(record.text(name).strip() for name in ("instruction", *more))
        turn = [("user", question), ("assistant", record.text(answer))]
        messages = [{"role": role, "content": content} for role, content in turn]
        return _dialogue(record, "instruction", messages, skip, end)
    if "prompt" not in values:
        names = ", ".join(map(repr, (*LISTS[:2], "instruction")))
        found = ", ".join(map(repr, values)) or "none"
        reason = f" has no column 'prompt' (nor {names}); columns found: {found}"
        raise RecordError(record.where, reason)
    prompt, completion = record.value("prompt"), record.value("completion")
    if isinstance(prompt, list):
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if isinstance(completion, list):
            return _dialogue(record, "prompt", prompt + completion, skip, end)
    asked = "" if prompt == "" else record.text("prompt")
    return [(asked, False), (_without_end(record, "completion", end), True)]


def _without_end(record: Record, column: str, end: str) -> str:
    """Return a text without a written <|endoftext|> at its end: the encoder adds the token."""
    ends = re.compile(r"(\s*" + re.escape(end) + r"\s*)+\Z")
    text = ends.sub("", record.text(column))
    return text or Record(record.where, {column: ""}).text(column)


def _dialogue(
    record: Record, name: str, messages: Any, skip: Skip, end: str
) -> list[tuple[str, bool]]:
    if not isinstance(messages, list) or not messages:
        reason = f": {name!r} must be a list of messages, not {excerpt(messages)}"
        raise RecordError(record.where, reason)
    parts: list[tuple[str, bool]] = []
    asked = ""  # the text since the last completion
    role, tools = None, list[str]()
    for i, message in enumerate(messages):
        part = _message(f"{record.where}, message {i + 1}", message)
        if _is_tools(part, skip):
            role, tools = "tool", [*tools, *_tool_names(part)]
            continue
        role = _role(part)
        if role == "system" and part.values["content"] == "":
            continue
        content = _without_end(part, "content", end).strip()
        if role == "assistant":
            after = "\n" if i < len(messages) - 1 else ""
            parts += [(asked + "Friend:", False), (f" {content}{after}", True)]
            asked = ""
        else:
            asked += f"You: {content}\n" if role == "user" else f"{content}\n"
    if role == "tool":
        named = f" ({', '.join(dict.fromkeys(tools))})" if tools else ""
        only = "has no answer but calls of tools" if not parts else "ends with a call of a tool"
        raise RecordError(record.where, f" {only}{named}, which are not learnt")
    if role != "assistant":
        reason = f": the last message must be the assistant's, not {role}'s"
        raise RecordError(record.where, reason)
    return parts


def _message(where: str, message: Any) -> Record:
    """Return a message with `role` and `content`, whatever names it has; parts become one text."""
    if not isinstance(message, dict):
        raise RecordError(where, f" must have a role and a content, not {excerpt(message)}")
    values = dict(message)
    for ours, theirs in (("role", "from"), ("content", "value")):
        if ours not in values and theirs in values:
            values[ours] = values.pop(theirs)
    parts = values.get("content")
    if isinstance(parts, list) and all(
        isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts
    ):
        values["content"] = "".join(part["text"] for part in parts)
    return Record(where, values)


def _is_tools(message: Record, skip: Skip) -> bool:
    """Tell whether a message is a tool's result, or calls a tool and says nothing."""
    values = message.values
    calls = (values.get("tool_calls") or values.get("function_call")) and not values.get("content")
    if not (calls or values.get("role") in TOOL_ROLES):
        return False
    skip("calls of tools and their results", message.where)
    return True


def _tool_names(message: Record) -> list[str]:
    """Return the names of the tools that a message calls, as far as it has them."""
    calls = message.values.get("tool_calls")
    found = [*(calls if isinstance(calls, list) else []), message.values.get("function_call")]
    named = [call.get("function", call) for call in found if isinstance(call, dict)]
    return [repr(one["name"]) for one in named if isinstance(one, dict) and "name" in one]


def _role(message: Record) -> str:
    role = message.value("role")
    if not isinstance(role, str) or role.lower() not in ROLES:
        reason = f": role must be system, user, assistant, not {excerpt(role)}"
        raise RecordError(message.where, reason)
    return ROLES[role.lower()]
