"""Zero-shot tasks for GPT-2: for each, a template for the prompt and sensible decoding options.

The options are GenerationConfig's. This file does not know the decoding itself.
Sources: Radford et al. 2019, section 3 (TL;DR: with top-k 2; pairs of sentences; Q and A).
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A template around the prompt, and the decoding options of its continuation."""

    about: str
    template: str
    options: dict[str, Any]


def _sampling(**options: Any) -> dict[str, Any]:
    return {"do_sample": True} | options


TASKS: dict[str, Preset] = {
    "story": Preset(
        "continue a story",
        "{}",
        _sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.1, max_new_tokens=300),
    ),
    "poem": Preset(
        "write a poem with this title",
        "{}\n\nA poem\n\n",
        _sampling(temperature=0.9, top_p=0.95, max_new_tokens=120, stop_strings=["\n\n\n"]),
    ),
    "dialogue": Preset(
        "answer as Friend; stop at the next line of You",
        "You: {}\nFriend:",
        _sampling(temperature=0.8, top_p=0.9, max_new_tokens=80, stop_strings=["\nYou:"]),
    ),
    "question-answering": Preset(
        "a short answer",
        "Q: Who wrote Hamlet?\nA: William Shakespeare\n\nQ: What is the capital of Japan?\n"
        "A: Tokyo\n\nQ: {}\nA:",
        {"num_beams": 4, "max_new_tokens": 24, "stop_strings": ["\n"]},
    ),
    "summarise": Preset(
        "a summary of the prompt",
        "{}\nTL;DR:",
        _sampling(temperature=1.0, top_k=2, max_new_tokens=100),
    ),
    "translate": Preset(
        "English to French",
        "Good morning. = Bonjour.\nWhere is the station? = Où est la gare ?\n"
        "I would like a coffee. = Je voudrais un café.\n{} =",
        {"num_beams": 4, "max_new_tokens": 60, "stop_strings": ["\n"]},
    ),
}
