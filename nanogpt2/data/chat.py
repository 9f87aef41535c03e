"""A record of a conversation -> its text in segments, each trained on or only read.

A record has either `prompt` and `completion`, taken as they stand, or `messages`: a list of
{"role": "system" | "user" | "assistant", "content": text} that ends with an assistant's message.
Messages are written in the format of sample.py's preset `dialogue`, so that the preset works with
the trained model:

    a system's text
    You: a user's text
    Friend: the assistant's text

The completions are trained on: " the assistant's text" and its end, which is <|endoftext|> at the
end of the record and a line feed elsewhere. Each segment is tokenised by itself, so that the tokens
of a prompt are the same in sampling as in training. White space around a message is dropped for the
same reason. This file does not know tokens.
"""

from nanogpt2.data.records import Record, excerpt

ROLES = ("system", "user", "assistant")


def segments(record: Record) -> list[tuple[str, bool]]:
    """Return the text in order, in segments, each with True if it is trained on.

    Raises ValueError that names the record's file and line for a malformed conversation.
    """
    if "messages" in record.values:
        return _dialogue(record)
    return [(record.text("prompt"), False), (record.text("completion"), True)]


def _dialogue(record: Record) -> list[tuple[str, bool]]:
    messages = record.values["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{record.where}: 'messages' must be a list of messages, not {excerpt(messages)}"
        )
    parts: list[tuple[str, bool]] = []
    asked = ""  # the text since the last completion
    role = None
    for i, message in enumerate(messages):
        where = f"{record.where}, message {i + 1}"
        if not isinstance(message, dict):
            raise ValueError(f"{where} must have a role and a content, not {excerpt(message)}")
        part = Record(where, message)
        role, content = part.value("role"), part.text("content").strip()
        if role == "assistant":
            end = "\n" if i < len(messages) - 1 else ""
            parts += [(asked + "Friend:", False), (f" {content}{end}", True)]
            asked = ""
        elif role in ROLES:
            asked += f"You: {content}\n" if role == "user" else f"{content}\n"
        else:
            raise ValueError(f"{where}: role must be {', '.join(ROLES)}, not {excerpt(role)}")
    if role != "assistant":
        raise ValueError(f"{record.where}: the last message must be the assistant's, not {role}'s")
    return parts
