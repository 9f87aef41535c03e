"""The optimizers and how their learning rate goes."""

from itertools import pairwise

import pytest
import torch
from reference import TINY

from nanogpt2.model import GPT
from nanogpt2.training.lora import add_lora
from nanogpt2.training.optim import learning_rate, make_optimizers


def test_decay_falls_on_matrices_only():
    model = GPT(TINY)
    (optimizer,) = make_optimizers(model, "adamw", lr=1.0, weight_decay=0.25)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        bare = name.endswith("bias") or "ln_" in name
        assert decays[id(p)] == (0.0 if bare else 0.25), name


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    model = GPT(TINY)
    adamw, muon = make_optimizers(model, "muon", lr=1.0, weight_decay=0.25)
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(muon, torch.optim.Muon)
    held = [{id(p) for g in o.param_groups for p in g["params"]} for o in (adamw, muon)]
    for name, p in model.named_parameters():
        of_muon = name.startswith("h.") and p.dim() == 2
        assert (id(p) in held[1]) == of_muon and (id(p) in held[0]) != of_muon, name


def test_muon_steps_are_orthogonal_and_as_large_as_adamws():
    model = GPT(TINY)
    *_, muon = make_optimizers(model, "muon", lr=0.5, weight_decay=0.0)
    weight = model.h[0].attn.c_proj.weight
    before = weight.detach().clone()
    ids = torch.randint(TINY.vocab_size, (2, 64, 7))
    model(*ids).backward()
    muon.step()
    change = weight.detach() - before
    # 0.2 is the usual size of AdamW's steps; five iterations bring singular values near one
    rate = 0.5 * 0.2 * max(weight.shape) ** 0.5
    singular = torch.linalg.svdvals(change) / rate
    assert singular.median() > 0.7 and singular.max() < 1.3


def test_frozen_parameters_are_left_out():
    model = GPT(TINY)
    add_lora(model, rank=2, alpha=4.0)
    held = [
        p
        for o in make_optimizers(model, "adamw", 1.0, 0.1)
        for g in o.param_groups
        for p in g["params"]
    ]
    trained = [p for n, p in model.named_parameters() if "lora_" in n]
    assert {*map(id, held)} == {*map(id, trained)} and len(held) == len(trained)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_schedules_warm_up_and_learn_until_the_last_step(schedule):
    rates = [learning_rate(step, 100, 10, 2.0, schedule) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert all(a >= b > 0 for a, b in pairwise(rates[9:]))
    assert learning_rate(1, 1, 0, 2.0, schedule) > 0
    assert learning_rate(5, 5, 9, 9.0, schedule) == 5.0


def test_where_each_schedule_is_in_the_middle_and_at_the_end():
    def at(step, schedule):
        return learning_rate(step, 100, 10, 2.0, schedule)

    assert at(55, "cosine") == pytest.approx(1.0, abs=0.03) and at(100, "cosine") < 0.001
    assert at(55, "linear") == pytest.approx(2 * 46 / 91)
    assert at(100, "linear") == pytest.approx(2 / 91)
    assert at(55, "constant") == at(100, "constant") == 2.0
    assert at(80, "wsd") == at(81, "wsd") == 2.0
    assert at(91, "wsd") == pytest.approx(1.0) and at(100, "wsd") == pytest.approx(0.1)
