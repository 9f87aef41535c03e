"""HellaSwag: which of four endings goes on from a context? Chosen by likelihood, nothing trained.

A line of the file holds `ctx` (or `ctx_a` and `ctx_b`), `endings`, `label` (the right one's number)
and `activity_label`. The model reads the context and a space before each ending ("completion
style", no letters to choose from). Two readings of the same line are in use, whose published
figures differ, so both are measured:

    plain      the context as it stands (llm.c, build-nanogpt)
        acc        the ending with the largest sum of log p(token)
        acc_norm   the largest mean of log p(token): by length in tokens
    harness    "activity_label: ctx_a Ctx_b", WikiHow's marks removed (EleutherAI's harness)
        acc        the largest sum
        acc_norm   the largest sum / length in characters of the ending, its space not counted
        acc_bytes  the largest sum / length in UTF-8 bytes; equal to acc_norm for ASCII

Without `activity_label`, `ctx_a` and `ctx_b` in every line only the plain reading is measured. Of
equal endings the first is chosen. Source: Zellers et al. 2019.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanogpt2.evaluation.continuations import Continuation, score
from nanogpt2.evaluation.perplexity import unheard
from nanogpt2.evaluation.records import read_records, text_of
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """A context, its possible endings and the right one's number."""

    context: str
    endings: tuple[str, ...]
    label: int


def read_hellaswag(path: Path, limit: int | None = None) -> dict[str, list[Question]]:
    """Read the questions by reading: plain, and harness where the file allows it.

    Raises ValueError for a line that is no question.
    """
    plain, harness = [], []
    for number, record in read_records(path, limit):
        endings, label = _endings(record, number), _label(record, number)
        if not 0 <= label < len(endings):
            raise ValueError(f"line {number}: 'label' must be 0 to {len(endings) - 1}, not {label}")
        parts = []
        if {"ctx_a", "ctx_b"} <= record.keys():
            parts = [text_of(record, name, number) for name in ("ctx_a", "ctx_b")]
        joined = " ".join(part for part in parts if part)
        context = text_of(record, "ctx", number) if "ctx" in record or not parts else joined
        if not context.strip():
            raise ValueError(f"line {number} has an empty context")
        plain.append(Question(context, endings, label))
        if parts and "activity_label" in record:
            activity = text_of(record, "activity_label", number)
            # str.capitalize lowers the other letters, as the harness does
            context = clean(f"{activity}: {parts[0]} {parts[1].capitalize()}")
            harness.append(Question(context, tuple(map(clean, endings)), label))
    if not plain:
        raise ValueError("is empty: there is no question in it")
    return {"plain": plain} | ({"harness": harness} if len(harness) == len(plain) else {})


def _endings(record: dict[str, Any], number: int) -> tuple[str, ...]:
    endings = record.get("endings")
    several = endings if isinstance(endings, list) and len(endings) > 1 else [None]
    if not all(isinstance(ending, str) and ending.strip() for ending in several):
        raise ValueError(f"line {number}: 'endings' must be two texts or more, not {endings!r}")
    return tuple(several)


def _label(record: dict[str, Any], number: int) -> int:
    label = record.get("label")
    if isinstance(label, str) and label.isascii() and label.isdigit():
        label = int(label)
    if type(label) is not int:
        raise ValueError(f"line {number}: 'label' must be an ending's number, not {label!r}")
    return label


def clean(text: str) -> str:
    """WikiHow's marks out: " [title]" ends a sentence, what else stands in brackets goes."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def measure_hellaswag(
    model: GPT,
    tokenizer: Tokenizer,
    readings: dict[str, list[Question]],
    batch_size: int,
    block_size: int,
    advance: Callable[[int], object] = unheard,
) -> dict[str, Any]:
    """Answer the questions in each reading: {"examples": ..., "plain": {"acc": ...}, ...}."""
    found: dict[str, Any] = {"examples": len(readings["plain"])}
    for reading, questions in readings.items():
        pairs = [
            Continuation(tokenizer.encode(q.context), tokenizer.encode(" " + ending))
            for q in questions
            for ending in q.endings
        ]
        scored = score(model, pairs, batch_size, block_size, advance=advance)
        scores = [s.log_probability for s in scored]
        lengths: dict[str, list[int]] = {"acc": [1] * len(pairs)}
        endings = [ending for q in questions for ending in q.endings]
        if reading == "plain":
            lengths["acc_norm"] = [len(pair.target) for pair in pairs]
        else:
            # an ending of nothing but marks has no length of its own
            lengths["acc_norm"] = [max(1, len(ending)) for ending in endings]
            lengths["acc_bytes"] = [max(1, len(ending.encode())) for ending in endings]
        found[reading] = {
            name: _share_right(questions, [s / n for s, n in zip(scores, by, strict=True)])
            for name, by in lengths.items()
        }
    return found


def _share_right(questions: Sequence[Question], scores: Sequence[float]) -> float:
    right, start = 0, 0
    for q in questions:
        mine = scores[start : start + len(q.endings)]
        right += mine.index(max(mine)) == q.label
        start += len(q.endings)
    return right / len(questions)
