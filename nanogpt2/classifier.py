"""A text classifier: GPT-2 reads the text, and a linear layer scores its last token.

The last token is the only one that has seen the whole text, so what the network knows there is
compared with one learned vector a label. Texts side by side are padded on the right, where causal
attention keeps the padding out of sight of every real token; no mask is needed.

It meets a training loop as a GPT does: logits, or the loss where targets are given. This file knows
neither text nor files.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nanogpt2 import ops
from nanogpt2.model import GPT


class GPTClassifier(nn.Module):
    """A GPT with a score for each label in place of one for each token.

    Raises ValueError for fewer than two labels, or one that is there twice.
    """

    def __init__(self, transformer: GPT, labels: tuple[str, ...]) -> None:
        super().__init__()
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ValueError(f"labels must be two different ones or more, not {labels!r:.100}")
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
        """Whose kernels compute."""
        return self.transformer.kernels

    def use_kernels(self, asked: str, device: torch.device | str | None = None) -> None:
        """See GPT."""
        self.transformer.use_kernels(asked, device)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Score the labels at every token, or measure how badly the right ones were scored.

        idx: int64 (B, T), T <= block_size. Without targets -> logits (B, T, L). With targets, int64
        (B, T): a label's number at the last token of each text and -100, which does not count,
        elsewhere -> their mean cross-entropy in nats, a scalar in fp32.
        """
        x = self.transformer.hidden_states(idx)  # (B, T, C)
        if targets is None:
            return self.score(x)
        weight = self.score.weight
        return ops.linear_cross_entropy(
            x.flatten(0, 1), weight, targets.flatten(), kernels=self.kernels
        )

    @torch.no_grad()
    def classify(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The labels' probabilities for each text, given as token ids: -> fp32 (B, L).

        Dropout is off meanwhile. A text longer than block_size is judged by its start. Raises
        ValueError for a text without a token.
        """
        if not all(texts):
            raise ValueError("a text must have a token to be classified")
        lengths = torch.tensor([min(len(text), self.config.block_size) for text in texts])  # (B,)
        idx = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)  # (B, T)
        for row, text, length in zip(idx, texts, lengths, strict=True):
            row[:length] = torch.tensor(text[:length])
        was_training = self.training
        self.eval()
        x = self.transformer.hidden_states(idx.to(self.score.weight.device))  # (B, T, C)
        self.train(was_training)
        last = x[torch.arange(len(texts)), lengths - 1]  # (B, C)
        return ops.softmax(self.score(last).float(), self.kernels)


Model = GPT | GPTClassifier
