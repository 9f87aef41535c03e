"""The cross-entropy kernels against the formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from kernel_reference import DEVICE, assert_close, gradients
from torch.library import opcheck

from nanogpt2 import ops
from nanogpt2.kernels import cross_entropy as room
from nanogpt2.kernels.cross_entropy import (
    DTYPES,
    cross_entropy,
    cross_entropy_ref,
    linear_cross_entropy,
)

pytestmark = pytest.mark.usefixtures("poisoned")
INF = float("inf")


def targets_for(M, V, ignored=0):
    targets = torch.randint(V, (M,), device=DEVICE)
    targets[:ignored] = -100
    return targets


def check(logits, targets, factor=1, **options):
    """Loss and gradient, for a loss that is scaled; the logits stay as they are."""
    kept = logits.clone()
    grad = torch.tensor(3.0, device=DEVICE)
    loss, (dz,) = gradients(lambda z: cross_entropy(z, targets, **options), logits, grad=grad)
    loss_ref, (dz_ref,) = gradients(
        lambda z: cross_entropy_ref(z, targets, **options), logits.double(), grad=grad.double()
    )
    assert torch.equal(logits, kept)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert dz.dtype == logits.dtype
    assert_close(loss, loss_ref, factor=factor)
    assert_close(dz, dz_ref, factor=factor)


def check_linear(x, weight, targets, factor=1, **options):
    grad = torch.tensor(3.0, device=DEVICE)
    loss, found = gradients(
        lambda x, w: linear_cross_entropy(x, w, targets, **options), x, weight, grad=grad
    )
    loss_ref, expected = gradients(
        lambda x, w: cross_entropy_ref(x @ w.t(), targets, **options),
        x.double(),
        weight.double(),
        grad=grad.double(),
    )
    assert loss.dtype == torch.float32
    assert_close(loss, loss_ref, x.dtype, factor)
    for result, reference in zip(found, expected, strict=True):
        assert result.dtype == x.dtype
        assert_close(result, reference, factor=factor)


@pytest.fixture
def small_chunks(monkeypatch):
    """Two rows of up to 64 columns at a time."""
    monkeypatch.setattr(room, "CHUNK_ELEMENTS", 128)


@pytest.mark.parametrize("V", [2, 37, 64, 760, 1000, 8193, 50257])
def test_vocabularies(V):
    check(3 * torch.randn(3, V, device=DEVICE), targets_for(3, V), factor=2)


def test_one_token():
    """Its probability is 1: the true loss and gradient are 0."""
    z, targets = torch.randn(3, 1, device=DEVICE), targets_for(3, 1)
    loss, (dz,) = gradients(lambda z: cross_entropy(z, targets), z)
    assert abs(loss.item()) < 1e-6
    assert dz.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [130, 9000])
def test_dtypes(dtype, V):
    check((3 * torch.randn(5, V, device=DEVICE)).to(dtype), targets_for(5, V, 2))


@pytest.mark.parametrize("ignored", [1, 4])
def test_ignored_rows(ignored):
    """They do not count, whatever they hold, and their gradient is 0."""
    targets = targets_for(5, 37, ignored)
    check(torch.randn(5, 37, device=DEVICE), targets)
    z = torch.randn(5, 37, device=DEVICE)
    z[0] = float("nan")
    loss, (dz,) = gradients(lambda z: cross_entropy(z, targets), z)
    assert loss.isfinite()
    assert not dz[:ignored].any()
    assert dz[ignored:].all()
    check(torch.randn(5, 37, device=DEVICE), targets.where(targets >= 0, 7), ignore_index=7)


def test_nothing_counts():
    z = torch.randn(3, 5, device=DEVICE)
    assert cross_entropy(z, targets_for(3, 5, 3)).isnan()
    assert cross_entropy(z[:0], targets_for(0, 5)).isnan()
    assert linear_cross_entropy(z, z, targets_for(3, 3, 3)).isnan()
    assert linear_cross_entropy(z[:0], z, targets_for(0, 3)).isnan()


@pytest.mark.parametrize("target", [5, 6, -1, -99, 10**12])
def test_a_target_that_is_no_token(target):
    """NaN, and nothing is read outside the row; padding is no token either."""
    targets = torch.tensor([1, target, 2], device=DEVICE)
    assert cross_entropy(torch.randn(3, 6, device=DEVICE), targets, vocab_size=5).isnan()


@pytest.mark.parametrize("padded", [64, 8300])
def test_padded_columns(padded):
    """They may hold anything, are left as they are, and get the gradient 0."""
    V = padded - 13
    z = torch.randn(3, padded, device=DEVICE)
    z[:, V] = INF
    z[:, V + 1] = float("nan")
    targets = targets_for(3, V)
    loss, (dz,) = gradients(lambda z: cross_entropy(z, targets, vocab_size=V), z)
    loss_ref, (dz_ref,) = gradients(lambda z: cross_entropy_ref(z, targets), z[:, :V].double())
    assert_close(loss, loss_ref)
    assert_close(dz[:, :V], dz_ref, factor=2)
    assert not dz[:, V:].any()


def test_extreme_values():
    """Large logits, banned tokens and whole blocks of -inf."""
    V = 8200
    z = torch.randn(4, V, device=DEVICE)
    z[0] *= 1e4
    z[1, : V - 3] = -INF
    z[2, 3:] = -INF
    z[3] = -3e38
    targets = torch.tensor([z[0].argmax(), V - 2, 1, 5], device=DEVICE)
    loss, (dz,) = gradients(lambda z: cross_entropy(z, targets), z)
    loss_ref, (dz_ref,) = gradients(lambda z: F.cross_entropy(z, targets), z.double())
    assert_close(loss, loss_ref)
    assert_close(dz, dz_ref, factor=4)
    # a target that is banned costs infinitely much; a row of nothing else is no distribution
    assert cross_entropy(z[1:2], targets_for(1, 1)) == INF
    assert cross_entropy(torch.full((1, 5), -INF, device=DEVICE), targets_for(1, 5)).isnan()


def test_logits_with_holes():
    base = torch.randn(6, 24, device=DEVICE)
    for z in (base.t(), base[::2, 1:20], base[:, ::3], base[:1].expand(6, 24)):
        targets = torch.stack([targets_for(len(z), z.size(1))] * 2, dim=1)[:, 0]
        check(z, targets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ignored", [0, 3])
def test_linear(small_chunks, dtype, ignored):
    """Five chunks, the last of one row."""
    x, weight = torch.randn(9, 5, device=DEVICE), torch.randn(37, 5, device=DEVICE)
    # three products of rounded factors
    check_linear(x.to(dtype), weight.to(dtype), targets_for(9, 37, ignored), factor=3)


def test_linear_in_one_chunk():
    x, weight = torch.randn(3, 5, device=DEVICE), torch.randn(1000, 5, device=DEVICE)
    check_linear(x, weight, targets_for(3, 1000))


def test_linear_with_padded_rows_of_the_weight(small_chunks):
    x, weight = torch.randn(5, 7, device=DEVICE), torch.randn(64, 7, device=DEVICE)
    check_linear(x, weight, targets_for(5, 50), vocab_size=50)
    _, (_, dw) = gradients(
        lambda x, w: linear_cross_entropy(x, w, targets_for(5, 50), vocab_size=50), x, weight
    )
    assert not dw[50:].any()


def test_linear_with_holes(small_chunks):
    x, weight = torch.randn(7, 9, device=DEVICE).t(), torch.randn(37, 14, device=DEVICE)[:, ::2]
    check_linear(x, weight, targets_for(9, 37), factor=2)


def test_linear_holds_a_loss_scale_in_float16(small_chunks):
    """The scale over the count is above what float16 holds, and the gradients are not."""
    x = torch.randn(9, 5, device=DEVICE).half().requires_grad_()
    weight = (torch.randn(37, 5, device=DEVICE) / 64).half()
    targets = targets_for(9, 37)
    (linear_cross_entropy(x, weight, targets) * 2**20).backward()
    doubles = x.detach().double().requires_grad_()
    (cross_entropy_ref(doubles @ weight.double().t(), targets) * 2**20).backward()
    assert x.grad.isfinite().all()
    assert_close(x.grad, doubles.grad, factor=3)


def test_linear_makes_only_the_gradients_asked_for(monkeypatch):
    x, weight = torch.randn(4, 5, device=DEVICE), torch.randn(37, 5, device=DEVICE)
    targets = targets_for(4, 37)
    logits, buffers = x @ weight.t(), []

    def new_empty(*args, original=torch.Tensor.new_empty, **options):
        made = original(*args, **options)
        if made.dim() == 2 and made.size(1) >= 37:
            buffers.append(made)
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    leaf = weight.clone().requires_grad_()
    with torch.no_grad():
        assert not linear_cross_entropy(x, leaf, targets).requires_grad
    expected = gradients(lambda x, w: linear_cross_entropy(x, w, targets), x, weight)[1]
    for i, inputs in enumerate([(x.clone().requires_grad_(), weight), (x, leaf)]):
        loss = linear_cross_entropy(*inputs, targets)
        for _ in range(2):
            # a second backward finds the first one's gradients as they were
            (found,) = torch.autograd.grad(loss, inputs[i], retain_graph=True)
            assert torch.equal(found, expected[i])
    # the logits' buffer still holds them where no gradient took their place
    kept = [torch.allclose(buffer[:, :37], logits) for buffer in buffers]
    assert kept == [True, False, False, False]


def test_linear_equals_the_pytorch_version(small_chunks):
    x, weight = torch.randn(9, 5, device=DEVICE), torch.randn(37, 5, device=DEVICE)
    targets = targets_for(9, 37, 2)
    loss, found = gradients(lambda x, w: linear_cross_entropy(x, w, targets), x, weight)
    loss_ref, expected = gradients(lambda x, w: ops.linear_cross_entropy(x, w, targets), x, weight)
    for result, reference in zip((loss, *found), (loss_ref, *expected), strict=True):
        assert_close(result, reference)


# torch 2.15's own check reads the .grad of what it computed
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_library():
    z, targets = torch.randn(3, 7, device=DEVICE, requires_grad=True), targets_for(3, 7, 1)
    x, weight = (torch.randn(n, 5, device=DEVICE, requires_grad=True) for n in (3, 7))
    operators = torch.ops.nanogpt2
    opcheck(operators.cross_entropy_fwd.default, (z, targets, -100, 6))
    stats = torch.randn(3, 2, device=DEVICE)
    inputs = (torch.tensor(0.5, device=DEVICE), z.detach(), targets, stats, -100, 6)
    opcheck(operators.cross_entropy_bwd.default, inputs)
    opcheck(operators.linear_cross_entropy.default, (x, weight, targets, -100, 6, True, True))

    def doubled(x, w):
        return linear_cross_entropy(2 * x, w, targets)

    compiled = torch.compile(doubled, backend="aot_eager", fullgraph=True)
    loss, found = gradients(compiled, x, weight)
    loss_ref, expected = gradients(
        lambda x, w: cross_entropy_ref(2 * x @ w.t(), targets), x, weight
    )
    for result, reference in zip((loss, *found), (loss_ref, *expected), strict=True):
        assert_close(result, reference, factor=2)


def test_wrong_use():
    z, targets = torch.randn(3, 5, device=DEVICE), targets_for(3, 5)
    with pytest.raises(ValueError, match="logits must be float32, float16 or bfloat16, not"):
        cross_entropy(z.double(), targets)
    with pytest.raises(ValueError, match=r"logits must have two axes, .* not \(1, 3, 5\)"):
        cross_entropy(z[None], targets)
    for wrong in (targets[:2], targets.int(), targets[None]):
        with pytest.raises(ValueError, match=r"targets must be \(3,\) int64, not"):
            cross_entropy(z, wrong)
    for size in (0, 6):
        with pytest.raises(ValueError, match=f"vocab_size must be from 1 to 5, not {size}"):
            cross_entropy(z, targets, vocab_size=size)
    with pytest.raises(ValueError, match=r"weight must be \(N, 5\), not \(5, 3\)"):
        linear_cross_entropy(z, z.t(), targets)
    with pytest.raises(ValueError, match=r"weight must be torch.float32 on .*, not torch.float16"):
        linear_cross_entropy(z, z.half(), targets)
    with pytest.raises(ValueError, match="x must be float32, float16 or bfloat16, not"):
        linear_cross_entropy(z.double(), z.double(), targets)


def test_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(room, "INTERPRETED", False)
    with pytest.raises(ValueError, match="logits must be on a CUDA device, not on cpu"):
        cross_entropy(torch.randn(3, 5), torch.zeros(3, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [50257, 50304])
def test_natively(dtype, V):
    targets = targets_for(300, 50257, 7)
    check(torch.randn(300, V, device=DEVICE).to(dtype), targets, factor=2, vocab_size=50257)
    x, weight = torch.randn(300, 768, device=DEVICE), torch.randn(V, 768, device=DEVICE) / 28
    check_linear(x.to(dtype), weight.to(dtype), targets, factor=3, vocab_size=50257)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    z, targets = torch.randn(64, 50304, device=DEVICE), targets_for(64, 50257)
    cross_entropy(z, targets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = cross_entropy(z, targets)
    z.copy_(torch.randn(z.shape, device=DEVICE))
    graph.replay()
    assert torch.equal(loss, cross_entropy(z, targets))
