"""Published results of the official weights, to print beside our own.

The list has only figures that were checked at their source, so it has gaps. Our figure of the same
name has the same meaning; the source says where the data or the definition differ.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One published figure of a model; `figure` is the name of our own."""

    task: str
    model: str
    figure: str
    value: float
    source: str


PAPER = "Radford et al. 2019, table 3"
PAPER_LAMBADA = f"{PAPER} (its own stop-word filter)"
PAPER_WIKITEXT2 = f"{PAPER}: WikiText-2 (its own de-tokenizers)"
PAPER_WIKITEXT103 = f"{PAPER}: WikiText-103 (its own de-tokenizers)"
HARNESS = "lm-evaluation-harness, lambada_openai"
HARNESS_HELLASWAG = "lm-evaluation-harness, as llm.c cites it"
LLM_C = "llm.c, dev/data/hellaswag.py"

FIGURES = (
    Published("perplexity", "gpt2", "word_perplexity", 29.41, PAPER_WIKITEXT2),
    Published("perplexity", "gpt2", "word_perplexity", 37.50, PAPER_WIKITEXT103),
    Published(
        "perplexity", "gpt2", "perplexity", 29.94, "transformers issue 13761: WikiText-2, raw"
    ),
    Published(
        "perplexity", "gpt2", "word_perplexity", 37.37, "transformers issue 13761: WikiText-2, raw"
    ),
    Published("perplexity", "gpt2-medium", "word_perplexity", 22.76, PAPER_WIKITEXT2),
    Published("perplexity", "gpt2-large", "word_perplexity", 19.93, PAPER_WIKITEXT2),
    Published("lambada", "gpt2", "perplexity", 35.13, PAPER),
    Published("lambada", "gpt2", "perplexity", 40.06, HARNESS),
    Published("lambada", "gpt2", "accuracy", 0.3256, HARNESS),
    Published("lambada", "gpt2", "accuracy_filtered", 0.4599, PAPER_LAMBADA),
    Published("lambada", "gpt2-medium", "accuracy_filtered", 0.5548, PAPER_LAMBADA),
    Published("lambada", "gpt2-xl", "perplexity", 8.63, PAPER),
    Published("lambada", "gpt2-xl", "perplexity", 10.63, HARNESS),
    Published("hellaswag", "gpt2", "plain acc", 0.2859, LLM_C),
    Published("hellaswag", "gpt2", "plain acc_norm", 0.2955, LLM_C),
    Published("hellaswag", "gpt2", "harness acc", 0.2892, HARNESS_HELLASWAG),
    Published("hellaswag", "gpt2", "harness acc_norm", 0.3114, HARNESS_HELLASWAG),
    Published("hellaswag", "gpt2-xl", "plain acc", 0.3842, LLM_C),
    Published("hellaswag", "gpt2-xl", "plain acc_norm", 0.4893, LLM_C),
    Published("hellaswag", "gpt2-xl", "harness acc", 0.4004, HARNESS_HELLASWAG),
    Published("hellaswag", "gpt2-xl", "harness acc_norm", 0.5089, HARNESS_HELLASWAG),
)


def published(task: str, model: str) -> list[Published]:
    """Return the published figures of an official model in a task; [] for another model."""
    return [p for p in FIGURES if (p.task, p.model) == (task, model)]
