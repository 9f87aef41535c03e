"""The linear layers of a decoding step against decode_linear_ref in fp32."""

import pytest
import torch
from kernel_reference import DEVICE, assert_close
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt2.kernels import decode_linear as room
from nanogpt2.kernels.decode_linear import (
    ARRIVED,
    DTYPES,
    decode_embed,
    decode_embed_ref,
    decode_linear,
    decode_linear_ref,
)

pytestmark = pytest.mark.usefixtures("poisoned")
FP32 = torch.float32


def random(*shape, dtype=FP32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def whole(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def normed(K, dtype=FP32):
    return 1 + 0.3 * random(K, dtype=dtype), random(K, dtype=dtype), 1e-5


def parts(R, N, K, dtype=FP32):
    """Arguments, and all options at once."""
    options = {
        "bias": random(N, dtype=dtype),
        "norm": normed(K, dtype),
        "gelu": True,
        "residual": random(R, N, dtype=dtype),
    }
    # products of the size of 1, as in a model
    return (random(R, K, dtype=dtype), random(N, K, dtype=dtype) / K**0.5), options


def check(inputs, **options):
    found = decode_linear(*inputs, **options)
    assert found.dtype == inputs[0].dtype and found.is_contiguous()
    assert_close(found, decode_linear_ref(*inputs, **options))


@pytest.mark.parametrize("R", range(1, 9))
def test_rows(R):
    inputs, options = parts(R, 7, 100)
    check(inputs, **options)
    check(inputs)


@pytest.mark.parametrize("chosen", ["bias", "norm", "gelu", "residual"])
def test_each_option_alone(chosen):
    inputs, options = parts(3, 21, 45)
    check(inputs, **{chosen: options[chosen]})


@pytest.mark.parametrize("N", [1, 2, 9])
@pytest.mark.parametrize("K", [1, 8, 127, 300, 768])
def test_sizes(N, K):
    """Neither a multiple of a block."""
    inputs, options = parts(2, N, K)
    check(inputs, **options)


def test_several_outputs_a_warp(monkeypatch):
    """The last warp has one output, where it could have two or four."""
    monkeypatch.setattr(room, "PROGRAMS", 5)
    for N in (9, 33):
        inputs, options = parts(2, N, 100, torch.float16)
        check(inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(9, 250), (4, 768)])
def test_dtypes(dtype, N, K):
    inputs, options = parts(5, N, K, dtype)
    check(inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("R", "K"), [(1, 4200), (3, 2100)])
def test_a_long_k_is_split(R, K, dtype):
    """The last share adds them all, and leaves the counters at 0 for the next call."""
    N = 7
    splits = room._config(R, N, K, torch.empty(0, dtype=dtype).element_size(), False)["SPLITS"]
    assert splits > 1
    arrived = torch.zeros(ARRIVED, dtype=torch.int32, device=DEVICE)
    (x, weight), options = parts(R, N, K, dtype)
    del options["norm"]
    for _ in range(2):
        check((x, weight), **options)
        found = decode_linear(x, weight, arrived=arrived, **options)
        assert torch.equal(found, decode_linear(x, weight, **options))
        assert not arrived.any()


def test_a_norm_is_never_split():
    for size in (2, 4):
        assert room._config(8, 100, 8192, size, True)["SPLITS"] == 1
    inputs, options = parts(2, 5, 4096)
    check(inputs, **options)


def test_the_mean_is_taken_out_first():
    """A large mean would cost E[x^2] - mean^2 all digits of the variance."""
    x, weight = 1000 + random(2, 300), random(7, 300)
    expected = decode_linear_ref(x.double(), weight, norm=normed_one(300))
    assert_close(decode_linear(x, weight, norm=normed_one(300)), expected, factor=300)


def normed_one(K):
    return torch.ones(K, device=DEVICE), torch.zeros(K, device=DEVICE), 1e-5


def test_strides():
    """Rows with a stride of their own, and columns that are copied."""
    weight = random(11, 20)
    check((random(4, 60)[:, 7:27], weight), residual=random(4, 30)[:, :11])
    check((random(20, 4).t(), weight), residual=random(11, 4).t())


def test_every_row_by_itself():
    """A row's result does not depend on the others, NaN among them."""
    (x, weight), options = parts(5, 19, 70)
    expected = decode_linear(x, weight, **options)
    x[2] = float("nan")
    found = decode_linear(x, weight, **options)
    assert found[2].isnan().all()
    for r in (0, 1, 3, 4):
        assert torch.equal(found[r], expected[r])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [5, 64, 1600])
def test_embed(C, dtype):
    wte, wpe = random(11, C, dtype=dtype), random(7, C, dtype=dtype)
    tokens, lengths = whole(0, 10, 3, 3), whole(0, 6, 2, 5, dtype=torch.int32)
    for start in (None, whole(0, 1, 2, 4, dtype=torch.int32)):
        found = decode_embed(tokens, lengths, wte, wpe, start)
        assert found.dtype == dtype
        assert_close(found, decode_embed_ref(tokens, lengths, wte, wpe, start))


def test_embed_reads_nothing_outside_the_tables():
    wte, wpe = random(11, 5), random(7, 5)
    found = decode_embed(whole(-1, 11, 2**40), whole(7, -3, 2**40), wte, wpe)
    rows = whole(0, 10, 10), whole(6, 0, 6)
    assert torch.equal(found, decode_embed(*rows, wte, wpe))


class Seen(TorchDispatchMode):
    """Names of this project's operations that ran inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "nanogpt2":
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_recorded_as_an_operation_and_else_launched_directly(monkeypatch):
    (x, weight), options = parts(2, 5, 9)
    with Seen() as seen:
        recorded = decode_linear(x, weight, **options)
        decode_embed(whole(1), whole(1), weight, weight)
    assert seen.names == ["nanogpt2::decode_linear", "nanogpt2::decode_embed"]

    def dispatched(*_):
        raise AssertionError("the dispatcher ran")

    monkeypatch.setattr(room, "_linear_op", dispatched)
    monkeypatch.setattr(room, "_embed_op", dispatched)
    assert torch.equal(decode_linear(x, weight, **options), recorded)
    decode_embed(whole(1), whole(1), weight, weight)


def test_library():
    (x, weight), options = parts(2, 5, 9)
    w, b, eps = options["norm"]
    operator = torch.ops.nanogpt2.decode_linear.default
    opcheck(operator, (x, weight, options["bias"], w, b, eps, True, options["residual"], None))
    opcheck(operator, (x, weight, None, None, None, 0.0, False, None, None))
    operator = torch.ops.nanogpt2.decode_embed.default
    opcheck(operator, (whole(3, 1), whole(2, 4), weight, weight, whole(0, 1)))
    compiled = torch.compile(
        lambda x: decode_linear(2 * x, weight, gelu=True).sin(), backend="aot_eager", fullgraph=True
    )
    assert_close(compiled(x), decode_linear_ref(2 * x, weight, gelu=True).sin())


def test_wrong_use():
    x, weight = random(3, 8), random(5, 8)
    for message, change in {
        "x must be float32, float16 or bfloat16, all the same": {"x": x.double()},
        "weight must be float32, float16 or bfloat16, all the same": {"weight": weight.half()},
        r"x must be \(R, K\), R up to 8 and K up to 8192, not \(9, 8\)": {"x": random(9, 8)},
        r"x must be .* not \(8,\)": {"x": x[0]},
        r"weight must be \(N, 8\) and contiguous, not \(5, 7\)": {"weight": random(5, 7)},
        r"weight must be \(N, 8\) and contiguous, not \(8, 8\)": {"weight": random(8, 8).t()},
        r"bias must be \(5,\), not \(4,\)": {"bias": random(4)},
        r"residual must be \(3, 5\), not \(2, 5\)": {"residual": random(2, 5)},
        r"norm's weight must be \(8,\), not \(5,\)": {"norm": (random(5), random(8), 1e-5)},
        r"norm's bias must be float32": {"norm": (random(8), random(8).half(), 1e-5)},
        r"arrived must be \(16384,\) int32": {"arrived": whole(0)},
    }.items():
        with pytest.raises(ValueError, match=message):
            decode_linear(**({"x": x, "weight": weight} | change))
    tokens = whole(1, 2)
    for message, change in {
        "tokens must be integers": {"tokens": tokens.int()},
        "lengths must be integers": {"lengths": tokens[:1]},
        "start must be integers": {"start": tokens.float()},
        r"wte and wpe must be \(V, C\)": {"wpe": random(4, 7)},
        "wpe must be float32": {"wpe": weight.half()},
    }.items():
        given = {"tokens": tokens, "lengths": tokens, "wte": weight, "wpe": weight}
        with pytest.raises(ValueError, match=message):
            decode_embed(**(given | change))


def test_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(room, "INTERPRETED", False)
    with pytest.raises(ValueError, match="x must be on a CUDA device, not on cpu"):
        decode_linear(torch.randn(1, 8), torch.randn(3, 8))
    with pytest.raises(ValueError, match="wte must be on a CUDA device, not on cpu"):
        decode_embed(
            torch.zeros(1).long(), torch.zeros(1).long(), torch.ones(2, 3), torch.ones(1, 3)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [1, 2, 5, 8])
def test_natively(R, dtype):
    for N, K in ((2304, 768), (768, 768), (768, 3072), (50257, 768)):
        inputs, options = parts(R, N, K, dtype)
        if K != 768:
            del options["norm"]
        check(inputs, **options)


@pytest.mark.gpu
def test_in_a_graph():
    """A replay splits K, joins the shares and leaves the counters as it found them."""
    (x, weight), options = parts(8, 768, 3072, torch.bfloat16)
    del options["norm"]
    arrived = torch.zeros(ARRIVED, dtype=torch.int32, device=DEVICE)
    decode_linear(x, weight, arrived=arrived, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode_linear(x, weight, arrived=arrived, **options)
    for _ in range(5):
        x.normal_()
        graph.replay()
        assert torch.equal(found, decode_linear(x, weight, **options))
        assert not arrived.any()
