"""LoRA: fine-tune a low-rank correction of each matrix, not the matrix itself.

A linear layer y = x W^T + b of a trained model keeps W (out, in) and b. Training learns a matrix
of low rank r, which is added to W:

    y = x W^T + b + s (x A^T) B^T  =  x (W + s B A)^T + b,    A (r, in),  B (out, r),  s = alpha / r

- Why low rank suffices: fine-tuning changes a matrix by nearly a low-rank matrix, so r = 8 out of
  768 is often enough.
- Start: A is random, B is zero. B A = 0, so training starts at the unchanged model. A is not zero,
  so B has a gradient (dB = s dy^T (x A^T)) from the first step. If both were zero, both gradients
  would stay zero. A is drawn like torch's Linear: uniform within 1 / sqrt(in).
- Scale: with s = alpha / r another rank hardly needs another learning rate.
- Memory: a trained parameter has a gradient and AdamW's two moments, 12 bytes in fp32:
  1.5 GB for the 124M model. At r = 8 the A and B of its 48 layers are 1.2 million numbers: 14 MB.
  W's gradient is never computed. Weights and activations take as much memory as before.
- After training, W + s B A is a matrix like W (`merged`), so the tuned model is as fast as before.

Every block's c_attn, c_fc and both c_proj (attention's and the MLP's) get an A and a B. All other
parameters are frozen, except a classifier's new head.

This file knows neither the loop nor files; `adapter.py` saves A and B.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

import math
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

from nanogpt2.classifier import GPTClassifier, Model
from nanogpt2.config.flags import show
from nanogpt2.config.train import MOST_ALPHA
from nanogpt2.cpu.training import linear

M = TypeVar("M", bound=Model)


class LoRALinear(nn.Linear):
    """A linear layer with frozen weight and bias and trained A and B."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        """Take over the parameters of `linear`: their names and values stay."""
        # the meta device draws and stores nothing
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.alpha = rank, alpha
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.lora_a, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        low = linear(x, self.lora_a)  # (..., r)
        change = linear(low, self.lora_b) * (self.alpha / self.rank)
        return linear(x, self.weight, self.bias) + change

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a plain layer that computes the same."""
        plain = nn.Linear(self.in_features, self.out_features, device="meta")
        change = self.lora_b @ self.lora_a * (self.alpha / self.rank)  # (out, in)
        plain.weight = nn.Parameter(self.weight + change)
        plain.bias = self.bias
        return plain


def add_lora(model: Model, rank: int, alpha: float) -> None:
    """Add A and B to every linear layer of the blocks; freeze everything else.

    Rank 0 changes nothing. Raises ValueError for a rank above the model's width, for alpha outside
    (0, MOST_ALPHA], and for a model that already has LoRA layers.
    """
    if not 0 <= rank <= model.config.n_embd:
        raise ValueError(f"rank must be 0 to {model.config.n_embd}, the model's width, not {rank}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be a finite number > 0, not {show(alpha)}")
    if alpha > MOST_ALPHA:
        raise ValueError(f"alpha must be {MOST_ALPHA} at most, not {show(alpha)}")
    if lora_layers(model):
        raise ValueError("the model has LoRA already")
    if rank == 0:
        return
    model.requires_grad_(False)
    if isinstance(model, GPTClassifier):
        model.score.requires_grad_(True)
    gpt = model.transformer if isinstance(model, GPTClassifier) else model
    for parent in list(gpt.h.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                setattr(parent, name, LoRALinear(layer, rank, alpha))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the layers with A and B, by name; an empty dict for a plain model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def merged(model: M) -> M:
    """Return a copy without LoRA that computes the same: every weight is W + s B A.

    `model` and the random generators do not change, so training can go on.
    """
    plain = deepcopy(model)
    for name, layer in lora_layers(plain).items():
        parent, _, last = name.rpartition(".")
        setattr(plain.get_submodule(parent), last, layer.merged())
    plain.requires_grad_(True)
    return plain
