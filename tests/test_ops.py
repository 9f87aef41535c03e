"""The seam: each operation, by PyTorch and by its formula, against float64."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from nanogpt2 import chunked_loss, load_generator, ops
from nanogpt2.config import GPTConfig
from nanogpt2.generation import generate
from nanogpt2.model import GPT

WAYS = pytest.mark.parametrize("kernels", ["torch", "reference"])


def error(result, reference):
    """RMS of the difference over RMS of the reference."""
    difference = result.double() - reference
    return (difference.pow(2).mean().sqrt() / reference.pow(2).mean().sqrt()).item()


@WAYS
def test_layer_norm(kernels):
    x, weight, bias = torch.randn(2, 5, 7), torch.randn(7), torch.randn(7)
    d = x.double()
    norm = (d - d.mean(-1, keepdim=True)) / (d.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert error(ops.layer_norm(x, weight, bias, 1e-5, kernels), norm * weight + bias) < 1e-6


@WAYS
def test_gelu_is_the_tanh_form(kernels):
    x = torch.linspace(-6, 6, 101)
    d = x.double()
    inner = (2 / torch.pi) ** 0.5 * (d + 0.044715 * d**3)
    assert error(ops.gelu(x, kernels), 0.5 * d * (1 + inner.tanh())) < 1e-6
    assert error(ops.gelu(x, kernels), F.gelu(d)) > 1e-5


@WAYS
def test_attention(kernels):
    B, H, T, D = 2, 3, 5, 8
    q, k, v = torch.randn(3, B, H, T, D)
    scores = q.double() @ k.double().transpose(2, 3) / D**0.5
    attention = partial(ops.attention, kernels=kernels)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    expected = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v.double()
    assert error(attention(q, k, v, causal=True), expected) < 1e-6
    assert error(attention(q, k, v, causal=False, mask=causal), expected) < 1e-6
    assert error(attention(q, k, v, causal=False), scores.softmax(-1) @ v.double()) < 1e-6


@WAYS
def test_softmax(kernels):
    x = torch.randn(3, 11) * 50
    d = (x.double() - x.double().amax(-1, keepdim=True)).exp()
    assert error(ops.softmax(x, kernels), d / d.sum(-1, keepdim=True)) < 1e-6


@pytest.fixture
def small_chunks(monkeypatch):
    """Two rows and three tokens at a time, so that many chunks add up."""
    monkeypatch.setitem(chunked_loss.CHUNK_ELEMENTS, "cpu", 2 * 13)
    monkeypatch.setattr(chunked_loss, "TOKENS", 3)


@WAYS
@pytest.mark.parametrize("ignored", [0, 3])
def test_linear_cross_entropy(small_chunks, ignored, kernels):
    M, C, V = 9, 5, 13
    x = torch.randn(M, C, requires_grad=True)
    weight = torch.randn(V, C, requires_grad=True)
    targets = torch.randint(V, (M,))
    targets[:ignored] = -100
    loss = ops.linear_cross_entropy(x, weight, targets, kernels)
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


@WAYS
def test_linear_cross_entropy_in_bfloat16(small_chunks, kernels):
    x, weight = torch.randn(9, 5, requires_grad=True), torch.randn(13, 5, requires_grad=True)
    targets = torch.randint(13, (9,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(x, weight, targets, kernels)
    loss.backward()
    xd, wd = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = F.cross_entropy(xd @ wd.t(), targets)
    expected.backward()
    # 8 bits of mantissa: 2^-8 for each factor
    assert loss.dtype == x.grad.dtype == weight.grad.dtype == torch.float32
    assert error(loss, expected.detach()) < 1e-2
    assert error(x.grad, xd.grad) < 2e-2
    assert error(weight.grad, wd.grad) < 2e-2


@WAYS
def test_linear_cross_entropy_makes_only_the_gradients_asked_for(kernels):
    x, weight = torch.randn(4, 5), torch.randn(13, 5, requires_grad=True)
    targets = torch.randint(13, (4,))
    with torch.no_grad():
        assert not ops.linear_cross_entropy(x, weight, targets, kernels).requires_grad
    loss = ops.linear_cross_entropy(x, weight, targets, kernels)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.shape == weight.shape
    assert ops.linear_cross_entropy(x, weight, torch.full((4,), -100), kernels).isnan()


@WAYS
def test_linear_cross_entropy_of_logits_that_exp_does_not_hold(kernels):
    weight = torch.eye(5) * 400
    loss = ops.linear_cross_entropy(torch.eye(5), weight, torch.tensor([0, 1, 2, 3, 0]), kernels)
    assert loss.item() == pytest.approx(400 / 5)


def test_a_chunk_has_rows_enough_for_the_gradient_it_adds_to():
    assert chunked_loss.chunk_rows(50257, 128, "cpu") == 166
    assert chunked_loss.chunk_rows(50257, 1600, "cpu") == 800


# ---- a whole model by the formulas

SHAPE = GPTConfig(61, 20, 2, 3, 24, bos_token_id=60, eos_token_id=None)


def twins(device="cpu", **shape):
    """The same random model twice: by PyTorch, by the formulas."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**(SHAPE.__dict__ | shape))).to(device)
    with torch.no_grad():
        for p in model.parameters():
            # sharp enough that no two scores are nearly equal
            p.add_(torch.randn_like(p) * (0.2 if p.dim() > 1 else 0.05))
    formulas = copy.deepcopy(model)
    formulas.use_kernels("reference")
    assert (model.kernels, formulas.kernels) == ("torch", "reference")
    return model, formulas


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_formulas_train_as_pytorch_does(device, dropout, monkeypatch):
    model, formulas = twins(device, dropout=dropout)
    ids, targets = torch.randint(61, (2, 3, 9), device=device)
    targets[0, :4] = -100
    losses = []
    for each in (model, formulas):
        # the formulas draw dropout where PyTorch's own attention does on a CPU
        torch.manual_seed(1)
        losses.append(each(ids, targets))
        losses[-1].backward()
    if dropout and device != "cpu":
        # a GPU's fused attention draws other masks
        assert losses[0].isfinite() and losses[1].isfinite()
        return
    assert error(losses[1].detach(), losses[0].detach().double()) < 1e-6
    for (name, p), q in zip(model.named_parameters(), formulas.parameters(), strict=True):
        assert error(q.grad, p.grad.double()) < 1e-5, name
    model.eval()
    formulas.eval()
    with torch.no_grad():
        assert error(formulas(ids), model(ids).double()) < 1e-5


def test_the_formulas_draw_dropout():
    _, formulas = twins(dropout=0.3)
    ids = torch.randint(61, (2, 9))
    assert not torch.equal(formulas(ids), formulas(ids))


def test_the_formulas_run_nothing_of_pytorchs(monkeypatch):
    _, formulas = twins()
    names = ("layer_norm", "gelu", "softmax", "scaled_dot_product_attention", "cross_entropy")
    for name in names:
        monkeypatch.delattr(F, name)
    monkeypatch.delattr(ops, "chunked_cross_entropy")
    ids = torch.randint(61, (2, 9))
    formulas(ids, ids).backward()
    ops.softmax(torch.randn(3), "reference")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_formulas_in_half_precision(dtype):
    model, formulas = (each.to(dtype) for each in twins())
    ids = torch.randint(61, (2, 9))
    with torch.no_grad():
        found, expected = formulas(ids), model(ids)
    assert found.dtype == dtype
    assert error(found, expected.double()) < {torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    # a power or a sum of these overflows float16
    large = torch.linspace(-300, 300, 7).to(dtype)
    ones = torch.ones(7, dtype=dtype)
    for kernels in ("torch", "reference"):
        assert ops.gelu(large, kernels).isfinite().all()
        assert ops.layer_norm(large, ones, ones, 1e-5, kernels).isfinite().all()


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 1, 3], [9], [2, 7]])
def test_the_formulas_read_from_a_cache(pieces):
    _, formulas = twins()
    ids = torch.randint(61, (3, 9))
    cache = formulas.new_cache(3, max_length=9)
    with torch.no_grad():
        parts = [formulas.hidden_states(piece, cache=cache) for piece in ids.split(pieces, dim=1)]
        torch.testing.assert_close(formulas.logits(torch.cat(parts, dim=1)), formulas(ids))


GENERATED = {
    "greedy": {},
    "sampled": {"do_sample": True, "noise": "counter", "seed": 3},
    "beams": {"num_beams": 3},
    "contrastive": {"penalty_alpha": 0.5, "top_k": 3},
    "guessed": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("way", GENERATED)
def test_the_formulas_generate_the_same_tokens(way):
    """With padding, whose queries may look nowhere, and past the context's end."""
    model, formulas = twins()
    ids = torch.randint(60, (2, 5))
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    if way == "guessed":
        ids, mask = torch.tensor([[3, 1, 4, 3, 1]]), None
    options = {"max_new_tokens": 18, "output_scores": True} | GENERATED[way]
    expected, found = (generate(each, ids, mask, **options) for each in (model, formulas))
    assert torch.equal(found.sequences, expected.sequences)


def test_the_formulas_are_chosen_anywhere():
    for device in ("cpu", "cuda", "mps"):
        assert ops.choose_kernels("reference", device) == "reference"
    assert ops.describe_kernels("reference", "reference", "cpu").startswith("kernels: reference ")
    with pytest.raises(ValueError, match="auto, torch, triton or reference, not 'other'"):
        ops.choose_kernels("other", "cpu")


def test_the_formulas_are_what_generates(monkeypatch):
    """Not the model packed for a CPU, nor the decoder for a few rows."""
    model = load_generator("demo", kernels="reference")
    assert type(model) is GPT and model.kernels == "reference"
    monkeypatch.delattr(F, "scaled_dot_product_attention")
    generate(model, torch.tensor([[1, 2]]), max_new_tokens=2)


def test_the_formulas_take_masks_as_tensors():
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match=r'mask must be .* kernels "reference"'):
        ops.attention(q, q, q, causal=True, mask=ops.AttentionMetadata(), kernels="reference")
