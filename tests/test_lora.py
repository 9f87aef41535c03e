"""LoRA against its mathematics and against PEFT's."""

import copy

import pytest
import torch
from lora_reference import adapted, peft_pair, peft_twin
from reference import TINY, prompts, twins
from torch import nn

from nanogpt2.checkpoints.load import load_model
from nanogpt2.checkpoints.save import save_model
from nanogpt2.classifier import GPTClassifier
from nanogpt2.model import GPT
from nanogpt2.training.lora import LoRALinear, add_lora, lora_layers, merged

IDS = prompts(3, 7)
TARGETS = prompts(3, 7, seed=5)


def classifier(labels=("a", "b", "c")):
    return GPTClassifier(GPT(TINY), labels)


def test_it_starts_as_the_model_was():
    model = GPT(TINY)
    before, state = model(IDS), copy.deepcopy(model.state_dict())
    add_lora(model, 4, 8.0)
    assert torch.equal(model(IDS), before)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    # A is drawn as torch's Linear is, B is zero
    for name, layer in lora_layers(model).items():
        bound = layer.in_features**-0.5
        assert 0.8 * bound < layer.lora_a.abs().max() <= bound, name
        assert not layer.lora_b.any()
        assert layer.lora_a.shape == (4, layer.in_features)
        assert layer.lora_b.shape == (layer.out_features, 4)


def test_the_layers_of_the_blocks_have_it():
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    expected = {f"h.{i}.{name}" for i in range(TINY.n_layer) for name in names}
    assert lora_layers(adapted(GPT(TINY))).keys() == expected
    inside = {f"transformer.{name}" for name in expected}
    assert lora_layers(adapted(classifier())).keys() == inside


def test_only_a_and_b_learn():
    model = adapted(GPT(TINY))
    model(IDS, TARGETS).backward()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in model.named_parameters() if "lora_" in name}
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().max() > 0) == (name in learning), name


def test_a_classifiers_head_learns_too():
    model = adapted(classifier())
    bare = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert bare == {"score.weight"}


def test_b_has_a_gradient_at_once():
    model = GPT(TINY)
    add_lora(model, 4, 8.0)
    model(IDS, TARGETS).backward()
    for layer in lora_layers(model).values():
        assert layer.lora_b.grad.any() and not layer.lora_a.grad.any()


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_logits_and_gradients_are_pefts(tmp_path, kind):
    ours, theirs = twins(tmp_path)
    if kind == "classifier":
        ours = GPTClassifier(ours, ("a", "b", "c"))
    ours = adapted(ours)
    theirs = peft_twin(theirs, ours)
    found = ours(IDS)
    head = ours.score if kind == "classifier" else nn.Identity()
    hidden = theirs.base_model.model.transformer(IDS).last_hidden_state
    expected = head(hidden) if kind == "classifier" else theirs(IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    weight = torch.randn(found.shape)
    (found * weight).sum().backward()
    grads = {name: (x.lora_a.grad, x.lora_b.grad) for name, x in lora_layers(ours).items()}
    (expected * weight).sum().backward()
    for name, (a, b) in grads.items():
        their_a, their_b = peft_pair(theirs, name)
        torch.testing.assert_close(a, their_a.grad, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(b, their_b.grad, atol=1e-3, rtol=1e-4)


# ---- merging


@pytest.mark.parametrize("make", [lambda: GPT(TINY), classifier], ids=["gpt", "classifier"])
def test_merged_computes_the_same(make):
    model = adapted(make()).eval()
    plain = merged(model)
    assert type(plain) is type(model) and not lora_layers(plain)
    assert plain.state_dict().keys() == make().state_dict().keys()
    assert all(p.requires_grad for p in plain.parameters())
    torch.testing.assert_close(plain(IDS), model(IDS), atol=1e-5, rtol=1e-5)
    for name, layer in lora_layers(model).items():
        weight = plain.get_submodule(name).weight
        expected = layer.weight + 6.0 / 4 * layer.lora_b @ layer.lora_a
        torch.testing.assert_close(weight, expected)


def train(model, optimizer, steps):
    for _ in range(steps):
        idx = torch.randint(TINY.vocab_size, (2, 9))
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_goes_on_after_a_merge_bit_for_bit():
    def run(merges):
        torch.manual_seed(3)
        model = GPT(TINY)
        add_lora(model, 3, 6.0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(4):
            train(model, optimizer, 2)
            if merges:
                plain = merged(model)
                # what happens to the copy stays there
                nn.init.zeros_(plain.h[0].mlp.c_fc.bias)
                nn.init.zeros_(plain.h[0].mlp.c_fc.weight)
                nn.init.zeros_(plain.wte.weight)
        return model.state_dict()

    alone, disturbed = run(False), run(True)
    assert alone["h.0.mlp.c_fc.lora_b"].any()
    assert all(torch.equal(tensor, disturbed[name]) for name, tensor in alone.items())


# ---- what cannot be


def test_rank_zero_is_no_lora():
    model = GPT(TINY)
    add_lora(model, 0, 1.0)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("rank", "alpha", "message"),
    [
        (TINY.n_embd + 1, 8.0, "rank must be 0 to 24, the model's width, not 25"),
        (-1, 8.0, "not -1"),
        (4, 0.0, "alpha must be a finite number > 0, not 0.0"),
        (4, float("nan"), "not nan"),
        (4, float("inf"), "not inf"),
    ],
)
def test_impossible_numbers_are_refused(rank, alpha, message):
    model = GPT(TINY)
    with pytest.raises(ValueError, match=message):
        add_lora(model, rank, alpha)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_the_largest_rank_is_the_width():
    add_lora(GPT(TINY), TINY.n_embd, 8.0)


def test_lora_is_added_once():
    with pytest.raises(ValueError, match="has LoRA already"):
        add_lora(adapted(GPT(TINY)), 4, 8.0)


def test_nothing_is_drawn_but_a():
    """What chance gives to A is all it gives: a layer's own initialisation is not drawn again."""
    linear = nn.Linear(6, 10)
    torch.manual_seed(1)
    layer = LoRALinear(linear, 2, 4.0)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    nn.init.uniform_(torch.empty(2, 6))
    assert torch.equal(torch.get_rng_state(), after)
    assert layer.weight is linear.weight and layer.bias is linear.bias


def test_a_model_with_lora_is_not_saved_as_one_without(tmp_path):
    model = adapted(GPT(TINY))
    with pytest.raises(ValueError, match="the model has LoRA"):
        save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    save_model(merged(model), tmp_path / "model")
    torch.testing.assert_close(load_model(tmp_path / "model")(IDS), model(IDS), atol=1e-5, rtol=0)
