"""Peers in training: a plain loop on transformers' GPT-2, and nanoGPT's recipe.

Each peer starts from the weights in a folder, in float32 without dropout, and offers

    step(x, y, lr)              update once by the mean cross-entropy of y after x; return the loss
    validation_loss(batches)    the mean over all targets

so that all arms can take the same batches in the same order. This file calls our code only to read
the folder. Source of the recipe: karpathy/nanoGPT, its README and the options of its train.py.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BETAS = (0.9, 0.95)
CLIP = 1.0
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class Peer(ABC):
    """A model with AdamW as users write it, and the training step."""

    def __init__(self, model: nn.Module, weight_decay: float, fused: bool) -> None:
        self.model = model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=fused)
        self.precision = torch.autocast(next(iter(trained)).device.type, enabled=False)

    @abstractmethod
    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean cross-entropy of y after x."""

    def step(self, x: Tensor, y: Tensor, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.precision:
            loss = self.loss(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @torch.no_grad()
    def validation_loss(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Mean over all targets, in nats."""
        self.model.eval()
        total, count = 0.0, 0
        for x, y in batches:
            targets = int((y != -100).sum())
            total += self.loss(x, y).item() * targets
            count += targets
        self.model.train()
        return total / count


class Transformers(Peer):
    """GPT2LMHeadModel with SDPA, its own loss and no cache: its fastest ordinary setup."""

    def __init__(
        self, folder: Path, device: str = "cpu", weight_decay: float = 0.1, fused: bool = False
    ) -> None:
        from transformers import GPT2LMHeadModel

        model = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa", **NO_DROPOUT)
        super().__init__(model.to(device), weight_decay, fused)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        # shift_labels: our targets are already shifted by one token
        y = y.contiguous()
        return self.model(input_ids=x, labels=y, shift_labels=y, use_cache=False).loss


class TransformersClassifier(Peer):
    """GPT2ForSequenceClassification: a label for each text, predicted at its last real token."""

    def __init__(
        self, folder: Path, device: str = "cpu", weight_decay: float = 0.1, fused: bool = False
    ) -> None:
        from transformers import GPT2ForSequenceClassification

        model = GPT2ForSequenceClassification.from_pretrained(folder, **NO_DROPOUT)
        super().__init__(model.to(device), weight_decay, fused)

    def scores(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the labels' scores (B, L) and the right labels (B,)."""
        counted = y != -100  # (B, T), one True a row
        last = counted.int().argmax(-1, keepdim=True)
        inside = torch.arange(x.size(1)) <= last
        pad = self.model.config.pad_token_id
        # transformers finds a text's end by the pad token id
        ids = x.where(inside, pad)
        return self.model(ids, attention_mask=inside.long(), use_cache=False).logits, y[counted]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        scores, labels = self.scores(x, y)
        return F.cross_entropy(scores, labels)

    @torch.no_grad()
    def answers(self, batches: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[int, int]]:
        """Return (right label, predicted label) of every text."""
        self.model.eval()
        found = []
        for x, y in batches:
            scores, labels = self.scores(x, y)
            found += zip(labels.tolist(), scores.argmax(-1).tolist(), strict=True)
        self.model.train()
        return found


class NanoGPT(Peer):
    """nanoGPT's recipe: one matrix for q, k and v, SDPA, all logits at once, AdamW fused on CUDA
    only, biases and gains not decayed, gradients clipped at 1.

    GELU has the tanh form that GPT-2's weights need. On a GPU tokens that never occur pad the
    vocabulary to 50304, as in the recipe, which adds 1e-3 to a loss of 10.8.
    """

    def __init__(self, folder: Path, device: str = "cpu", weight_decay: float = 0.1) -> None:
        from nanogpt2 import load_model

        source = load_model(folder)
        config, state = source.config, source.state_dict()
        if device == "cuda":
            config = dataclasses.replace(config, vocab_size=-(-config.vocab_size // 64) * 64)
        model = _Decoder(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.zero_()[: len(state[name])] = state[name]
        super().__init__(model.to(device), weight_decay, fused=device == "cuda")

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.model(x)  # (B, T, V)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), y.reshape(-1), ignore_index=-100)


class _Attention(nn.Module):
    def __init__(self, c) -> None:
        super().__init__()
        self.heads = c.n_head
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        parts = self.c_attn(x).split(C, dim=2)
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class _Feedforward(nn.Module):
    def __init__(self, c) -> None:
        super().__init__()
        self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * c.n_embd, c.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class _Layer(nn.Module):
    def __init__(self, c) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(c.n_embd), _Attention(c)
        self.ln_2, self.mlp = nn.LayerNorm(c.n_embd), _Feedforward(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class _Decoder(nn.Module):
    def __init__(self, c) -> None:
        super().__init__()
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.wpe = nn.Embedding(c.block_size, c.n_embd)
        self.h = nn.ModuleList(_Layer(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.size(1), device=x.device)
        h = self.wte(x) + self.wpe(places)
        for layer in self.h:
            h = layer(h)
        return F.linear(self.ln_f(h), self.wte.weight)
