"""Narrow weights: what each product computes, what is kept, what is refused."""

import json
import os
import subprocess
import sys

import pytest
import torch
from reference import ROOT, TINY, prompts, twins
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from nanogpt2 import generate, load_classifier, load_model, load_tokenizer, save_model
from nanogpt2.config import SCHEMES
from nanogpt2.cpu.inference_model import MATRICES, pack
from nanogpt2.cpu.layouts import AS_STORED, BYTES
from nanogpt2.cpu.layouts import FLOAT as ALL
from nanogpt2.cpu.prepacked import (
    FloatLinear,
    HalfLinear,
    Int7Linear,
    Int8Linear,
    onednn_sums_exactly,
    prepacked_linear_for,
    to_int8,
)
from nanogpt2.cpu.prepared import prepared_for
from nanogpt2.model import GPT
from nanogpt2.quantize import measure

# without the layout of the step in C, which nobody has compiled here: see test_native.py
FLOAT = {name: layout for name, layout in ALL.items() if name != "rows"}

M, K, N = 5, 24, 37


@pytest.fixture
def model(tmp_path):
    return twins(tmp_path)[0]


@pytest.fixture
def parts():
    torch.manual_seed(0)
    return torch.randn(M, K) * torch.rand(M, 1) * 9 + 1, torch.randn(N, K), torch.randn(N)


def int8_product(weight, bias):
    return Int8Linear(*to_int8(weight), bias)


def int7_product(weight, bias):
    return Int7Linear(*to_int8(weight), bias)


# fbgemm's product is right on every processor; oneDNN's is used only where it is, with VNNI
NARROW = {"int8 without VNNI": int7_product}
if onednn_sums_exactly():
    NARROW["int8"] = int8_product
PRODUCTS = {"float": FloatLinear, "fp16": HalfLinear} | NARROW
# RMS of the difference / RMS; int8: 1 / 127 of a range of about 3 deviations, rounded evenly
TOLERANCE = {"float": 1e-6, "fp16": 5e-4, "int8": 1.2e-2, "int8 without VNNI": 2e-2}


def ratio(found, expected):
    return (found - expected).norm() / expected.norm()


@pytest.mark.parametrize("kind", PRODUCTS)
def test_products(parts, kind):
    x, weight, bias = parts
    product = PRODUCTS[kind](weight, bias)
    expected, residual = F.linear(x, weight, bias), torch.randn(M, N)
    assert ratio(product(x), expected) < TOLERANCE[kind]
    assert ratio(product.gelu(x), F.gelu(expected, approximate="tanh")) < TOLERANCE[kind]
    assert ratio(product.plus(x, residual), expected + residual) < TOLERANCE[kind]
    assert ratio(product(x.view(1, M, K)), expected[None]) < TOLERANCE[kind]
    # the tanh form, which is nearer to the other one than these products are to theirs
    assert ratio(product.gelu(x), F.gelu(product(x), approximate="tanh")) < 1e-6
    without = PRODUCTS[kind](weight, None)
    assert ratio(without(x), F.linear(x, weight)) < TOLERANCE[kind]


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_no_tokens_have_no_scores(model, tmp_path, scheme):
    packed = load_model(tmp_path, quantize=scheme)
    assert packed(torch.empty(1, 0, dtype=torch.int64)).shape == (1, 0, TINY.vocab_size)


def test_what_is_too_large_for_fp16_is_the_largest_there_is(model, tmp_path):
    with torch.no_grad():
        model.wte.weight[3, 5] = -7e4
    save_model(model, tmp_path / "large")
    for packed in (load_model(tmp_path / "large", quantize="fp16"), pack(model, "fp16")):
        assert packed.wte(torch.tensor([3]))[0, 5] == -65504
        assert dict(packed.stored())["wte.weight"][3, 5] == -65504


def test_fp16_only_rounds_the_weights(parts):
    x, weight, bias = parts
    assert ratio(HalfLinear(weight, bias)(x), F.linear(x, weight.half().float(), bias)) < 1e-6


@pytest.mark.parametrize("N", [36, 37])
@pytest.mark.parametrize("K", [768, 1280])
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3), (0,)])
def test_a_head_of_fp16_in_two_parts(N, K, shape):
    weight, x = torch.randn(N, K), torch.randn(*shape, K)
    head = HalfLinear(weight, None)
    assert head.layout == "fbgemm_fp16_head"
    assert torch.equal(head.stored()[""], weight.half())
    found, expected = head(x), F.linear(x, weight.half().float())
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", NARROW)
def test_int8_by_hand(parts, kind):
    x, weight, bias = parts
    levels = {"int8": 255, "int8 without VNNI": 127}[kind]
    product = NARROW[kind](weight, bias)
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    q = (weight / scale).round()
    assert torch.equal(product.stored()[""], q.to(torch.int8))
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    d = (high - low) / 255
    u = ((x - low) / d).round()
    if levels == 127:
        # two steps are one, and what they stand for is between them
        u = 2 * (u / 2).floor() + 0.5
    assert ratio(product(x), (low + d * u) @ (q * scale).t() + bias) < 1e-5


@pytest.mark.parametrize("kind", NARROW)
def test_int8_is_the_same_to_the_bit_in_every_layout(parts, kind):
    x, weight, bias = parts
    product, released = NARROW[kind](weight, bias), []
    product._release = released.append
    q, usual = product.stored()[""], product(x)
    assert product.layout == product.usual and len(released) == 1 and released[0] is q
    assert product.layouts == (product.usual, *(n for n in BYTES if n.startswith("tiles")))
    for name in [*product.layouts, *reversed(product.layouts)]:
        product.lay_out(name)
        assert torch.equal(product(x), usual)
        assert torch.equal(product.stored()[""], q)
    assert len(released) == 1


@pytest.mark.parametrize("kind", NARROW)
def test_int8_of_the_largest_numbers(kind):
    assert_holds_the_largest(NARROW[kind])


def assert_holds_the_largest(product):
    """Without VNNI a processor adds two products in 16 bits, which must hold them."""
    x, weight = torch.ones(2, 64), torch.full((16, 64), -3.0)
    x[:, 0] = 0
    expected = torch.full((2, 16), -3.0 * 63)
    torch.testing.assert_close(product(weight, None)(x), expected, rtol=5e-3, atol=0)


def test_the_product_chosen_here_holds_the_largest_numbers():
    assert_holds_the_largest(lambda weight, _: prepacked_linear_for(weight, None, None, "int8"))


LARGEST = """
import torch
from nanogpt2.cpu.prepacked import prepacked_linear_for
x, weight = torch.ones(2, 64), torch.full((16, 64), -3.0)
x[:, 0] = 0
product = prepacked_linear_for(weight, None, None, "int8")
torch.testing.assert_close(product(x), torch.full((2, 16), -3.0 * 63), rtol=5e-3, atol=0)
print(type(product).__name__)
"""


def test_the_product_follows_what_onednn_may_use():
    """ONEDNN_MAX_CPU_ISA makes of any processor one without VNNI; a process reads it once."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", LARGEST]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.stdout == "Int7Linear\n", done.stderr


@pytest.mark.parametrize("kind", ["fp16", *NARROW])
def test_a_row_does_not_depend_on_its_neighbours(parts, kind):
    x, weight, bias = parts
    product = PRODUCTS[kind](weight, bias)
    together = product(x)
    for row in range(M):
        torch.testing.assert_close(product(x[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize("kind", NARROW)
def test_int8_is_the_same_to_the_bit_alone(kind):
    """Or the next product's rounding to 8 bits would tell."""
    torch.manual_seed(0)
    product = NARROW[kind](torch.randn(64, 768), torch.randn(64))
    x = torch.randn(2000, 768) * torch.rand(2000, 1) * 9 + torch.randn(2000, 1)
    together = torch.cat([product(some) for some in x.split(5)])
    alone = torch.cat([product(row) for row in x.split(1)])
    assert torch.equal(alone, together)


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("rows", [1, 2])
def test_rows_of_one_number(rows, kind):
    """A range may be nothing."""
    product = NARROW[kind](torch.ones(3, 4), None)
    for number in (7.0, -7.0, 0.0, 1e-38):
        expected = torch.full((rows, 3), 4 * number)
        torch.testing.assert_close(product(torch.full((rows, 4), number)), expected)


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_none(rows, wrong, kind):
    x = torch.randn(rows, 4)
    x[0, 1] = wrong
    found = NARROW[kind](torch.randn(3, 4), None)(x)
    assert not found[0].isfinite().any() and found[1:].isfinite().all()


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("keeps", [False, True])
def test_a_matrix_takes_every_layout_after_every_other(parts, keeps, order):
    """The weight stays equal to the bit; it is released once, when it is not read any more."""
    x, weight, bias = parts
    weight = weight if order == "rows" else weight.t().contiguous().t()
    released = []
    product = FloatLinear(weight, bias, released.append, keeps=keeps)
    assert product.layout == "onednn" and product.shape == (N, K)
    expected, residual = F.linear(x, weight, bias), torch.randn(M, N)
    for n, name in enumerate([*FLOAT, *reversed(FLOAT), "tiles_96", "onednn_1"]):
        product.lay_out(name)
        assert product.layout == name
        assert bool(released) == (n >= len(AS_STORED))
        assert all(t.data_ptr() == weight.data_ptr() for t in released[:1])
        for found, wanted in (
            (product(x), expected),
            (product.gelu(x), F.gelu(expected, approximate="tanh")),
            (product.plus(x, residual), expected + residual),
        ):
            assert ratio(found, wanted) < 1e-6
        assert torch.equal(product.stored()[""], weight)
        assert (product.stored()[""].data_ptr() == weight.data_ptr()) == (
            keeps or (name in AS_STORED and not released)
        )


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_a_packed_model_is_the_model(model, tmp_path, scheme):
    ids = prompts(2, 9)
    expected = model(ids).detach()
    loss = model(ids, ids).detach()
    packed = pack(load_model(tmp_path), scheme)
    tolerance = {None: 1e-6, "fp16": 1e-3, "int8": 0.1}[scheme]
    assert ratio(packed(ids), expected) < tolerance
    assert abs(packed(ids, ids) / loss - 1) < tolerance
    assert not packed.training and not any(p.requires_grad for p in packed.parameters())
    if scheme is None:
        options = {"max_new_tokens": 20, "num_beams": 3, "eos_token_id": None}
        plain = generate(model, ids, **options).sequences
        for name in FLOAT:
            for product in prepared_for(packed).products():
                if name in product.layouts:
                    product.lay_out(name)
            assert packed.h[1].mlp.c_fc.layout == name
            assert torch.equal(generate(packed, ids, **options).sequences, plain)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_saved_and_loaded(model, tmp_path, scheme):
    packed = load_model(tmp_path, quantize=scheme)
    save_model(packed, tmp_path / "narrow")
    again = load_model(tmp_path / "narrow", quantize=scheme)
    state = dict(packed.stored())
    assert {name.removesuffix("_scale") for name in state} == {*model.state_dict()}
    for name, tensor in again.stored():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name])
        narrow = name.endswith(MATRICES)
        assert narrow == (tensor.dtype == {"fp16": torch.float16, "int8": torch.int8}[scheme])
    ids = prompts(2, 7)
    assert torch.equal(again(ids), packed(ids))


def test_fp16_is_read_by_transformers(model, tmp_path):
    save_model(load_model(tmp_path, quantize="fp16"), tmp_path / "narrow")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "narrow", dtype=torch.float32)
    ids = prompts(2, 7)
    expected = load_model(tmp_path / "narrow")(ids)
    assert ratio(theirs(ids).logits, expected) < 1e-6


def test_int8_is_read_by_nobody_by_mistake(model, tmp_path):
    save_model(load_model(tmp_path, quantize="int8"), tmp_path / "narrow")
    with pytest.raises(OSError, match="no file named"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "narrow")
    # a quarter of the matrices, and one scale a row
    file = tmp_path / "narrow/model.int8.safetensors"
    whole = (tmp_path / "model.safetensors").stat().st_size
    assert file.stat().st_size < 0.5 * whole
    assert isinstance(load_model(tmp_path / "narrow"), GPT)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_wide_is_left(tmp_path, model, scheme):
    """The narrow model's own tensors, what the products hold apart, take no wide copy."""
    packed = load_model(tmp_path, quantize=scheme)
    size = sum(t.numel() * t.element_size() for t in packed.state_dict().values())
    biases = sum(t.numel() * 4 for name, t in model.state_dict().items() if t.dim() == 1)
    assert size <= biases + model.wpe.weight.numel() * 4


def test_what_it_costs(tmp_path):
    """On what the demo model itself writes: at most half a percent of perplexity.

    Single texts of 600 tokens cost -0.2 to +1.1 %, so the mean over 16 texts is measured.
    """
    demo = load_model("demo")
    start = torch.tensor([load_tokenizer("demo").encode("The state of the Union")])
    options = {"do_sample": True, "seed": 1, "num_return_sequences": 16, "eos_token_id": None}
    texts = generate(demo, start, max_new_tokens=250, **options).sequences
    for scheme, most, least in (("fp16", 1e-4, 0.999), ("int8", 5e-3, 0.95)):
        text = (texts if scheme == "int8" else texts[:3]).flatten().tolist()
        cost = measure(demo, load_model("demo", quantize=scheme), text)
        assert abs(cost.perplexity_after / cost.perplexity_before - 1) < most
        assert cost.top1_agreement >= least
        assert cost.tokens == len(text) - 1
    with pytest.raises(ValueError, match="2 tokens or more"):
        measure(demo, demo, [5])


def test_what_cannot_be(model, tmp_path):
    with pytest.raises(ValueError, match=r"^quantize must be one of fp16, int8, not 'int4'"):
        load_model(tmp_path, quantize="int4")
    with pytest.raises(ValueError, match="device cpu and dtype float32, not cpu and bfloat16"):
        load_model(tmp_path, dtype="bfloat16", quantize="int8")
    with pytest.raises(ValueError, match="not cpu and bfloat16"):
        pack(GPT(TINY).bfloat16(), "fp16")
    save_model(load_model(tmp_path, quantize="int8"), tmp_path / "narrow")
    with pytest.raises(ValueError, match="generates but cannot be trained"):
        load_model(tmp_path / "narrow", dropout=0.0)
    with pytest.raises(ValueError, match="quantize must be int8"):
        load_model(tmp_path / "narrow", quantize="fp16")
    with pytest.raises(ValueError, match="no classifier"):
        load_classifier(tmp_path / "narrow")


def change_file(folder, change):
    """Rewrite the tensors of a folder of int8."""
    file = folder / "model.int8.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


NAME = "transformer.h.0.attn.c_attn.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(NAME + "_scale"), "_scale is missing"),
        (lambda t: t.update({NAME + "_scale": torch.ones(3)}), r"_scale' must be \(72,\), not"),
        (lambda t: t.update({NAME + "_scale": torch.ones(72).to(torch.int8)}), "not I8"),
        (lambda t: t.update({NAME: torch.ones(24, 72)}), "is no part of GPT-2"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.ones(24).to(torch.int8)}), "not I8"),
    ],
    ids=["no scale", "short scale", "narrow scale", "scale of a wide one", "narrow vector"],
)
def test_a_broken_folder(model, tmp_path, change, said):
    save_model(load_model(tmp_path, quantize="int8"), tmp_path / "narrow")
    change_file(tmp_path / "narrow", change)
    with pytest.raises(ValueError, match=said):
        load_model(tmp_path / "narrow")


def test_the_shape_is_stated_beside_it(model, tmp_path):
    save_model(load_model(tmp_path, quantize="int8"), tmp_path / "narrow")
    stated = json.loads((tmp_path / "narrow/config.json").read_text())
    assert stated["n_embd"] == TINY.n_embd


@pytest.mark.parametrize(("K", "in_two"), [(256, False), (512, False), (768, True)])
def test_only_a_head_is_in_two_parts(K, in_two):
    weight = torch.randn(9, K)
    head = prepacked_linear_for(weight, None, None, "fp16")
    assert (head.layout == "fbgemm_fp16_head") == in_two
    assert prepacked_linear_for(weight, None, torch.ones(9), "fp16").layout == "fbgemm_fp16"


@pytest.mark.parametrize("K", [24, 768])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_fp16_in_each_layout(K, rows):
    """The same weights in `rows`, where blocks.c is compiled, as by fbgemm."""
    weight, bias, x = torch.randn(37, K), torch.randn(37), torch.randn(rows, K)
    product = HalfLinear(weight, bias)
    expected = product(x)
    product.lay_out("rows")
    assert torch.equal(product.stored()[""], weight.half())
    torch.testing.assert_close(product(x), expected, rtol=1e-5, atol=1e-4)
    product.lay_out(product.usual)
    assert torch.equal(product(x), expected)
