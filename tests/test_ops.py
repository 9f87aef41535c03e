"""The seam: each operation against its formula in float64."""

import pytest
import torch
import torch.nn.functional as F

from nanogpt2 import ops


def error(result, reference):
    """RMS of the difference over RMS of the reference."""
    difference = result.double() - reference
    return (difference.pow(2).mean().sqrt() / reference.pow(2).mean().sqrt()).item()


@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 7), (1, 7)])
def test_linear(shape):
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 11)
    weight, bias = torch.randn(11, 7, requires_grad=True), torch.randn(11, requires_grad=True)
    y = ops.linear(x, weight, bias)
    y.backward(dy)
    xd, wd, bd = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    expected = xd @ wd.t() + bd
    expected.backward(dy.double())
    assert error(y, expected.detach()) < 1e-6
    for ours, theirs in ((x, xd), (weight, wd), (bias, bd)):
        assert error(ours.grad, theirs.grad) < 1e-6 and ours.grad.stride() == ours.stride()
    with torch.no_grad():
        # what is generated equals transformers' to the last bit
        assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))
        assert torch.equal(ops.linear(x, weight), F.linear(x, weight))


def test_linear_leaves_what_is_frozen_alone():
    x, weight, bias = torch.randn(3, 7, requires_grad=True), torch.randn(11, 7), torch.randn(11)
    ops.linear(x, weight, bias).sum().backward()
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
        made = ops.layer_norm(x, gain, shift, 1e-5)
        made = made.clone() if plain else made
        made = ops.gelu(made) if cheap == "gelu" else made
        # a copy knows nothing of how it was made
        made = made.clone() if plain else made
        y = []
        assert (made.data_ptr() in kept(lambda: y.append(ops.linear(made, weight)))) == plain
        return torch.autograd.grad(y, leaves, dy)

    for cheap in ("layer_norm", "gelu"):
        for ours, plain in zip(gradients(cheap, False), gradients(cheap, True), strict=True):
            assert torch.equal(ours, plain)


def test_of_what_is_frozen_nothing_is_kept():
    x, weight = torch.randn(3, 7, requires_grad=True), torch.randn(11, 7)
    assert kept(lambda: ops.linear(x, weight)) == [weight.data_ptr()]


def test_linear_in_bfloat16_is_autocasts():
    x, weight, bias = torch.randn(2, 5, 7), torch.randn(11, 7, requires_grad=True), torch.randn(11)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(x, weight, bias)
        assert torch.equal(y, F.linear(x, weight, bias))
    assert y.dtype == torch.bfloat16


def test_layer_norm():
    x, weight, bias = torch.randn(2, 5, 7), torch.randn(7), torch.randn(7)
    d = x.double()
    norm = (d - d.mean(-1, keepdim=True)) / (d.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert error(ops.layer_norm(x, weight, bias, 1e-5), norm * weight + bias) < 1e-6


def test_gelu_is_the_tanh_form():
    x = torch.linspace(-6, 6, 101)
    d = x.double()
    inner = (2 / torch.pi) ** 0.5 * (d + 0.044715 * d**3)
    assert error(ops.gelu(x), 0.5 * d * (1 + inner.tanh())) < 1e-6
    assert error(ops.gelu(x), F.gelu(d)) > 1e-5


def test_attention():
    B, H, T, D = 2, 3, 5, 8
    q, k, v = torch.randn(3, B, H, T, D)
    scores = q.double() @ k.double().transpose(2, 3) / D**0.5
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    expected = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v.double()
    assert error(ops.attention(q, k, v, causal=True), expected) < 1e-6
    assert error(ops.attention(q, k, v, causal=False, mask=causal), expected) < 1e-6
    assert error(ops.attention(q, k, v, causal=False), scores.softmax(-1) @ v.double()) < 1e-6


def test_softmax():
    x = torch.randn(3, 11) * 50
    d = (x.double() - x.double().amax(-1, keepdim=True)).exp()
    assert error(ops.softmax(x), d / d.sum(-1, keepdim=True)) < 1e-6


@pytest.fixture
def small_chunks(monkeypatch):
    """Two rows and three tokens at a time, so that many chunks add up."""
    monkeypatch.setitem(ops.CHUNK_ELEMENTS, "cpu", 2 * 13)
    monkeypatch.setattr(ops, "TOKENS", 3)


@pytest.mark.parametrize("ignored", [0, 3])
def test_linear_cross_entropy(small_chunks, ignored):
    M, C, V = 9, 5, 13
    x = torch.randn(M, C, requires_grad=True)
    weight = torch.randn(V, C, requires_grad=True)
    targets = torch.randint(V, (M,))
    targets[:ignored] = -100
    loss = ops.linear_cross_entropy(x, weight, targets)
    # a loss that is scaled, as gradient accumulation does
    (loss * 3).backward()
    xd, wd = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = F.cross_entropy(xd @ wd.t(), targets)
    (expected * 3).backward()
    assert loss.dtype == torch.float32
    assert error(loss, expected.detach()) < 1e-6
    assert error(x.grad, xd.grad) < 1e-6
    assert error(weight.grad, wd.grad) < 1e-6
    assert not x.grad[:ignored].any()


def test_the_loss_may_go_backward_again(small_chunks):
    """Its gradient, handed on as it is where the loss's own is 1, is written over by nobody."""
    x, weight = torch.randn(9, 5), torch.randn(13, 5, requires_grad=True)
    loss = ops.linear_cross_entropy(x, weight, torch.randint(13, (9,)))
    for times in (1, 2, 3, 4):
        loss.backward(retain_graph=True)
        if times == 1:
            first = weight.grad.clone()
        torch.testing.assert_close(weight.grad, times * first)


def test_linear_cross_entropy_in_bfloat16(small_chunks):
    x, weight = torch.randn(9, 5, requires_grad=True), torch.randn(13, 5, requires_grad=True)
    targets = torch.randint(13, (9,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(x, weight, targets)
    loss.backward()
    xd, wd = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = F.cross_entropy(xd @ wd.t(), targets)
    expected.backward()
    # 8 bits of mantissa: 2^-8 for each factor
    assert loss.dtype == x.grad.dtype == weight.grad.dtype == torch.float32
    assert error(loss, expected.detach()) < 1e-2
    assert error(x.grad, xd.grad) < 2e-2
    assert error(weight.grad, wd.grad) < 2e-2


def test_linear_cross_entropy_makes_only_the_gradients_asked_for():
    x, weight = torch.randn(4, 5), torch.randn(13, 5, requires_grad=True)
    targets = torch.randint(13, (4,))
    with torch.no_grad():
        assert not ops.linear_cross_entropy(x, weight, targets).requires_grad
    loss = ops.linear_cross_entropy(x, weight, targets)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.shape == weight.shape
    assert ops.linear_cross_entropy(x, weight, torch.full((4,), -100)).isnan()


def test_linear_cross_entropy_of_logits_that_exp_does_not_hold():
    weight = torch.eye(5) * 400
    loss = ops.linear_cross_entropy(torch.eye(5), weight, torch.tensor([0, 1, 2, 3, 0]))
    assert loss.item() == pytest.approx(400 / 5)


def test_a_chunk_has_rows_enough_for_the_gradient_it_adds_to():
    assert ops.chunk_rows(50257, 128, "cpu") == 166
    assert ops.chunk_rows(50257, 1600, "cpu") == 800


def test_a_compiler_chooses_its_own_products():
    """oneDNN's operation is torch.compile's own, and it refuses to find it in a model."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    compiled = torch.compile(ops.linear, backend=keep)
    assert torch.allclose(compiled(x, weight), ops.linear(x, weight), atol=1e-6)
    assert graphs and "pointwise" not in graphs[0]
