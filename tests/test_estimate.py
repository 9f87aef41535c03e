"""Estimates against the model itself."""

import subprocess
import sys
from dataclasses import replace
from math import prod

import pytest
import torch
from reference import ROOT

from nanogpt2.config import PRESETS, GPTConfig
from nanogpt2.model import GPT
from nanogpt2.training import estimate
from nanogpt2.training.estimate import (
    device_rate,
    measure_matmul_rate,
    memory_estimate,
    model_flops,
)

SHAPE = GPTConfig(vocab_size=257, block_size=256, n_layer=6, n_head=6, n_embd=192)


@pytest.mark.parametrize("config", [SHAPE, GPTConfig(61, 37, 2, 3, 24), PRESETS["gpt2-xl"]])
def test_parameters(config):
    with torch.device("meta"):
        model = GPT(config)
    assert config.n_parameters == sum(p.numel() for p in model.parameters())


def test_published_sizes():
    found = [config.n_parameters for config in PRESETS.values()]
    assert found == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]


def test_flops_against_a_count_of_the_matrix_products():
    from torch.utils.flop_counter import FlopCounterMode

    config, T = replace(SHAPE, block_size=32), 32
    model = GPT(config)
    ids = torch.randint(257, (2, T))
    # plain logits and attention without a fused kernel: what the counter knows
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    products = {torch.ops.mkldnn._linear_pointwise: lambda x, w, *_, **__: 2 * prod(x) * w[0]}
    with FlopCounterMode(display=False, custom_mapping=products) as counter, plain:
        model(ids).sum().backward()
    expected = model_flops(config, 2 * T, T)
    # biases and layer norms are parameters too, though not of a product: half a per cent
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_memory_grows_with_what_needs_it():
    def memory(config=SHAPE, rows=8, block=64, **options):
        return memory_estimate(config, rows, block, **options)

    base = memory()
    frozen = memory(trainable=1000)
    assert frozen < base and memory(dtype="bfloat16", rows=64) < memory(rows=64)
    assert memory(grad_accum=2) > base and memory(replace(SHAPE, dropout=0.1)) > base
    # malloc leaves holes; in fp32 a CPU keeps fewer activations, which weighs more
    low = {"rows": 64, "dtype": "bfloat16"}
    assert memory(**low, device="cuda") < memory(**low)
    assert memory(rows=64) < memory(rows=64, device="cuda")
    # a classifier has few logits, and one gradient of the embedding
    classifier = memory(trainable=SHAPE.n_parameters + 2 * 192, labels=2, device="cuda")
    logits, embedding = 4 * 8 * 64 * (257 - 2), 4 * 257 * 192
    assert memory(device="cuda") - classifier == logits + embedding - 8 * 2 * 192
    # twice the sequences, twice the activations: a block and token keep 64 C + 4 H bytes
    more = memory(rows=64, device="cuda") - memory(rows=32, device="cuda")
    tokens = 32 * 64
    assert more == tokens * (6 * (64 * 192 + 4 * 6) + 12 * 192 + 4 * 257)
    # a CPU makes 6 C of these 16 C floats again, and its malloc leaves holes
    more = memory(rows=64) - memory(rows=32)
    assert more == pytest.approx(
        tokens * (6 * (40 * 192 + 4 * 6) + 12 * 192 + 4 * 257) * 4 / 3, abs=1
    )


def peak_script(rows: int, block: int, dtype: str) -> str:
    return f"""
import torch
from nanogpt2.config import GPTConfig
from nanogpt2.cpu.training import install
from nanogpt2.model import GPT

def field(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024

def steps(shape, rows, block, count):
    model = GPT(shape)
    # as a Trainer does
    install(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for _ in range(count):
        ids = torch.randint(shape.vocab_size, (rows, block))
        with torch.autocast("cpu", torch.bfloat16, enabled={dtype!r} == "bfloat16"):
            loss = model(ids, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

torch.set_num_threads(1)
# the libraries' own pages are no part of the estimate
steps(GPTConfig(64, 8, 1, 2, 8), 1, 8, 1)
before = field("VmRSS")
shape = GPTConfig(vocab_size=257, block_size=256, n_layer=6, n_head=6, n_embd=192)
steps(shape, {rows}, {block}, 2)
print(field("VmHWM") - before)
"""


@pytest.mark.parametrize(
    "rows, block, dtype",
    [(12, 128, "float32"), pytest.param(24, 100, "bfloat16", marks=pytest.mark.slow)],
)
def test_memory_is_near_the_measured_peak(rows, block, dtype):
    script = peak_script(rows, block, dtype)
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, cwd=ROOT, text=True
    )
    expected = memory_estimate(SHAPE, rows, block, dtype=dtype)
    assert expected == pytest.approx(int(done.stdout), rel=0.25)


def test_matrix_products_are_measured():
    state = torch.get_rng_state()
    assert measure_matmul_rate("cpu", "float32") > 1e8
    assert torch.equal(torch.get_rng_state(), state)
    rate = device_rate("cpu", "bfloat16")
    assert rate.flops > 1e6 and "own matrix products" in rate.source


def test_datasheets_by_name(monkeypatch):
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA GeForce GTX 1080": 7.0,
    }
    monkeypatch.setattr(estimate, "measure_matmul_rate", lambda device, dtype: 7.0)
    for name, flops in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert device_rate("cuda", "bfloat16").flops == flops
        # the sheets' numbers are those of bf16
        assert device_rate("cuda", "float32").flops == 7.0


@pytest.mark.gpu
def test_memory_on_a_gpu():
    shape, rows = replace(SHAPE, vocab_size=50257), 8
    model = GPT(shape).to("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for _ in range(2):
        ids = torch.randint(50257, (rows, 256), device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    expected = memory_estimate(shape, rows, 256, dtype="bfloat16", device="cuda")
    assert expected == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.25)
