"""Faster training on a CPU: the gradients of model.py as it is written."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reference import TINY, settings
from torch import nn

from nanogpt2.classifier import GPTClassifier
from nanogpt2.cpu import training
from nanogpt2.cpu.training import _normalized, install, linear, recomputable, uninstall
from nanogpt2.model import GPT
from nanogpt2.training.distributed import World
from nanogpt2.training.lora import add_lora
from nanogpt2.training.trainer import Trainer

tanh_gelu = partial(F.gelu, approximate="tanh")


def error(result, reference):
    """RMS of the difference over RMS of the reference."""
    difference = result.double() - reference
    return (difference.pow(2).mean().sqrt() / reference.pow(2).mean().sqrt()).item()


@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 7), (1, 7)])
def test_linear(shape):
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 11)
    weight, bias = torch.randn(11, 7, requires_grad=True), torch.randn(11, requires_grad=True)
    y = linear(x, weight, bias)
    y.backward(dy)
    xd, wd, bd = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    expected = xd @ wd.t() + bd
    expected.backward(dy.double())
    assert error(y, expected.detach()) < 1e-6
    for ours, theirs in ((x, xd), (weight, wd), (bias, bd)):
        assert error(ours.grad, theirs.grad) < 1e-6 and ours.grad.stride() == ours.stride()
    with torch.no_grad():
        # what is generated equals transformers' to the last bit
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
        assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_linear_leaves_what_is_frozen_alone():
    x, weight, bias = torch.randn(3, 7, requires_grad=True), torch.randn(11, 7), torch.randn(11)
    linear(x, weight, bias).sum().backward()
    assert x.grad is not None and weight.grad is None and bias.grad is None


def kept(function):
    """What autograd keeps of a function's tensors: their addresses."""
    found = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: found.append(t.data_ptr()) or t, lambda t: t
    )
    with hooks:
        function()
    return found


def test_what_is_cheap_is_made_again():
    """GELU's and the layer norm's results are not kept; the gradients stay, to the last bit."""
    x, weight = torch.randn(2, 5, 7, requires_grad=True), torch.randn(11, 7, requires_grad=True)
    gain, shift = (torch.randn(7, requires_grad=True) for _ in range(2))
    leaves, dy = (x, weight, gain, shift), torch.randn(2, 5, 11)

    def gradients(cheap, plain):
        made = recomputable(partial(_normalized, eps=1e-5), x, gain, shift)
        made = made.clone() if plain else made
        made = recomputable(tanh_gelu, made) if cheap == "gelu" else made
        # a copy knows nothing of how it was made
        made = made.clone() if plain else made
        y = []
        assert (made.data_ptr() in kept(lambda: y.append(linear(made, weight)))) == plain
        return torch.autograd.grad(y, leaves, dy)

    for cheap in ("layer_norm", "gelu"):
        for ours, plain in zip(gradients(cheap, False), gradients(cheap, True), strict=True):
            assert torch.equal(ours, plain)


def test_of_what_is_frozen_nothing_is_kept():
    x, weight = torch.randn(3, 7, requires_grad=True), torch.randn(11, 7)
    assert kept(lambda: linear(x, weight)) == [weight.data_ptr()]


def test_linear_in_bfloat16_is_autocasts():
    x, weight, bias = torch.randn(2, 5, 7), torch.randn(11, 7, requires_grad=True), torch.randn(11)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, bias)
        assert torch.equal(y, F.linear(x, weight, bias))
    assert y.dtype == torch.bfloat16


def test_a_compiler_chooses_its_own_products():
    """oneDNN's operation is torch.compile's own, and it refuses to find it in a model."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    compiled = torch.compile(linear, backend=keep)
    assert torch.allclose(compiled(x, weight), linear(x, weight), atol=1e-6)
    assert graphs and "pointwise" not in graphs[0]


# ---- on a model


def models(way):
    torch.manual_seed(0)
    model = GPT(replace(TINY, dropout=0.3))
    if way.startswith("classifier"):
        model = GPTClassifier(model, ("a", "b"))
    if way.endswith("lora"):
        add_lora(model, 2, 8.0)
        for name, p in model.named_parameters():
            if "lora_b" in name:
                nn.init.normal_(p)
    return model


def gradients(model, again=1):
    torch.manual_seed(1)
    ids = torch.randint(61, (2, 3, 9))
    targets = ids[1] % 2
    model.zero_grad()
    torch.manual_seed(2)
    for _ in range(again):
        loss = model(ids[0], targets)
        loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("way", ["gpt", "gpt lora", "classifier", "classifier lora"])
@pytest.mark.parametrize("copies", [False, True])
def test_an_installed_model_has_the_plain_ones_gradients(way, copies):
    plain, fast = models(way), models(way)
    names = list(fast.state_dict())
    install(fast, add_lookups=True)
    if copies:
        # a copy's functions are those of its own layers
        original, fast = fast, copy.deepcopy(fast)
        with torch.no_grad():
            for p in original.parameters():
                p.zero_()
    assert list(fast.state_dict()) == names
    (loss, found), (plain_loss, expected) = gradients(fast, again=2), gradients(plain, again=2)
    assert error(loss, plain_loss.double()) < 1e-6
    for name, gradient in expected.items():
        assert error(found[name], gradient.double()) < 1e-5, name


def test_what_is_installed_can_be_taken_away():
    plain, model = models("gpt"), models("gpt")
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    install(model, add_lookups=True)
    # not by chance the same: another way to multiply, a loss of its own
    assert all("forward" in vars(m) for m in model.modules() if type(m) is nn.Linear)
    assert "loss" in vars(model) and "forward" in vars(model.wte)
    uninstall(model)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
    (loss, found), (plain_loss, expected) = gradients(model), gradients(plain)
    assert torch.equal(loss, plain_loss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_wraps_a_block_stays():
    """Activation checkpointing is a function of the block's own too."""
    model = models("gpt")
    for block in model.h:
        block.forward = partial(block.forward)
    install(model)
    uninstall(model)
    assert all("forward" in vars(block) for block in model.h)


def test_an_installed_model_answers_as_before_without_gradients():
    plain, fast = models("gpt").eval(), models("gpt").eval()
    install(fast, add_lookups=True)
    ids = torch.randint(61, (2, 9))
    with torch.no_grad():
        assert torch.equal(fast(ids), plain(ids))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(ids), plain(ids))
        assert torch.equal(fast(ids, ids), plain(ids, ids))


def test_other_kernels_than_pytorchs_stay(monkeypatch):
    """Whichever are chosen, also once it is installed."""
    model = models("gpt")
    install(model)
    model.use_kernels("reference")
    for name in ("layer_norm", "gelu"):
        monkeypatch.delattr(F, name)
    monkeypatch.delattr("nanogpt2.ops.chunked_cross_entropy")
    monkeypatch.delattr("nanogpt2.cpu.training.chunked_cross_entropy")
    ids = torch.randint(61, (2, 9))
    model(ids, ids).backward()


@pytest.mark.parametrize(
    ("options", "kernels", "installed", "adds"),
    [
        ({}, "torch", True, True),
        ({"ema": 0.9}, "torch", True, True),
        ({"lora_rank": 2}, "torch", True, True),
        ({"activation_checkpointing": True}, "torch", True, True),
        ({"compile": True}, "torch", False, False),
        ({}, "reference", False, False),
    ],
)
def test_the_trainer_installs_it(monkeypatch, options, kernels, installed, adds):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    model = GPT(TINY)
    model.use_kernels(kernels)
    trainer = Trainer(settings(**options), model, World("cpu"))
    for each in {trainer.model, trainer.eval_model}:
        assert ("forward" in vars(each.ln_f)) == ("loss" in vars(each)) == installed
    assert ("forward" in vars(model.wte)) == adds


def test_the_trainer_leaves_ddps_gradients_to_autograd(monkeypatch):
    monkeypatch.setattr("nanogpt2.training.trainer.wrap", lambda model: model)
    model = GPT(TINY)
    Trainer(settings(), model, World("cpu", 0, 2))
    assert "forward" in vars(model.ln_f) and "forward" not in vars(model.wte)


@pytest.mark.parametrize("is_intel", [False, True])
def test_either_library_multiplies(monkeypatch, is_intel):
    monkeypatch.setattr(training, "is_intel", lambda: is_intel)
    torch.manual_seed(0)
    a, b, bias = torch.randn(3, 5, 40), torch.randn(40, 7), torch.randn(7)
    expected = (a.double() @ b.double() + bias).float()
    torch.testing.assert_close(training.matmul(a, b, bias), expected)
