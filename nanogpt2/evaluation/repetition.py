"""Repetition: how often a model repeats itself, by the way of decoding.

The file holds prompts: one {"text": ...} a record. Without a file, assets/prompts.jsonl. Each way
of WAYS continues every prompt by the same number of tokens; the end token is held back, so that all
texts have one length. The figures count the new tokens alone and are means over the texts:

    distinct_1, distinct_2   different n-grams / n-grams (Li et al. 2016); both fall with length
    repeated_4               1 - different 4-grams / 4-grams: the share said before; Welleck et al.
                             2020 call it seq-rep-4
    loops                    the fraction of texts that end in a loop: their last tokens, twelve or
                             more, are one piece said three times or more

Draws depend on the seed alone, not on the batch: `sample.py PROMPT --noise counter --seed 0` with a
way's options draws the same. This file does not know whether a text is good: noise repeats nothing.

Sources: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"; Welleck et al. 2020,
"Neural Text Generation with Unlikelihood Training".
"""

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from nanogpt2.config import GenerationConfig
from nanogpt2.evaluation.perplexity import ignore_progress
from nanogpt2.generation import generate
from nanogpt2.metrics import distinct_n, repetition
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer

LOOP = 12  # tokens that a loop must cover

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "sample.py's default": {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "repetition_penalty 1.2": {"repetition_penalty": 1.2},
    "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
    "num_beams 5": {"num_beams": 5},
    "5 beams + 3-gram ban": {"num_beams": 5, "no_repeat_ngram_size": 3},
}


def measure_repetition(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int = 0,
    batch_size: int = 8,
    advance: Callable[[int], object] = ignore_progress,
) -> dict[str, Any]:
    """Continue the prompts in each way: {"examples": ..., "ways": {way: {figure: value}}}.

    advance: called with the number of texts in each finished batch. Raises FloatingPointError for a
    model whose scores are not finite.
    """
    ways = {}
    for way, options in WAYS.items():
        texts: list[list[int]] = []
        for start in range(0, len(prompts), batch_size):
            config = GenerationConfig(
                max_new_tokens=max_new_tokens,
                min_new_tokens=max_new_tokens,
                seed=seed,
                noise="counter" if "do_sample" in options else "hf",
                **options,
            )
            batch = prompts[start : start + batch_size]
            found = generate(model, batch, tokenizer=tokenizer, generation_config=config)
            texts += found.sequences[:, -max_new_tokens:].tolist()
            advance(len(batch))
        ways[way] = {
            "distinct_1": mean(distinct_n(ids, 1) for ids in texts),
            "distinct_2": mean(distinct_n(ids, 2) for ids in texts),
            "repeated_4": mean(repetition(ids, 4) for ids in texts),
            "loops": mean(float(ends_in_a_loop(ids)) for ids in texts),
        }
    return {"examples": len(prompts), "max_new_tokens": max_new_tokens, "ways": ways}


def ends_in_a_loop(ids: Sequence[int]) -> bool:
    """Return whether the last tokens, LOOP or more, are one piece said three times or more."""
    for period in range(1, len(ids) // 3 + 1):
        end = ids[-max(LOOP, 3 * period) :]
        if len(end) >= LOOP and list(end[period:]) == list(end[:-period]):
            return True
    return False
