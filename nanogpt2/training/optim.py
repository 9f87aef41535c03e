"""AdamW as GPT-2 is trained with: decay on matrices only, warm-up, then half a cosine down to 0.

This file does not know the data or the loop.
"""

import math

import torch
from torch import nn


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, fused, that decays matrices and embeddings but no bias and no layer norm."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """The rate of step 1, 2, ..., `steps`: up to `peak` in `warmup` steps, then down towards 0."""
    if step <= warmup:
        return peak * step / warmup
    # 0 would come one step after the last: every step learns
    progress = (step - warmup) / (steps + 1 - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
