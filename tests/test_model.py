"""The architecture: transformers' logits, GPT-2's initialisation, and the cache."""

import math

import pytest
import torch
from reference import PRESETS, TINY, twins

from nanogpt2.config import GPTConfig
from nanogpt2.model import GPT

ODD = [
    TINY,
    GPTConfig(vocab_size=11, block_size=8, n_layer=3, n_head=1, n_embd=7, eos_token_id=10),
    GPTConfig(vocab_size=97, block_size=65, n_layer=1, n_head=5, n_embd=40, eos_token_id=None),
    # gpt2-xl's 25 heads of 64, at reduced depth
    GPTConfig(vocab_size=101, block_size=33, n_layer=2, n_head=25, n_embd=1600, eos_token_id=0),
]


def random_ids(config, B=2, T=5):
    return torch.randint(config.vocab_size, (B, T))


@pytest.mark.parametrize("config", ODD, ids=lambda c: f"{c.n_layer}x{c.n_embd}/{c.n_head}")
def test_logits_are_transformers(tmp_path, config):
    ours, theirs = twins(tmp_path, config)
    for T in (1, 5, config.block_size):
        ids = random_ids(config, T=T)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_logits_are_transformers_at_the_size_of_gpt2(tmp_path):
    ours, theirs = twins(tmp_path, PRESETS["gpt2"])
    ids = random_ids(PRESETS["gpt2"], T=40)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = GPT(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == count


def test_initialisation_is_gpt2s():
    config = GPTConfig(vocab_size=503, block_size=128, n_layer=8, n_head=4, n_embd=256)
    model = GPT(config)
    residual = 0.02 / math.sqrt(2 * config.n_layer)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif "ln_" in name:
            assert (p == 1).all()
        else:
            std = 0.01 if name == "wpe.weight" else residual if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < std / 20, name


def test_the_loss_is_the_mean_cross_entropy(tmp_path):
    model, theirs = twins(tmp_path)
    ids = random_ids(TINY, T=7)
    targets = random_ids(TINY, T=7)
    targets[0, 2:] = -100
    logits = theirs(ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(ids, targets), expected)


def test_gradients_are_transformers(tmp_path):
    model, theirs = twins(tmp_path)
    ids, targets = random_ids(TINY, T=9), random_ids(TINY, T=9)
    model(ids, targets).backward()
    logits = theirs(ids).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    expected = dict(theirs.transformer.named_parameters())
    for name, p in model.named_parameters():
        grad = expected[name].grad
        if grad.shape != p.shape or ("c_" in name and name.endswith("weight")):
            grad = grad.t()
        torch.testing.assert_close(p.grad, grad, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 1, 3], [9], [2, 7]])
def test_cached_equals_uncached(tmp_path, pieces):
    model, _ = twins(tmp_path)
    ids = random_ids(TINY, B=3, T=sum(pieces))
    cache = model.new_cache(3, max_length=9)
    with torch.no_grad():
        parts = [model.hidden_states(piece, cache=cache) for piece in ids.split(pieces, dim=1)]
        torch.testing.assert_close(model.logits(torch.cat(parts, dim=1)), model(ids))
    assert cache.length == 9
    with pytest.raises(ValueError, match="room for 9"):
        model.hidden_states(ids[:, :1], cache=cache)


def test_a_cached_step_allocates_no_new_cache(tmp_path):
    model, _ = twins(tmp_path)
    cache = model.new_cache(2)
    before = cache.k.data_ptr(), cache.v.data_ptr()
    for _ in range(3):
        model.hidden_states(random_ids(TINY, T=2), cache=cache)
    assert (cache.k.data_ptr(), cache.v.data_ptr()) == before


def test_the_future_is_not_seen(tmp_path):
    model, _ = twins(tmp_path)
    ids = random_ids(TINY, T=8)
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % TINY.vocab_size
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[:, :5], model(changed)[:, :5])
        assert not torch.allclose(model(ids)[:, 5], model(changed)[:, 5])


def test_a_context_too_long_is_an_error():
    model = GPT(TINY)
    with pytest.raises(ValueError, match="at most 37"):
        model(torch.zeros(1, 38, dtype=torch.int64))


def test_dropout_only_while_training():
    config = GPTConfig(vocab_size=61, block_size=37, n_layer=2, n_head=3, n_embd=24, dropout=0.5)
    model, ids = GPT(config), random_ids(config)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_it_overfits_one_batch():
    model = GPT(TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    ids = random_ids(TINY, B=4, T=17)
    for _ in range(300):
        loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01
