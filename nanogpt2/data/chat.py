"""A record of a conversation -> its text in segments, each trained on or only read.

A record has either `prompt` and `completion`, taken as they stand, or `messages`: a list of
{"role": "system" | "user" | "assistant", "content": text}, the last one the assistant's. Messages
are written as the preset `dialogue` of sample.py asks, so that it talks to the model trained here:

    a system's text
    You: a user's text
    Friend: the assistant's text

Trained on are the completions, that is " the assistant's text" and what ends it: <|endoftext|> at
the end of the record, the line's end before it. Each segment is tokenised by itself: the prompt
that sampling tokenises is then token for token the one that was trained on. White space around a
message is dropped, for the same reason. Nothing here knows tokens.
"""

from nanogpt2.data.records import Record, excerpt

ROLES = ("system", "user", "assistant")


def segments(record: Record) -> list[tuple[str, bool]]:
    """Return the text in order, each part with True where it is trained on.

    Raises ValueError, with the record's place, for a conversation that is none.
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
    asked = ""  # what was said since the last completion
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
