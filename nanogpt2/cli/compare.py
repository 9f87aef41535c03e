"""One prompt and the same chance through two models, side by side: before and after fine-tuning.

Each model writes its own text from the same seed. Then every token of each text is scored by both
models: how much likelier B finds it than A, and how far apart their distributions are there, as
KL(B || A) in nats. This file does not know how tokens are chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanogpt2 import terminal
from nanogpt2.cli.one import decode_texts, request_for
from nanogpt2.config import GenerationConfig
from nanogpt2.generation.engine import context_start
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Scored:
    """A text and, for each of its tokens, both models' log-probability and their KL, in nats."""

    text: str
    token_ids: list[int]
    logp_a: list[float]
    logp_b: list[float]
    kl: list[float]

    @property
    def gain(self) -> float:
        """Mean of log p_B - log p_A over the tokens."""
        pairs = zip(self.logp_a, self.logp_b, strict=True)
        return sum(b - a for a, b in pairs) / max(1, len(self.token_ids))


def compare(
    a: GPT, b: GPT, tokenizer: Tokenizer, prompt: str, options: GenerationConfig
) -> tuple[Scored, Scored]:
    """Let both models go on with the prompt, from the same seed; score both texts by both."""
    texts = []
    for model in (a, b):
        request = request_for(model, tokenizer, [prompt], options)
        completion = decode_texts(model, tokenizer, [prompt], request)[0][0].completion
        prompt_ids = request.ids[0].tolist()
        texts.append(_score(a, b, prompt_ids, completion.token_ids, completion.text))
    return texts[0], texts[1]


@torch.no_grad()
def _score(a: GPT, b: GPT, prompt: list[int], new: Sequence[int], text: str) -> Scored:
    ids = [*prompt, *new]
    start = context_start(len(ids), len(ids), min(a.config.block_size, b.config.block_size))
    scored = min(len(new), len(ids) - start - 1)
    inputs = torch.tensor([ids[start:-1]], device=a.wte.weight.device)
    logps = [model(inputs)[0, -scored:].float().log_softmax(dim=1) for model in (a, b)]  # (new, V)
    kl = (logps[1].exp() * (logps[1] - logps[0])).nansum(dim=1)
    tokens = torch.tensor(ids[len(ids) - scored :], device=inputs.device)[:, None]
    logp_a, logp_b = (logp.gather(1, tokens).squeeze(1).tolist() for logp in logps)
    return Scored(text, list(new)[-scored:], logp_a, logp_b, kl.tolist())


def as_json(prompt: str, names: Sequence[str], texts: Sequence[Scored], seed: int | None) -> Any:
    """The object that --compare --json prints."""
    return {
        "prompt": prompt,
        "seed": seed,
        "texts": [
            {"model": name, "gain": text.gain} | vars(text)
            for name, text in zip(names, texts, strict=True)
        ],
    }


def draw(tokenizer: Tokenizer, names: Sequence[str], texts: Sequence[Scored]) -> str:
    """Both texts, tokens from red (A finds them likelier) to green (B does), and the figures."""
    blocks = []
    for name, text in zip(names, texts, strict=True):
        changes = zip(text.token_ids, text.logp_a, text.logp_b, strict=True)
        coloured = "".join(
            terminal.paint(tokenizer.decode([token]), 0.5 + (b - a) / 8) for token, a, b in changes
        )
        blocks.append(f"--- {name} ---\n{coloured}\n\n{_figures(tokenizer, text)}")
    return "\n\n".join(blocks)


def _figures(tokenizer: Tokenizer, text: Scored) -> str:
    rows = [["token", "log p A", "log p B", "B - A", "KL(B||A)"]]
    for token, a, b, kl in zip(text.token_ids, text.logp_a, text.logp_b, text.kl, strict=True):
        figures = (f"{value:.2f}" for value in (a, b, b - a, kl))
        rows.append([repr(tokenizer.decode([token])), *figures])
    mean_kl = sum(text.kl) / max(1, len(text.kl))
    return f"{terminal.table(rows)}\nmean B - A {text.gain:.3f} nats, mean KL {mean_kl:.3f}"
