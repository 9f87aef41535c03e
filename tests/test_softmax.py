"""The softmax kernels against the formula in float64."""

import pytest
import torch
from kernel_reference import DEVICE, assert_close, gradients
from torch.library import opcheck

from nanogpt2.kernels.softmax import DTYPES, MAX_COLUMNS, log_softmax, softmax, softmax_ref

pytestmark = pytest.mark.usefixtures("poisoned")
INF = float("inf")


def log_softmax_ref(x):
    return x.log_softmax(-1)


def check(function, reference, x, factor=1):
    """Values and gradients, for one gradient that arrives."""
    grad = torch.randn(x.shape, device=DEVICE).to(x.dtype)
    y, (dx,) = gradients(function, x, grad=grad)
    y_ref, (dx_ref,) = gradients(reference, x.double(), grad=grad.double())
    assert y.dtype == dx.dtype == x.dtype
    assert y.shape == dx.shape == x.shape
    assert_close(y, y_ref, x.dtype, factor)
    # y is saved rounded, and dx is a difference
    assert_close(dx, dx_ref, x.dtype, 2 * factor)


@pytest.mark.parametrize("N", [1, 64, 760, 1000, 16385, 50257])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_rows(name, N):
    function, reference = {
        "softmax": (softmax, softmax_ref),
        "log_softmax": (log_softmax, log_softmax_ref),
    }[name]
    check(function, reference, 3 * torch.randn(3, N, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [37, 20000])
def test_dtypes(dtype, N):
    x = (3 * torch.randn(2, N, device=DEVICE)).to(dtype)
    check(softmax, softmax_ref, x)
    check(log_softmax, log_softmax_ref, x)


@pytest.mark.parametrize("T", [1, 37, 63, 128])
def test_causal_and_scaled(T):
    x = torch.randn(1 if T > 50 else 2, T, T, device=DEVICE)
    check(lambda x: softmax(x, True, 0.3), lambda x: softmax_ref(x, True, 0.3), x)
    x = x[:, -37:, -37:]
    y, (dx,) = gradients(lambda x: softmax(x, True), x, grad=torch.ones_like(x))
    assert not y.triu(1).any()
    assert not dx.triu(1).any()


def test_causal_with_fewer_rows_than_columns():
    """Row t of T sees the columns up to t + N - T; two sweeps too."""
    for shape in ((2, 3, 11), (1, 2, 17000)):
        x = torch.randn(shape, device=DEVICE)
        check(lambda x: softmax(x, True, 0.3), lambda x: softmax_ref(x, True, 0.3), x)


def test_what_is_not_seen_is_not_read():
    """NaN and infinities above the diagonal, in the input and in the gradient, change nothing."""
    x, grad = torch.randn(2, 2, 13, 13, device=DEVICE)
    unseen = torch.ones(13, 13, dtype=torch.bool, device=DEVICE).triu(1)
    expected = gradients(lambda x: softmax(x, True), x, grad=grad)
    x, grad = x.masked_fill(unseen, float("nan")), grad.masked_fill(unseen, INF)
    found = gradients(lambda x: softmax(x, True), x, grad=grad)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1][0], expected[1][0])


@pytest.mark.parametrize("N", [40, 17000])
def test_extreme_values(N):
    x = torch.randn(5, N, device=DEVICE)
    x[0] *= 1e4
    # whole blocks of -inf before the first number
    x[1, : N - 3] = -INF
    x[2, 3:] = -INF
    x[3] = -3e38
    x[4, ::2] = -INF
    check(softmax, softmax_ref, x, factor=4)
    y = softmax(x)
    assert_close(y.sum(-1), torch.ones(5), torch.float32)
    assert not y[1, : N - 3].any()
    assert torch.equal(log_softmax(x)[1].isneginf(), x[1].isneginf())


@pytest.mark.parametrize("N", [40, 17000])
def test_no_number_in_a_row(N):
    """As PyTorch: nothing but -inf, an inf or a NaN makes its own row NaN and no other."""
    x = torch.randn(4, N, device=DEVICE)
    x[0], x[1, 5], x[2, N - 1] = -INF, INF, float("nan")
    for function in (softmax, log_softmax):
        bad = function(x).isnan().any(-1)
        assert bad.tolist() == [True, True, True, False]


def test_inputs_with_holes():
    """Transposed, sliced and expanded: copied or read by stride, never misread."""
    base = torch.randn(6, 5, 24, device=DEVICE)
    for x in (base.transpose(0, 2), base[:, ::2, 1:20], base[:, :, ::3], base[:1].expand(3, 5, 24)):
        check(softmax, softmax_ref, x)
    grad = torch.randn(24, 5, 6, device=DEVICE).transpose(0, 2)
    _, (dx,) = gradients(softmax, base, grad=grad)
    _, (dx_ref,) = gradients(softmax_ref, base, grad=grad)
    assert_close(dx, dx_ref, factor=2)


def test_empty_and_one_axis():
    assert softmax(torch.randn(0, 5, device=DEVICE)).shape == (0, 5)
    assert softmax(torch.randn(3, 0, device=DEVICE)).shape == (3, 0)
    _, (dx,) = gradients(
        softmax, torch.randn(0, 5, device=DEVICE), grad=torch.empty(0, 5, device=DEVICE)
    )
    assert dx.shape == (0, 5)
    x = torch.randn(7, device=DEVICE)
    assert_close(softmax(x), x.double().softmax(-1))


# torch 2.15's own check reads the .grad of what it computed
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_library():
    """Fake and autograd registrations hold, and torch.compile keeps one graph."""
    x = torch.randn(2, 5, 7, device=DEVICE, requires_grad=True)
    opcheck(torch.ops.nanogpt2.softmax_fwd.default, (x, True, False, 0.5))
    opcheck(torch.ops.nanogpt2.softmax_bwd.default, (x.detach(), x.detach(), True, False, 0.5))
    compiled = torch.compile(lambda x: softmax(2 * x, True), backend="aot_eager", fullgraph=True)
    grad = torch.randn(x.shape, device=DEVICE)
    expected = gradients(lambda x: softmax_ref(2 * x, True), x, grad=grad)
    found = gradients(compiled, x, grad=grad)
    assert_close(found[0], expected[0])
    assert_close(found[1][0], expected[1][0], factor=2)


def test_wrong_use():
    x = torch.randn(3, 5, device=DEVICE)
    with pytest.raises(ValueError, match=r"x must be float32, float16 or bfloat16, not .*int64"):
        softmax(x.long())
    with pytest.raises(ValueError, match=f"N up to {MAX_COLUMNS}"):
        softmax(torch.empty(1, MAX_COLUMNS + 1, device=DEVICE))
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., N\)"):
        log_softmax(torch.tensor(1.0, device=DEVICE))
    with pytest.raises(ValueError, match="T <= N"):
        softmax(x.t(), causal=True)
    for scale in (0, -1.0, INF, float("nan")):
        with pytest.raises(ValueError, match="scale must be finite"):
            softmax(x, scale=scale)


def test_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("nanogpt2.kernels.softmax.INTERPRETED", False)
    with pytest.raises(ValueError, match="x must be on a CUDA device, not on cpu"):
        softmax(torch.randn(3, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(12, 200, 200), (1, 1024, 1024)])
def test_natively(dtype, shape):
    x = torch.randn(shape, device=DEVICE).to(dtype)
    check(lambda x: softmax(x, True, 0.125), lambda x: softmax_ref(x, True, 0.125), x)
    check(softmax, softmax_ref, x)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    x = torch.randn(64, 50257, device=DEVICE, dtype=torch.bfloat16)
    softmax(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = softmax(x)
    x.copy_(torch.randn(x.shape, device=DEVICE))
    graph.replay()
    assert torch.equal(y, softmax(x))
