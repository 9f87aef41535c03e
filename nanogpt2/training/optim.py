"""Optimizers (AdamW, Muon) and learning-rate schedules (cosine, linear, constant, WSD).

AdamW steps along m / sqrt(v), the mean gradient over the root of the mean squared gradient. Muon
updates the blocks' matrices, AdamW the rest. Muon sets every singular value of the mean gradient
to one, then scales the step to AdamW's size, so one learning rate serves both.

This file does not know the data or the loop.
Sources: Loshchilov and Hutter 2019 (AdamW); Jordan et al. 2024 (Muon) and Liu et al. 2025 (its
scale); Hu et al. 2024 (warm-up, stable, decay).
"""

import math
from typing import Any

import torch
from torch import nn

DECAY_SHARE = 0.2  # of the steps, at the end of schedule wsd


def make_optimizers(
    model: nn.Module, name: str, lr: float, weight_decay: float, capturable: bool = False
) -> list[torch.optim.Optimizer]:
    """Make the optimizers, which together hold every trained parameter exactly once.

    Matrices and embeddings decay, biases and layer norms do not. Frozen parameters are left out.
    capturable: AdamW's rate is a tensor beside the weights, so that a CUDA graph may hold its step.
    Muon's step reads its rate on the host: ValueError.
    """
    if capturable and name == "muon":
        raise ValueError('capturable must be False for optimizer "muon"')
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    muon = {n for n, p in trained.items() if name == "muon" and p.dim() == 2 and ".h." in f".{n}"}
    rest = [p for n, p in trained.items() if n not in muon]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        rate = torch.tensor(lr, device=rest[0].device) if capturable else lr
        optimizers += [
            torch.optim.AdamW(
                groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, fused=True, capturable=capturable
            )
        ]
    if muon:
        matrices = [trained[n] for n in sorted(muon)]
        optimizers += [
            torch.optim.Muon(
                matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        ]
    return optimizers


def learning_rate(step: int, steps: int, warmup: int, peak: float, schedule: str) -> float:
    """Return the rate of a step in 1..steps: up to `peak` in `warmup` steps, then the schedule."""
    if step <= warmup:
        return peak * step / warmup
    # a falling rate reaches 0 one step after the last, so every step learns
    left = (steps + 1 - step) / (steps + 1 - warmup)  # 1 down to 0
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * left
    if schedule == "wsd":
        return peak * min(1.0, (steps + 1 - step) / (DECAY_SHARE * steps))
    return peak * 0.5 * (1 - math.cos(math.pi * left))
