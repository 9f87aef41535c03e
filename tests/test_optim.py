"""The optimizers and how their learning rate goes."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from reference import TINY

from nanogpt2.config import TrainConfig
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer
from nanogpt2.training import checkpoint as store
from nanogpt2.training.optim import learning_rate, make_optimizer
from nanogpt2.training.run_folder import RunFolder
from nanogpt2.weights import load_model


def test_decay_falls_on_matrices_only():
    model = GPT(TINY)
    optimizer = make_optimizer(model, lr=1.0, weight_decay=0.25)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        bare = name.endswith("bias") or "ln_" in name
        assert decays[id(p)] == (0.0 if bare else 0.25), name


def test_the_schedule_warms_up_and_falls():
    rates = [learning_rate(step, steps=100, warmup=10, peak=2.0) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert all(a > b > 0 for a, b in pairwise(rates[9:]))
    assert rates[54] == pytest.approx(1.0, abs=0.03) and rates[-1] < 0.001
    assert learning_rate(1, steps=1, warmup=0, peak=2.0) == pytest.approx(1.0)
    assert learning_rate(5, steps=5, warmup=9, peak=9.0) == 5.0


