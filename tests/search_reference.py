"""What the references of the searches share: no cache, no batch, one text after the other, fp64."""

import pytest
import torch

V = 61


def next_logp(model, ids):
    """The log-probabilities of the next token, a list."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1].double().log_softmax(0).tolist()


def best_continuations(model, running, count, eos, penalties=(0.0,) * V):
    """The best (score, text) one token longer; enough of them that `count` do not end."""
    found = []
    for score, text in running:
        for token, logp in enumerate(next_logp(model, text)):
            found.append((score + logp - penalties[token], [*text, token]))
    found.sort(key=lambda each: -each[0])
    return found[: max(2, 1 + len(eos)) * count]


class Kept:
    """The best `count` texts that ended, as transformers 4.x keeps them."""

    def __init__(self, count, prompt_length, new, eos, length_penalty, early_stopping):
        self.count, self.prompt, self.new, self.eos = count, prompt_length, new, eos
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self.texts, self.over = [], False

    def add(self, score, text):
        score /= (len(text) - self.prompt) ** self.length_penalty
        text = [*text[:-1], self.eos[0]] if text[-1] in self.eos else text
        self.texts = sorted([*self.texts, (score, text)], key=lambda each: -each[0])[: self.count]

    def look_ahead(self, best_score, length):
        """Is the search over, the best candidate being this good?"""
        reach = length - self.prompt
        if self.early_stopping == "never" and self.length_penalty > 0:
            reach = self.new
        if len(self.texts) == self.count:
            could_be = best_score / reach**self.length_penalty
            self.over = self.early_stopping is True or self.texts[-1][0] >= could_be


def best_first(kept, count):
    texts = sorted((each for one in kept for each in one.texts), key=lambda each: -each[0])
    return texts[:count]


def left_padded(rng, pad):
    """One to three prompts, of any ids but the last three and the pad; their rows and mask."""
    lengths = [rng.randrange(1, 7) for _ in range(rng.choice([1, 2, 3]))]
    allowed = [i for i in range(V - 3) if i != pad]
    prompts = [[rng.choice(allowed) for _ in range(length)] for length in lengths]
    width = max(lengths)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return prompts, ids, mask


def beam_options(rng):
    return {
        "max_new_tokens": rng.randrange(1, 16),
        "eos_token_id": tuple(rng.sample(range(V), rng.choice([1, 3, 8, 20]))),
        "length_penalty": rng.choice([1.0, 2.0, 0.0, -1.0]),
        "early_stopping": rng.choice([False, True, "never"]),
    }


def check(found, expected, prompts, ids, pad, count):
    """generate()'s result against [(score, text), ...] of each prompt."""
    width = ids.size(1)
    for b, texts in enumerate(expected):
        assert len(texts) == count
        for r, (score, text) in enumerate(texts):
            row = found.sequences[b * count + r, width:].tolist()
            new = text[len(prompts[b]) :]
            assert row == new + [pad] * (len(row) - len(new))
            # fp32 against fp64
            theirs = found.sequences_scores[b * count + r].item()
            assert theirs == pytest.approx(score, rel=1e-5, abs=1e-4)
