"""Ten prompts, and what a model makes of them: the yardstick for other programs.

This file does not know the other programs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer

NEW = 32  # tokens of a continuation
NEAR = 10  # tokens of a step that are kept
PROMPTS = (
    "Once upon a time",
    "The state of the Union is",
    "In the last year the Government has",
    "My fellow citizens,",
    "It was a dark and stormy night; the rain fell in torrents",
    "def main():\n    print(",
    "Q: What is the capital of Japan?\nA:",
    "1, 2, 3, 5, 8,",
    "Größe, façade, naïve: 東京 🙂",
    " ",
)


def prompts_for(model: GPT, tokenizer: Tokenizer | None, new: int) -> list[list[int]]:
    """Return the prompts' ids, each cut so that `new` tokens fit behind it, if that leaves one.

    Without a tokenizer, ids spread over the vocabulary stand for the texts.
    """
    c = model.config
    room = max(1, c.block_size - new)
    if tokenizer is None:
        V = c.vocab_size
        return [[(17 + 31 * n + 7 * i * i) % V for i in range(min(n + 1, room))] for n in range(10)]
    # a vocabulary may have no id for white space or for other alphabets
    return [tokenizer.encode(text)[:room] or [c.vocab_size - 1] for text in PROMPTS]


@torch.no_grad()
def greedy_logits(model: GPT, prompt: list[int], steps: int) -> Iterator[Tensor]:
    """Yield the next token's logits, float32 (V,), after the prompt and after each greedy token.

    Ends early where the context is full.
    """
    steps = min(steps, model.config.block_size - len(prompt) + 1)
    cache = model.new_cache(1, max_length=len(prompt) + steps)
    new = torch.tensor([prompt])  # (1, T), then (1, 1)
    for _ in range(steps):
        logits = model.logits(model.hidden_states(new, cache=cache)[:, -1])[0].float()  # (V,)
        yield logits
        new = logits.argmax().view(1, 1)


@dataclass(frozen=True)
class Continuation:
    """A prompt's greedy continuation: tokens, and of each step the best few ids and their scores.

    ids, scores: (steps, at most NEAR), the best first. size: the largest absolute logit.
    """

    tokens: list[int]
    ids: Tensor
    scores: Tensor
    size: float

    def margin(self, found: Sequence[int]) -> float:
        """Return by how much the model preferred its own token where `found` first differs.

        0 where all are the same. At least this much where `found` is not among the best few.
        """
        for step, (own, other) in enumerate(zip(self.tokens, found, strict=True)):
            if own != other:
                near = self.scores[step][self.ids[step] == other]
                theirs = near[0] if len(near) else self.scores[step][-1]
                return float(self.scores[step][0] - theirs)
        return 0.0


def continuation(model: GPT, prompt: list[int], new: int) -> Continuation:
    """Continue a prompt greedily by at most `new` tokens."""
    steps = []
    for logits in greedy_logits(model, prompt, new):
        scores, ids = logits.topk(min(NEAR, len(logits)))
        steps.append((ids, scores, logits.abs().max()))
    ids, scores, sizes = (torch.stack(rows) for rows in zip(*steps, strict=True))
    return Continuation(ids[:, 0].tolist(), ids, scores, float(sizes.max()))
