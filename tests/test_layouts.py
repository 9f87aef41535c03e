"""Every layout of a weight against F.linear and against whole numbers."""

import pytest
import torch
from torch.nn import functional as F

from nanogpt2.cpu.layouts import BYTES, FLOAT
from nanogpt2.cpu.prepacked import onednn_sums_exactly

SIZES = [(37, 24), (131, 15), (64, 33), (193, 8), (1, 5)]  # N, K
LEADING = [(0,), (1,), (5,), (8,), (9,), (20,), (2, 3), (3, 0), (3, 1, 4)]
# oneDNN's product of 8 bits saturates at 16 bits without VNNI
ALL_BYTES = [name for name in BYTES if name != "onednn_u8s8" or onednn_sums_exactly()]
BITS = {name: 7 if name == "fbgemm_7bit" else 8 for name in BYTES}


def stored(weight, order):
    """The same numbers, row by row or column by column, as OpenAI's files have them."""
    return weight.contiguous() if order == "rows" else weight.t().contiguous().t()


def close(found, expected):
    assert found.shape == expected.shape and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FLOAT)
def test_float(name, size, order):
    N, K = size
    weight = torch.randn(N, K)
    layout, bias = FLOAT[name](stored(weight, order)), torch.randn(N)
    assert torch.equal(layout.dense(), weight)
    for shape in LEADING:
        x, residual = torch.randn(*shape, K), torch.randn(*shape, N)
        copies = x.clone(), bias.clone(), residual.clone()
        expected = F.linear(x.double(), weight.double(), bias.double()).float()
        close(layout.product(x, bias), expected)
        close(layout.product(x, None), F.linear(x.double(), weight.double()).float())
        close(layout.gelu(x, bias), F.gelu(expected.double(), approximate="tanh").float())
        close(layout.plus(x, bias, residual), expected + residual)
        # nothing is written over what the caller owns
        for now, before in zip((x, bias, residual), copies, strict=True):
            assert torch.equal(now, before)
    assert torch.equal(layout.dense(), weight)


@pytest.mark.parametrize("name", FLOAT)
def test_float_on_inputs_that_are_not_contiguous(name):
    weight, x = torch.randn(37, 24), torch.randn(24, 3).t()
    close(FLOAT[name](weight).product(x, None), F.linear(x, weight))


@pytest.mark.parametrize("name", FLOAT)
def test_float_in_inference_mode(name):
    weight = torch.randn(37, 24)
    with torch.inference_mode():
        x, bias = torch.randn(2, 24), torch.randn(37)
        layout = FLOAT[name](weight)
        close(layout.plus(x, bias, torch.ones(2, 37)), F.linear(x, weight, bias) + 1)
    # what was laid out there serves outside as well
    close(layout.product(torch.ones(2, 24), None), weight.sum(dim=1).expand(2, 37))


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ALL_BYTES)
def test_bytes(name, size, order):
    """Equal to the bit: the sums are whole numbers below 2^24, which float32 holds."""
    N, K = size
    q = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    scale = torch.rand(N) + 0.5
    layout = BYTES[name](stored(q, order), scale)
    assert layout.dense().dtype == torch.int8 and torch.equal(layout.dense(), q)
    most, middle = 2 ** BITS[name] - 1, 2 ** (BITS[name] - 1)
    for shape in LEADING:
        u = torch.randint(0, most + 1, (*shape, K), dtype=torch.uint8)
        before = u.clone()
        found = layout.product(u, middle)
        sums = (u.long() - middle) @ q.long().t()
        assert not sums.numel() or sums.abs().max() < 2**24
        assert found.dtype == torch.float32 and torch.equal(found, sums.float() * scale)
        assert torch.equal(u, before)
    assert torch.equal(layout.dense(), q)


@pytest.mark.parametrize("name", ALL_BYTES)
def test_bytes_of_the_largest_numbers(name):
    """Two products of the largest numbers do not fit into 16 bits, which must not be used."""
    K, N = 768, 101
    most, middle = 2 ** BITS[name] - 1, 2 ** (BITS[name] - 1)
    q = torch.full((N, K), 127, dtype=torch.int8)
    q[::2] = -127
    layout = BYTES[name](q, torch.ones(N))
    for number in (0, most):
        u = torch.full((3, K), number, dtype=torch.uint8)
        expected = ((u.long() - middle) @ q.long().t()).float()
        assert torch.equal(layout.product(u, middle), expected)


@pytest.mark.parametrize("rows", [1, 5, 8])
@pytest.mark.parametrize("name", [name for name in FLOAT if name.startswith("tiles")])
def test_a_row_of_tiles_is_the_same_to_the_bit_alone(name, rows):
    layout, x = FLOAT[name](torch.randn(131, 40)), torch.randn(rows, 40)
    alone = torch.cat([layout.product(row, None) for row in x.split(1)])
    assert torch.equal(layout.product(x, None), alone)
