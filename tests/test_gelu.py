"""The GELU kernels against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F
from kernel_reference import DEVICE, assert_close, gradients, rms_ratio
from torch.library import opcheck

from nanogpt2.kernels.gelu import DTYPES, ROWS, bias_gelu, gelu, gelu_ref

pytestmark = pytest.mark.usefixtures("poisoned")


def check(x, bias=None, factor=1):
    """y, dx and, where there is a bias, db."""
    grad = torch.randn(x.shape, device=DEVICE).to(x.dtype)
    inputs = (x,) if bias is None else (x, bias)
    y, found = gradients(gelu if bias is None else bias_gelu, *inputs, grad=grad)
    doubles = [t.double() for t in inputs]
    y_ref, expected = gradients(gelu_ref, *doubles, grad=grad.double())
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert_close(y, y_ref, x.dtype, factor)
    for result, reference, source in zip(found, expected, inputs, strict=True):
        assert result.dtype == source.dtype
        assert_close(result, reference, source.dtype, factor)


@pytest.mark.parametrize("N", [1, 37, 64, 760, 1000, 1025, 3072])
def test_columns(N):
    x, bias = 2 * torch.randn(3, 2, N, device=DEVICE), torch.randn(N, device=DEVICE)
    check(x)
    # the gradient of a single bias is one sum, whose terms cancel
    check(x, bias, factor=10 if N == 1 else 1)


@pytest.mark.parametrize("M", [1, ROWS - 1, ROWS, 2 * ROWS + 5])
def test_each_row_counts_once_in_the_gradient_of_the_bias(M):
    check(torch.randn(M, 1030, device=DEVICE), torch.randn(1030, device=DEVICE))


def test_rows_past_the_last_are_not_read():
    x, grad = torch.full((2, 2 * ROWS, 1024), float("nan"), device=DEVICE)
    x[:5], grad[:5] = torch.randn(2, 5, 1024, device=DEVICE)
    inputs = (x[:5], torch.randn(1024, device=DEVICE))
    _, found = gradients(bias_gelu, *inputs, grad=grad[:5])
    assert all(gradient.isfinite().all() for gradient in found)


def test_a_narrow_bias_of_many_rows():
    """One tile is taller than ROWS."""
    check(torch.randn(5000, 3, device=DEVICE), torch.randn(3, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_dtypes(dtype, bias_dtype):
    x, bias = 2 * torch.randn(7, 130, device=DEVICE), torch.randn(130, device=DEVICE)
    check(x.to(dtype), bias.to(bias_dtype))
    check(x.to(dtype))


def test_the_tanh_form():
    x = torch.linspace(-6, 6, 101, device=DEVICE)
    assert_close(gelu(x), F.gelu(x.double(), approximate="tanh"))
    assert rms_ratio(gelu(x), F.gelu(x.double())) > 1e-5


def test_far_from_zero():
    """Far below 0 each value keeps its relative accuracy: 1 + tanh u would have cancelled."""
    x = torch.linspace(-9, -5, 41, device=DEVICE)
    d = x.double()
    ref = d * (2 * (2 / torch.pi) ** 0.5 * (d + 0.044715 * d**3)).sigmoid()
    # an exponent of 2 u = -66 carries its own roundings, of 66 * 2^-24 each
    assert ((gelu(x).double() - ref) / ref).abs().max() < 2e-5
    x = torch.tensor([-1e15, -3e4, -100.0, 0.0, 100.0, 3e4, 1e15], device=DEVICE)
    y, (dx,) = gradients(gelu, x, grad=torch.ones_like(x))
    assert torch.equal(y, x.clamp(min=0))
    assert dx.tolist() == [0, 0, 0, 0.5, 1, 1, 1]


def test_same_bits_every_time():
    inputs = (torch.randn(150, 40, device=DEVICE), torch.randn(40, device=DEVICE))
    grad = torch.randn(150, 40, device=DEVICE)
    runs = [gradients(bias_gelu, *inputs, grad=grad)[1] for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_inputs_with_holes():
    base = torch.randn(6, 5, 24, device=DEVICE)
    for x in (base.transpose(0, 2), base[:, ::2, 1:20], base[:, :, ::3], base[:1].expand(3, 5, 24)):
        check(x, torch.randn(x.size(-1), 2, device=DEVICE)[:, 0])
    grad = torch.randn(24, 5, 6, device=DEVICE).transpose(0, 2)
    _, (dx,) = gradients(gelu, base, grad=grad)
    _, (dx_ref,) = gradients(gelu_ref, base, grad=grad)
    assert_close(dx, dx_ref)


def test_empty_and_no_axis():
    x, bias = torch.randn(0, 5, device=DEVICE), torch.randn(5, device=DEVICE)
    y, (dx, db) = gradients(bias_gelu, x, bias, grad=torch.empty(0, 5, device=DEVICE))
    assert y.shape == dx.shape == (0, 5)
    assert not db.any()
    x = torch.tensor(0.5, device=DEVICE)
    assert_close(gelu(x), gelu_ref(x.double()))


# torch 2.15's own check reads the .grad of what it computed
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_library():
    x = torch.randn(3, 5, device=DEVICE, requires_grad=True)
    for bias in (None, torch.randn(5, device=DEVICE, requires_grad=True)):
        opcheck(torch.ops.nanogpt2.gelu_fwd.default, (x, bias))
        inputs = (x.detach(), x.detach(), None if bias is None else bias.detach())
        opcheck(torch.ops.nanogpt2.gelu_bwd.default, inputs)
    compiled = torch.compile(bias_gelu, backend="aot_eager", fullgraph=True)
    grad = torch.randn(3, 5, device=DEVICE)
    y, found = gradients(compiled, x, bias, grad=grad)
    y_ref, expected = gradients(gelu_ref, x, bias, grad=grad)
    assert_close(y, y_ref)
    for result, reference in zip(found, expected, strict=True):
        assert_close(result, reference)


def test_wrong_use():
    x, bias = torch.randn(3, 5, device=DEVICE), torch.randn(5, device=DEVICE)
    with pytest.raises(ValueError, match=r"x must be float32, float16 or bfloat16, not .*float64"):
        gelu(x.double())
    with pytest.raises(ValueError, match="bias must be float32, float16 or bfloat16, not"):
        bias_gelu(x, bias.long())
    with pytest.raises(ValueError, match=r"bias must be \(5,\) as x ends, not \(4,\)"):
        bias_gelu(x, bias[:4])


def test_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("nanogpt2.kernels.gelu.INTERPRETED", False)
    with pytest.raises(ValueError, match="x must be on a CUDA device, not on cpu"):
        gelu(torch.randn(3, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [760, 3072, 6400])
def test_natively(dtype, N):
    x, bias = torch.randn(5000, N, device=DEVICE), torch.randn(N, device=DEVICE)
    check(x.to(dtype), bias.to(dtype), factor=2)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    x = torch.randn(64, 3072, device=DEVICE)
    gelu(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gelu(x)
    x.copy_(torch.randn(x.shape, device=DEVICE))
    graph.replay()
    assert_close(y, gelu_ref(x.double()), torch.float32)
