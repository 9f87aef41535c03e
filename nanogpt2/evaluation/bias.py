"""Bias by paired prompts: what a model says differently when one word about a person changes.

The file holds pairs, one a record. Without a file, assets/pairs.jsonl.

    first, second    two texts that differ in one respect: "The man works as a", "The woman works
                     as a"
    continuations    optional, a list: texts that may follow either, as " nurse" (with its space)
    group            optional: the kind of the pair, as "gender"; each group has its own means

Of each pair, with p and q the next token's probabilities after the first and after the second:

    total_variation  half the sum of |p - q|: the part of the probability that moves; 0 to 1
    js_divergence    Jensen and Shannon's, in bits: 0 for equal distributions, 1 for disjoint ones
    shifts           the token whose probability is raised most by the first, and by the second

Of each continuation c, in nats: log p(c | first), log p(c | second) and their difference. Positive:
c is likelier after the first. `mean_difference` is the mean of its absolute value.

Every change of a word moves the probabilities. Compare a group with one whose pairs differ in a
respect that should not matter: the packaged pairs have the group "control". A small difference does
not show that a model is fair. This file looks at a few prompts, not at what a model writes at
length, and knows neither which difference is unjust nor which is true.

Sources: Sheng et al. 2019, "The Woman Worked as a Babysitter"; Nangia et al. 2020, "CrowS-Pairs";
Blodgett et al. 2021, "Stereotyping Norwegian Salmon", on how such pairs mislead.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from nanogpt2.data.records import Record, excerpt
from nanogpt2.evaluation.continuations import Continuation, score
from nanogpt2.evaluation.perplexity import ignore_progress, pad
from nanogpt2.metrics import finite
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pair:
    """Two prompts that differ in one respect, and texts that may follow them."""

    first: str
    second: str
    continuations: tuple[str, ...]
    group: str

    @property
    def name(self) -> str:
        """Both prompts in one: "The {man|woman} works as a"."""
        a, b = self.first.split(" "), self.second.split(" ")
        start = _common(a, b)
        end = _common(a[start:][::-1], b[start:][::-1])
        parts = (" ".join(words[start : len(words) - end]) for words in (a, b))
        return " ".join([*a[:start], "{" + "|".join(parts) + "}", *a[len(a) - end :]])


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Count the words at the start that are equal."""
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def read_pairs(records: Sequence[Record]) -> list[Pair]:
    """Make the pairs. Raises ValueError for a malformed record, equal prompts, a repeated pair."""
    found: dict[tuple[str, str], Pair] = {}
    for record in records:
        first, second = record.text("first"), record.text("second")
        if first == second:
            raise ValueError(f"{record.where}: 'first' and 'second' must differ")
        if (first, second) in found:
            raise ValueError(f"{record.where} repeats a pair: {excerpt(first)}")
        group = record.label("group") if "group" in record.values else "all"
        found[first, second] = Pair(first, second, _continuations(record), group)
    return list(found.values())


def _continuations(record: Record) -> tuple[str, ...]:
    texts = record.values.get("continuations", [])
    if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
        raise ValueError(
            f"{record.where}: 'continuations' must be a list of texts, not {excerpt(texts)}"
        )
    return tuple(dict.fromkeys(texts))


def measure_bias(
    model: GPT,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    batch_size: int,
    block_size: int,
    advance: Callable[[int], object] = ignore_progress,
) -> dict[str, Any]:
    """Compare the two prompts of each pair; the figures are defined in the file's docstring.

    advance: called with the number of prompts and of continuations in each finished batch. Raises
    ValueError for a prompt longer than `block_size`, FloatingPointError for scores that are not
    finite.
    """
    prompts = [tokenizer.encode(text) for pair in pairs for text in (pair.first, pair.second)]
    for ids in prompts:
        if len(ids) > block_size:
            text = excerpt(tokenizer.decode(ids))
            raise ValueError(f"{text} has {len(ids)} tokens; the block size is {block_size}")
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    rows: list[Tensor] = []
    for batch in batches:
        rows += next_token(model, batch)
        advance(len(batch))
    asked = [
        Continuation(ids, tokenizer.encode(text))
        for n, pair in enumerate(pairs)
        for text in pair.continuations
        for ids in prompts[2 * n : 2 * n + 2]
    ]
    scored = score(model, asked, batch_size, block_size, advance=advance)
    values = iter(s.log_probability for s in scored)
    changes, shifts, likelihoods = {}, {}, {}
    # (group, changes, absolute differences) of each pair
    seen: list[tuple[str, dict[str, float], list[float]]] = []
    for pair, p, q in zip(pairs, rows[::2], rows[1::2], strict=True):
        changes[pair.name] = change(p, q)
        for token in ((p - q).argmax(), (q - p).argmax()):
            shifts[f"{pair.name} -> {_shown(tokenizer, int(token))}"] = {
                "first": p[token].item(),
                "second": q[token].item(),
            }
        differences = []
        for text in pair.continuations:
            first, second = next(values), next(values)
            differences.append(abs(first - second))
            likelihoods[f"{pair.name} -> {text!r}"] = {
                "first": first,
                "second": second,
                "difference": first - second,
            }
        seen.append((pair.group, changes[pair.name], differences))
    tables = {
        "groups": _means(seen),
        "pairs": changes,
        "shifts": shifts,
        "continuations": likelihoods,
    }
    return {"examples": len(pairs)} | tables


def _means(seen: Sequence[tuple[str, dict[str, float], list[float]]]) -> dict[str, Any]:
    """Return the means of each group, in the order of the file."""
    groups = {}
    for group in dict.fromkeys(name for name, _, _ in seen):
        moved = [found for name, found, _ in seen if name == group]
        nats = [x for name, _, differences in seen if name == group for x in differences]
        groups[group] = {
            "pairs": len(moved),
            "total_variation": mean(found["total_variation"] for found in moved),
            "js_divergence": mean(found["js_divergence"] for found in moved),
            "continuations": len(nats),
            "mean_difference": mean(nats or [0.0]),
        }
    return groups


@torch.no_grad()
def next_token(model: GPT, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the next token's probabilities after each row, float64 (V,) on the CPU."""
    x = model.hidden_states(pad(rows, 0).to(model.wte.weight.device))  # (B, T, C)
    last = torch.stack([hidden[len(row) - 1] for hidden, row in zip(x, rows, strict=True)])
    p = model.logits(last).double().softmax(dim=-1).cpu()  # (B, V)
    finite(p.sum().item())
    return list(p)


def _shown(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text in quotes; the bytes of a part of a character."""
    text = tokenizer.decode([token])
    return repr(tokenizer.decode_bytes([token]) if "\ufffd" in text else text)


def change(p: Tensor, q: Tensor) -> dict[str, float]:
    """Return the distances of two distributions, each (V,)."""
    middle = (p + q) / 2
    # 0 log 0 = 0
    nats = sum(torch.xlogy(x, x / middle).nan_to_num(0.0).sum().item() for x in (p, q)) / 2
    return {
        "total_variation": (p - q).abs().sum().item() / 2,
        "js_divergence": max(0.0, nats / math.log(2)),
    }
