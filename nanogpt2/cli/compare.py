"""Compare two models, such as before and after fine-tuning, on one prompt and one seed.

Each model writes its own texts from the same seed. Then both models score every text, token by
token: log p_B - log p_A of each token, and the distance of the two distributions at its position,
KL(B || A), in nats. This file does not know how tokens are chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanogpt2 import terminal
from nanogpt2.cli.decode import decode_texts, note_dropped, note_outgrown
from nanogpt2.cli.text import as_line, shown, token_name
from nanogpt2.config import GenerationConfig, SampleConfig
from nanogpt2.generation.explain import kl_divergence, stages
from nanogpt2.generation.request import Request
from nanogpt2.generation.text import Completion, pieces, request_for
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Scored:
    """A text with three numbers for each token: log p_A, log p_B and KL(B || A), in nats."""

    writer: int  # 0 is A, 1 is B
    index: int  # position among the writer's texts
    completion: Completion
    logp_a: list[float]
    logp_b: list[float]
    kl: list[float]

    @property
    def gains(self) -> list[float]:
        """log p_B - log p_A of each token."""
        return [b - a for a, b in zip(self.logp_a, self.logp_b, strict=True)]

    @property
    def gain(self) -> float:
        """Mean of log p_B - log p_A over the tokens."""
        return sum(self.gains) / len(self.gains)


def compare(
    a: GPT,
    b: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    options: GenerationConfig,
    literal: bool = False,
) -> list[Scored]:
    """Let both models continue the prompt from the same seed; score every text with both.

    literal: read <|endoftext|> in the prompt as characters.
    """
    models = (a, b)
    requests = [request_for(model, tokenizer, [prompt], options, literal) for model in models]
    sizes = {
        model.config.block_size: request for model, request in zip(models, requests, strict=True)
    }
    for size, request in sizes.items():
        note_dropped(request, size)
    texts = [
        decode_texts(model, tokenizer, request)[0]
        for model, request in zip(models, requests, strict=True)
    ]
    for size, request in sizes.items():
        note_outgrown(request, size, texts[0] + texts[1])
    return [
        Scored(
            writer, index, text.completion, *_score(a, b, requests[0], text.completion.token_ids)
        )
        for writer in (0, 1)
        for index, text in enumerate(texts[writer])
    ]


def _score(
    a: GPT, b: GPT, request: Request, new: Sequence[int]
) -> tuple[list[float], list[float], list[float]]:
    """Return log p_A, log p_B and KL(B || A) of each new token."""
    logps_a, logps_b, kls = [], [], []
    found = zip(new, stages(a, request, new), stages(b, request, new), strict=True)
    for token, (_, (raw_a, *_)), (_, (raw_b, *_)) in found:
        logp_a, logp_b = raw_a[0].log_softmax(dim=0), raw_b[0].log_softmax(dim=0)
        logps_a.append(float(logp_a[token]))
        logps_b.append(float(logp_b[token]))
        kls.append(kl_divergence(logp_b, logp_a))
    return logps_a, logps_b, kls


def as_json(prompt: str, names: Sequence[str], texts: Sequence[Scored], seed: int | None) -> Any:
    """Return the object that --compare --json prints."""
    return {
        "prompt": prompt,
        "seed": seed,
        "texts": [
            {
                "model": names[text.writer],
                "index": text.index,
                "gain": text.gain,
                "text": text.completion.text,
                "token_ids": text.completion.token_ids,
                "logp_a": text.logp_a,
                "logp_b": text.logp_b,
                "kl": text.kl,
            }
            for text in texts
        ],
    }


def draw(tokenizer: Tokenizer, names: Sequence[str], texts: Sequence[Scored]) -> str:
    """Draw each text and its figures.

    A token is red if A finds it likelier, green if B does.
    """
    count = len(texts) // len(names)
    blocks = []
    for text in texts:
        title = names[text.writer] + (f", {text.index + 1} of {count}" if count > 1 else "")
        coloured = "".join(
            terminal.paint(shown(piece), 0.5 + sum(text.gains[tokens]) / 8)
            for piece, tokens in pieces(tokenizer, text.completion)
        )
        blocks.append(f"--- {title} ---\n{coloured}\n\n{_figures(tokenizer, text)}")
    return "\n\n".join(blocks)


def _figures(tokenizer: Tokenizer, text: Scored) -> str:
    """Draw a table with one row for each token, the end token included."""
    rows = [["token", "log p A", "log p B", "B - A", "KL(B||A)"]]
    for token, *figures in zip(
        text.completion.token_ids, text.logp_a, text.logp_b, text.gains, text.kl, strict=True
    ):
        rows.append([token_name(tokenizer, token), *(f"{value:.2f}" for value in figures)])
    mean_kl = sum(text.kl) / len(text.kl)
    return f"{terminal.table(rows)}\nmean B - A {text.gain:.3f} nats, mean KL {mean_kl:.3f}"


def show_comparison(
    config: SampleConfig, model: GPT, other: GPT, tokenizer: Tokenizer, prompt: str
) -> None:
    """Print both models' texts for the prompt, and each model's scores of both texts."""
    names = (f"A: {config.model}", f"B: {config.compare}")
    request = config.generation, config.literal_prompt
    texts = compare(model, other, tokenizer, prompt, *request)
    if config.json:
        record = as_json(prompt, names, texts, config.generation.seed)
        terminal.write(as_line(record))
    else:
        terminal.write(shown(prompt) + "\n" + draw(tokenizer, names, texts) + "\n")
