"""A record's columns -> the --task that reads them, for those who left it out or mistook it.

This file does not know files. A suggestion is a part of a line: the caller says where it was.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanogpt2.data.chat import LISTS
from nanogpt2.data.files import DataFile

LABELS = ("label", "labels", "class", "category", "sentiment")
LONGEST_LABEL = 40  # characters; a longer value is a text
LONGEST_LIST = 60  # characters of the columns' names in a line
MOST_FOLDERS = 50  # more folders are hardly labels


def chat_columns(values: Mapping[str, Any]) -> list[str]:
    """Return the columns that make a record a conversation; none if it is no conversation."""
    lists = [name for name in LISTS if isinstance(values.get(name), list)]
    if lists:
        return lists[:1]
    pairs = (("prompt", "completion"), ("instruction", "output"), ("instruction", "response"))
    return next((list(pair) for pair in pairs if all(name in values for name in pair)), [])


def label_column(values: Mapping[str, Any], named: str) -> str | None:
    """Return the column that looks like a label: `named` or a usual name, with a short value."""
    for name in (named, *LABELS):
        if name in values and values[name] is not None and len(str(values[name])) <= LONGEST_LABEL:
            return name
    return None


def right_task(values: Mapping[str, Any], task: str, text: str, label: str) -> str:
    """Say which other task, or which columns, read a record that `task` cannot use; or "".

    text, label: the names of the columns.
    """
    chat = chat_columns(values)
    if chat and task != "chat":
        missing = label if text in values else text
        some = " and ".join(map(repr, chat))
        return f"has no column {missing!r}, but {some}: --task chat reads these"
    if text in values and task == "chat":
        found = label_column(values, label)
        return f"has no column 'prompt', but {text!r}: {_tasks(found, label)}"
    found, flag = "", ""
    if task != "chat" and text not in values:
        # the longest text is the likeliest
        texts = [name for name, value in values.items() if isinstance(value, str) and value.strip()]
        found, flag = max(texts, key=lambda name: len(values[name]), default=""), "text_column"
    elif task == "classify" and label not in values:
        found, flag = label_column(values, label) or "", "label_column"
    if not found:
        return ""
    wanted = text if flag == "text_column" else label
    names = ", ".join(map(repr, values))
    names = names if len(names) <= LONGEST_LIST else names[: LONGEST_LIST - 3] + "..."
    return f"has no column {wanted!r}; columns found: {names}; try --{flag} {shlex.quote(found)}"


def _tasks(found: str | None, label: str) -> str:
    if found is None:
        return "--task lm learns it"
    return f"--task classify{_named(found, label)} learns {found!r}, --task lm the texts"


def _named(found: str, label: str) -> str:
    return "" if found == label else f" --label_column {found}"


def further_task(values: Mapping[str, Any], label: str) -> str:
    """Say what another task would make of a record whose text is learnt; "" for no other."""
    if chat := chat_columns(values):
        return f"note: the records have {chat[0]!r} too: --task chat would learn the answers"
    if found := label_column(values, label):
        how = f"--task classify{_named(found, label)}"
        return f"note: the records have {found!r} too: {how} would learn to tell it"
    return ""


def labels_in_folders(source: str, files: Sequence[DataFile]) -> str:
    """Say that the texts of a source lie in folders that may be labels; "" where they do not."""
    parents = [Path(file.name).parent for file in files]
    names = sorted({parent.name for parent in parents})
    are_labels = (
        1 < len(names) <= MOST_FOLDERS
        and len(files) >= 2 * len(names)
        and all(file.format == ".txt" for file in files)
        and all(parent.parent == Path(source) for parent in parents)
    )
    if not are_labels:
        return ""
    some = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    return f"note: the texts lie in {len(names)} folders ({some}): --task classify would learn them"
