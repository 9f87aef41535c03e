"""A text classifier: GPT-2 reads the text, and a linear layer scores the last token.

Only the last token has seen the whole text, so its hidden state is compared with one learned vector
a label. A batch pads texts on the right, where causal attention hides the padding from every real
token, so no mask is needed.

A training loop calls the classifier as it calls a GPT: for logits, or with targets for the loss.
This file knows neither text nor files.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from nanogpt2 import ops
from nanogpt2.devices import as_usual
from nanogpt2.model import GPT


class GPTClassifier(nn.Module):
    """A GPT that scores each label instead of each token.

    Raises ValueError for fewer than two labels, or for a repeated label.
    """

    def __init__(self, transformer: GPT, labels: tuple[str, ...]) -> None:
        super().__init__()
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ValueError(f"labels must be two different ones or more, not {labels!r:.100}")
        if not transformer.config.tie_word_embeddings:
            # a classifier has no head for tokens
            transformer.config = replace(transformer.config, tie_word_embeddings=True)
            del transformer.lm_head
        self.config = transformer.config
        self.labels = labels
        self.transformer = transformer
        wte = transformer.wte.weight
        self.score = nn.Linear(
            self.config.n_embd, len(labels), bias=False, device=wte.device, dtype=wte.dtype
        )
        nn.init.normal_(self.score.weight, std=0.02)

    @property
    def kernels(self) -> str:
        """The kernels that compute: "reference", "torch" or "triton"."""
        return self.transformer.kernels

    def use_kernels(self, asked: str, device: torch.device | str | None = None) -> None:
        """Compute by these kernels from now on, as GPT.use_kernels does."""
        self.transformer.use_kernels(asked, device)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Score the labels at every token, or measure how badly the right ones were scored.

        idx: int64 (B, T), T <= block_size. Without targets -> logits (B, T, L). With targets, int64
        (B, T): a label's number at the last token of each text, IGNORE_INDEX elsewhere -> their
        mean cross-entropy in nats, () in float32.
        """
        x = self.transformer.hidden_states(idx)  # (B, T, C)
        return self.score(x) if targets is None else self.loss(x, targets)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of the labels' logits for hidden states x (B, T, C)."""
        rows, weight = x.flatten(0, 1), self.score.weight
        return ops.linear_cross_entropy(rows, weight, targets.flatten(), self.kernels)

    @torch.no_grad()
    def classify(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the labels' probabilities for texts of token ids: float32 (B, L).

        Dropout and autocast are off meanwhile. Of a text longer than block_size only the start
        counts. Raises ValueError for a text without a token.
        """
        if not all(texts):
            raise ValueError("a text must have a token to be classified")
        device = self.score.weight.device
        longest = self.config.block_size
        with as_usual(device):
            lengths = torch.tensor([min(len(text), longest) for text in texts])  # (B,)
            idx = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)  # (B, T)
            for row, text, length in zip(idx, texts, lengths, strict=True):
                row[:length] = torch.tensor(text[:length])
            was_training = self.training
            self.eval()
            x = self.transformer.hidden_states(idx.to(device))  # (B, T, C)
            self.train(was_training)
            last = x[torch.arange(len(texts)), lengths - 1]  # (B, C)
            return ops.softmax(self.score(last).float(), self.kernels)


Model = GPT | GPTClassifier
