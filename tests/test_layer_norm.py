"""The layer norm kernels against the formulas in float64."""

import pytest
import torch
from kernel_reference import DEVICE, assert_close, gradients
from torch.library import opcheck

from nanogpt2.kernels.layer_norm import (
    DTYPES,
    MAX_COLUMNS,
    layer_norm,
    layer_norm_ref,
    residual_layer_norm,
)

pytestmark = pytest.mark.usefixtures("poisoned")


def residual_layer_norm_ref(x, residual, weight, bias, eps=1e-5):
    return layer_norm_ref(x + residual, weight, bias, eps), x + residual


def parameters(N, dtype=torch.float32):
    return [(1 + torch.randn(N, device=DEVICE)).to(dtype), torch.randn(N, device=DEVICE).to(dtype)]


def check(x, weight, bias, factor=1, eps=1e-5):
    """y, dx, dw and db."""
    grad = torch.randn(x.shape, device=DEVICE).to(x.dtype)
    inputs = (x, weight, bias)
    y, found = gradients(lambda *t: layer_norm(*t, eps), *inputs, grad=grad)
    doubles = [t.double() for t in inputs]
    y_ref, expected = gradients(lambda *t: layer_norm_ref(*t, eps), *doubles, grad=grad.double())
    assert y.dtype == x.dtype
    assert_close(y, y_ref, x.dtype, factor)
    for result, reference, source in zip(found, expected, inputs, strict=True):
        assert result.dtype == source.dtype
        assert_close(result, reference, source.dtype, 2 * factor)


@pytest.mark.parametrize("N", [3, 37, 64, 760, 768, 1000, 1600, 8192])
def test_rows(N):
    check(torch.randn(2, 5, N, device=DEVICE), *parameters(N))


@pytest.mark.parametrize("M", [1, 2, 37, 63])
def test_any_number_of_rows(M):
    """More than programs, fewer, and no multiple of them: each row counts once in dw and db."""
    check(torch.randn(M, 24, device=DEVICE), *parameters(24))


def test_rows_past_the_last_are_not_read():
    """Programs share rows evenly, so that the last one has fewer."""
    for M in (37, 40):
        x, grad = torch.full((2, 50, 24), float("nan"), device=DEVICE)
        x[:M], grad[:M] = torch.randn(2, M, 24, device=DEVICE)
        _, (dx, dw, db) = gradients(layer_norm, x[:M], *parameters(24), grad=grad[:M])
        assert dx.isfinite().all()
        assert dw.isfinite().all()
        assert db.isfinite().all()


def test_one_column():
    """Its norm is the bias, and true gradients are 0."""
    x, (weight, bias) = torch.randn(5, 1, device=DEVICE), parameters(1)
    y, (dx, dw, db) = gradients(layer_norm, x, weight, bias, grad=torch.ones_like(x))
    assert torch.equal(y, bias.expand(5, 1))
    assert not dx.any()
    assert not dw.any()
    assert db.item() == 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameter_dtype", DTYPES)
def test_dtypes(dtype, parameter_dtype):
    x = (2 + 3 * torch.randn(7, 130, device=DEVICE)).to(dtype)
    check(x, *parameters(130, parameter_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (2, 5, 760)])
def test_with_a_residual(dtype, shape):
    x, residual = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    inputs = (x, residual, *parameters(shape[-1], dtype))
    grads = tuple(torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    (y, total), found = gradients(residual_layer_norm, *inputs, grad=grads)
    doubles = [t.double() for t in inputs]
    (y_ref, total_ref), expected = gradients(
        residual_layer_norm_ref, *doubles, grad=tuple(g.double() for g in grads)
    )
    # the interpreter cuts bf16 off where a GPU rounds
    assert torch.equal(total, x + residual) or (dtype == torch.bfloat16 and DEVICE == "cpu")
    assert_close(y, y_ref, dtype, 2)
    assert_close(total, total_ref, dtype)
    for result, reference in zip(found, expected, strict=True):
        assert result.dtype == dtype
        assert_close(result, reference, dtype, 2)


def test_the_norm_is_that_of_the_rounded_sum():
    x, residual = (torch.randn(3, 40, device=DEVICE).bfloat16() for _ in range(2))
    weight, bias = parameters(40)
    y, total = residual_layer_norm(x, residual, weight, bias)
    assert torch.equal(y, layer_norm(total, weight, bias))


def test_one_result_unused():
    """A gradient that does not come counts as 0."""
    x, residual = (torch.randn(3, 40, device=DEVICE) for _ in range(2))
    inputs = (x, residual, *parameters(40))
    grad = torch.randn(3, 40, device=DEVICE)
    for i in range(2):
        _, found = gradients(lambda *t, i=i: residual_layer_norm(*t)[i], *inputs, grad=grad)
        doubles = [t.double() for t in inputs]

        def reference(*t, i=i):
            # an input without part in a result has the gradient 0
            return residual_layer_norm_ref(*t)[i] + 0 * (t[2] + t[3])

        _, expected = gradients(reference, *doubles, grad=grad.double())
        for result, true in zip(found, expected, strict=True):
            assert_close(result, true, factor=2)


def test_same_bits_every_time():
    inputs = (torch.randn(50, 40, device=DEVICE), *parameters(40))
    grad = torch.randn(50, 40, device=DEVICE)
    runs = [gradients(layer_norm, *inputs, grad=grad)[1] for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_extreme_values():
    """Constant rows have variance 0, tiny and huge ones theirs, and eps counts."""
    x = torch.randn(5, 100, device=DEVICE)
    x[1] = 3.0
    x[2] *= 1e-4
    x[3] *= 1e15
    check(x, *parameters(100), factor=4)
    check(x, *parameters(100), factor=4, eps=0.5)
    y = layer_norm(x, *parameters(100))
    x[4, 7] = float("nan")
    assert torch.equal(layer_norm(x, *parameters(100)).isnan().any(1), torch.arange(5) == 4)
    assert y.isfinite().all()


def test_a_large_mean_does_not_cancel():
    """The mean is off by its rounding, 2^-12 deviations; sum x^2 - N mean^2 would be lost."""
    x = 4096 + torch.randn(3, 100, device=DEVICE)
    check(x, *parameters(100), factor=100)


def test_inputs_with_holes():
    base = torch.randn(6, 5, 24, device=DEVICE)
    for x in (base.transpose(0, 2), base[:, ::2, 1:20], base[:, :, ::3], base[:1].expand(3, 5, 24)):
        check(x, *parameters(x.size(-1)))
    wide = torch.randn(24, 2, device=DEVICE)
    check(base, wide[:, 0], wide[:, 1])
    grad = torch.randn(24, 5, 6, device=DEVICE).transpose(0, 2)
    inputs = (base, base.flip(0), *parameters(24))
    for grads in ((grad, base), (base, grad)):
        _, found = gradients(residual_layer_norm, *inputs, grad=grads)
        _, expected = gradients(residual_layer_norm_ref, *inputs, grad=grads)
        for result, reference in zip(found, expected, strict=True):
            assert_close(result, reference, factor=2)


def test_no_rows():
    x, (weight, bias) = torch.randn(0, 5, device=DEVICE), parameters(5)
    y, (dx, dw, db) = gradients(layer_norm, x, weight, bias, grad=torch.empty(0, 5, device=DEVICE))
    assert y.shape == dx.shape == (0, 5)
    assert not dw.any()
    assert not db.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_branch_beside_a_wide_residual(dtype):
    """As under autocast: y and the branch in 16 bits, the sum in float32; so the gradients."""
    x, residual = torch.randn(3, 40, device=DEVICE).to(dtype), torch.randn(3, 40, device=DEVICE)
    inputs = (x, residual, *parameters(40))
    grads = (torch.randn(3, 40, device=DEVICE).to(dtype), torch.randn(3, 40, device=DEVICE))
    (y, total), found = gradients(
        lambda *t: residual_layer_norm(*t, dtype=dtype), *inputs, grad=grads
    )
    assert (y.dtype, total.dtype) == (dtype, torch.float32)
    assert [g.dtype for g in found] == [t.dtype for t in inputs]
    doubles = [t.double() for t in inputs]
    (y_ref, total_ref), expected = gradients(
        residual_layer_norm_ref, *doubles, grad=tuple(g.double() for g in grads)
    )
    assert_close(y, y_ref)
    assert_close(total, total_ref)
    for result, reference in zip(found, expected, strict=True):
        assert_close(result, reference)
    # the gradients of the two terms are one, rounded
    assert_close(found[0], found[1])
    alone, (dx, *_) = gradients(
        lambda *t: layer_norm(*t, dtype=dtype), residual, *parameters(40), grad=grads[0]
    )
    assert (alone.dtype, dx.dtype) == (dtype, torch.float32)


# torch 2.15's own check reads the .grad of what it computed
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_library():
    x, (weight, bias) = torch.randn(3, 5, device=DEVICE, requires_grad=True), parameters(5)
    weight.requires_grad_()
    bias.requires_grad_()
    statistics = torch.randn(2, 3, device=DEVICE)
    operators = torch.ops.nanogpt2
    for residual in (None, torch.randn(3, 5, device=DEVICE, requires_grad=True)):
        opcheck(operators.layer_norm_fwd.default, (x, residual, weight, bias, 1e-5, None))
        other = None if residual is None else residual.detach()
        inputs = (x.detach(), other, x.detach(), weight.detach(), *statistics, None)
        opcheck(operators.layer_norm_bwd.default, inputs)
    compiled = torch.compile(residual_layer_norm, backend="aot_eager", fullgraph=True)
    grads = (torch.randn(3, 5, device=DEVICE), torch.randn(3, 5, device=DEVICE))
    inputs = (x, x.flip(0), weight, bias)
    results, found = gradients(compiled, *inputs, grad=grads)
    results_ref, expected = gradients(residual_layer_norm_ref, *inputs, grad=grads)
    for result, reference in zip((*results, *found), (*results_ref, *expected), strict=True):
        assert_close(result, reference, factor=2)


def test_wrong_use():
    x, (weight, bias) = torch.randn(3, 5, device=DEVICE), parameters(5)
    for name, inputs in {
        "x must be float32, float16 or bfloat16, not": (x.double(), weight, bias),
        "bias must be float32, float16 or bfloat16, not": (x, weight, bias.long()),
        r"weight must be \(5,\) torch.float32, not \(6,\)": (x, torch.randn(6), bias),
        r"bias must be \(5,\) torch.float32, not \(5,\) torch.float16": (x, weight, bias.half()),
        f"N from 1 to {MAX_COLUMNS}": (torch.empty(1, MAX_COLUMNS + 1), weight, bias),
    }.items():
        with pytest.raises(ValueError, match=name):
            layer_norm(*(t.to(DEVICE) for t in inputs))
    with pytest.raises(ValueError, match=r"dtype must be .* not torch.float64"):
        layer_norm(x, weight, bias, dtype=torch.float64)
    for residual in (x[:2], x.half()):
        with pytest.raises(ValueError, match=r"residual must be \(3, 5\) torch.float32"):
            residual_layer_norm(x, residual, weight, bias)


def test_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("nanogpt2.kernels.layer_norm.INTERPRETED", False)
    with pytest.raises(ValueError, match="x must be on a CUDA device, that of x, not on cpu"):
        layer_norm(torch.randn(3, 5), torch.randn(5), torch.randn(5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [760, 768, 1024, 1280, 1600])
def test_natively(dtype, N):
    check(torch.randn(5000, N, device=DEVICE).to(dtype), *parameters(N), factor=2)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    x, (weight, bias) = torch.randn(64, 768, device=DEVICE), parameters(768)
    layer_norm(x, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer_norm(x, weight, bias)
    x.copy_(torch.randn(x.shape, device=DEVICE))
    graph.replay()
    assert torch.equal(y, layer_norm(x, weight, bias))
