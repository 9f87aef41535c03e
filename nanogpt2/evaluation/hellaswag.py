"""HellaSwag: choose the right one of four endings by its likelihood, without training.

A line of the file holds `ctx` (or `ctx_a` and `ctx_b`), `endings`, `label` (the right ending's
number) and `activity_label`. The model reads the context and a space before each ending
("completion style", without lettered choices). Two readings of a line are in use. Their published
figures differ, so both are measured:

    plain      the context unchanged (llm.c, build-nanogpt)
        acc        the ending with the largest sum of log p(token)
        acc_norm   the largest mean of log p(token), over the tokens
    harness    "activity_label: ctx_a Ctx_b", WikiHow's markup removed (EleutherAI's harness)
        acc        the largest sum
        acc_norm   the largest sum / characters of the ending, without its leading space
        acc_bytes  the largest sum / UTF-8 bytes; equal to acc_norm for ASCII

The harness reading is measured only if every line has `activity_label`, `ctx_a` and `ctx_b`. Among
equal scores the first ending is chosen. Source: Zellers et al. 2019.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nanogpt2.data.records import Record, excerpt
from nanogpt2.evaluation.continuations import Continuation, score
from nanogpt2.evaluation.perplexity import ignore_progress
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """A context, its possible endings and the number of the right ending."""

    context: str
    endings: tuple[str, ...]
    label: int


def read_hellaswag(records: Sequence[Record]) -> dict[str, list[Question]]:
    """Make the questions of each reading: plain, and harness if every record has its fields.

    Raises ValueError for a malformed record.
    """
    plain, harness = [], []
    for record in records:
        endings, columns = _endings(record), record.values.keys()
        label = record.label("label")
        if label not in map(str, range(len(endings))):
            raise ValueError(
                f"{record.where}: 'label' must be 0 to {len(endings) - 1}, not {excerpt(label)}"
            )
        parts = []
        if {"ctx_a", "ctx_b"} <= columns:
            # ctx_b is empty if ctx_a is a complete sentence
            parts = [record.text("ctx_a"), record.values["ctx_b"] and record.text("ctx_b")]
        if "ctx" in columns or not parts:
            context = record.text("ctx")
        else:
            context = " ".join(part for part in parts if part)
        plain.append(Question(context, endings, int(label)))
        if parts and "activity_label" in columns:
            # like the harness, use str.capitalize, which lowers the other letters
            rest = f"{parts[0]} {(parts[1] or '').capitalize()}"
            context = clean(f"{record.text('activity_label')}: {rest}")
            harness.append(Question(context, tuple(map(clean, endings)), int(label)))
    return {"plain": plain} | ({"harness": harness} if len(harness) == len(plain) else {})


def _endings(record: Record) -> tuple[str, ...]:
    endings = record.value("endings")
    several = endings if isinstance(endings, list) and len(endings) > 1 else [None]
    if not all(isinstance(ending, str) and ending.strip() for ending in several):
        raise ValueError(
            f"{record.where}: 'endings' must be two texts or more, not {excerpt(endings)}"
        )
    return tuple(several)


def clean(text: str) -> str:
    """Remove WikiHow's markup: " [title]" becomes ". ", other bracketed text is deleted."""
    found = []
    for line in text.strip().replace(" [title]", ". ").split("\n"):
        # stop at the last "]": a "[" without an end would search the whole line, each again
        closed, end, rest = line.rpartition("]")
        found.append(re.sub(r"\[.*?\]", "", closed + end) + rest)
    return "\n".join(found).replace("  ", " ")


def measure_hellaswag(
    model: GPT,
    tokenizer: Tokenizer,
    readings: dict[str, list[Question]],
    batch_size: int,
    block_size: int,
    advance: Callable[[int], object] = ignore_progress,
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
            # an ending that was only markup has length 0
            lengths["acc_norm"] = [max(1, len(ending)) for ending in endings]
            lengths["acc_bytes"] = [max(1, len(ending.encode())) for ending in endings]
        found[reading] = {
            name: _fraction_correct(questions, [s / n for s, n in zip(scores, by, strict=True)])
            for name, by in lengths.items()
        }
    return found


def _fraction_correct(questions: Sequence[Question], scores: Sequence[float]) -> float:
    correct, start = 0, 0
    for q in questions:
        own = scores[start : start + len(q.endings)]
        correct += own.index(max(own)) == q.label
        start += len(q.endings)
    return correct / len(questions)
