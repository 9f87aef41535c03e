"""The decoding kernels against decode_attention_ref in fp32."""

import math

import pytest
import torch
from attention_reference import bf16_dots  # noqa: F401
from kernel_reference import DEVICE, assert_close
from torch.library import opcheck
from triton.runtime import interpreter

from nanogpt2.kernels import decode_attention as room
from nanogpt2.kernels.decode_attention import (
    decode_attention,
    decode_attention_ref,
    decode_step,
    decode_step_ref,
    step_splits,
)

pytestmark = pytest.mark.usefixtures("bf16_dots", "poisoned")
FP32 = torch.float32


def random(*shape, dtype=FP32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def whole(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def inputs(R, H, T, S, D, dtype=FP32, cache_rows=None):
    caches = (random(cache_rows or R, H, S, D, dtype=dtype) for _ in range(2))
    return random(R, H, T, D, dtype=dtype), *caches


def poison(cache, lengths):
    """What lies behind the last position is never read."""
    for row, length in zip(cache, lengths, strict=True):
        row[:, length:] = math.nan


def check(q, k, v, lengths, **options):
    given = {name: x for name, x in options.items() if name != "splits"}
    found = decode_attention(q, k, v, lengths, **options)
    assert found.dtype == q.dtype and found.shape == q.shape
    assert_close(found, decode_attention_ref(q, k, v, lengths, **given))


@pytest.mark.parametrize(("T", "splits"), [(1, 1), (1, 2), (3, 7), (16, 2)])
def test_lengths(T, splits):
    lengths = whole(T, 37, 63, 128, 200)
    q, k, v = inputs(5, 1, T, 200, 16)
    poison(k, lengths)
    poison(v, lengths)
    check(q, k, v, lengths, splits=splits)


@pytest.mark.parametrize("dtype", [FP32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [16, 32, 64, 128])
def test_head_sizes(D, dtype):
    check(*inputs(1, 2, 2, 77, D, dtype), whole(70), splits=2)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_padding(dtype):
    lengths = whole(150, 150, 150, 150, 150, dtype=dtype)
    start = whole(0, 5, 64, 97, 149, dtype=dtype)
    q, k, v = inputs(5, 2, 2, 150, 16)
    for b, first in enumerate(start):
        k[b, :, :first] = v[b, :, :first] = math.nan
    for splits in (1, 3):
        found = decode_attention(q, k, v, lengths, start=start, splits=splits)
        expected = decode_attention_ref(q, k.nan_to_num(), v.nan_to_num(), lengths, start=start)
        assert_close(found, expected)


@pytest.mark.parametrize("splits", [1, 3])
def test_no_position_no_output(splits):
    q, k, v = inputs(4, 1, 2, 50, 16)
    # nothing; all padding; and a first token before the first position
    found = decode_attention(q, k, v, whole(0, 50, 1, -5), start=whole(0, 50, 0, 0), splits=splits)
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    assert torch.equal(found[1], torch.zeros_like(found[1]))
    assert torch.equal(found[3], torch.zeros_like(found[3]))
    assert torch.equal(found[2, :, 0], torch.zeros_like(found[2, :, 0]))
    assert_close(found[2, :, 1], v[2, :, 0])


def test_lengths_beyond_the_cache_read_nothing_behind_it():
    q, k, v = inputs(2, 1, 1, 50, 16)
    found = decode_attention(q, k, v, whole(51, 2**40), start=whole(-7, 2**40), trusted=True)
    assert_close(found[0], decode_attention_ref(q, k, v, whole(50, 50))[0])
    assert torch.equal(found[1], torch.zeros_like(found[1]))


@pytest.mark.parametrize("splits", [1, 3])
def test_beams_without_reordering(splits):
    """Six steps of four beams: one form copies the cache, the other the table's rows."""
    R, H, S, D, prompt = 4, 1, 75, 16, 63
    q, *copied = inputs(R, H, 1, S, D)
    shared = [torch.full_like(cache, math.nan) for cache in copied]
    for cache, other in zip(copied, shared, strict=True):
        # every beam has the prompt, or it lies in row 2 alone
        cache[:, :, :prompt] = other[2, :, :prompt] = cache[0, :, :prompt]
    ancestors = torch.full((R, S), 2, dtype=torch.int32, device=DEVICE)
    for t in range(prompt, prompt + 6):
        parents = torch.randint(R, (R,), device=DEVICE)
        copied, ancestors = [cache[parents] for cache in copied], ancestors[parents]
        ancestors[:, t] = torch.arange(R, device=DEVICE)
        for cache, other in zip(copied, shared, strict=True):
            cache[:, :, t] = other[:, :, t] = random(R, H, D)
        q, lengths = random(R, H, 1, D), torch.full((R,), t + 1, device=DEVICE)
        found = decode_attention(q, *shared, lengths, ancestors=ancestors, splits=splits)
        assert torch.equal(found, decode_attention(q, *copied, lengths, splits=splits))
        assert_close(found, decode_attention_ref(q, *copied, lengths))


def test_more_rows_than_the_cache_has():
    """And the entries that no position uses may be anything."""
    q, k, v = inputs(5, 2, 3, 40, 16, cache_rows=2)
    lengths = whole(3, 40, 20, 7, 31)
    ancestors = torch.randint(2, (5, 40), device=DEVICE)
    ancestors[torch.arange(40, device=DEVICE) >= lengths[:, None]] = -(2**40)
    check(q, k, v, lengths, ancestors=ancestors, splits=2)
    transposed = ancestors.t().contiguous().t()
    check(q, k, v, lengths, ancestors=transposed, start=whole(0, 3, 0, 0, 8))


def test_one_token_is_the_last_row_of_full_attention():
    from nanogpt2.kernels.attention import attention

    q, k, v = inputs(2, 3, 70, 70, 32)
    expected = attention(q, k, v)[:, :, -5:]
    assert_close(decode_attention(q[:, :, -5:], k, v, whole(70, 70), splits=2), expected)


@pytest.mark.interpreted
def test_shares_are_even_at_any_length(monkeypatch):
    """A graph of eight splits, made for the cache's size, does not leave seven of them idle."""
    original, rounds = interpreter.InterpreterBuilder.create_dot, []

    def create_dot(self, *arguments):
        rounds.append(self.grid_idx[0])
        return original(self, *arguments)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    block = room.CONFIG[4][0]
    decode_attention(*inputs(1, 1, 1, 64 * block, 16), whole(8 * block), splits=8)
    assert sorted(rounds) == sorted(2 * list(range(8)))


def test_the_number_of_splits(monkeypatch):
    """Each split has a float32 result of its own, (splits, R, H, T, D), until they are joined."""
    shapes = []

    def empty(*shape, original=torch.empty, **options):
        shapes.append(shape)
        return original(*shape, **options)

    def splits(R, H, S):
        del shapes[:]
        decode_attention(*inputs(R, H, 1, S, 64), whole(*[S] * R))
        return next((shape[0] for shape in shapes if len(shape) == 5), 1)

    monkeypatch.setattr(torch, "empty", empty)
    assert splits(1, 1, room.LEAST_TO_SPLIT) == 1
    if DEVICE == "cuda":
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        assert splits(1, 12, 1024) == min(2 ** (2 * processors // 12).bit_length() // 2, 8)
        assert splits(64, 12, 1024) == 1
    else:
        # one processor is worth two programs
        assert splits(1, 1, 1024) == 2
        assert splits(1, 1, 1000) == 2
        assert splits(3, 1, 1024) == 1


# the rows of the tile that hold no token are 0, and 0 * inf is nan
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_minus_infinity_in_the_keys():
    q, k, v = inputs(2, 2, 2, 130, 16)
    k[:, :, 1:100, 0] = -math.inf
    q[..., 0] = q[..., 0].abs()
    assert not decode_attention_ref(q, k, v, whole(130, 90)).isnan().any()
    check(q, k, v, whole(130, 90), splits=3)


def test_large_logits():
    """Some thousands: 2^88 overflows, and fp32 knows such a logit within 2^-12."""
    q, k, v = inputs(2, 2, 2, 130, 16)
    found = decode_attention(30 * q, 30 * k, v, whole(130, 90), splits=3)
    expected = decode_attention_ref(30 * q, 30 * k, v, whole(130, 90))
    assert_close(found, expected, factor=1000)


def test_any_strides():
    R, H, T, S, D = 2, 3, 2, 50, 16
    q = random(D, H, R, T).permute(2, 1, 3, 0)
    k = random(S, 1, H, D).expand(S, R, H, D).permute(1, 2, 0, 3)
    v = random(R, H, 2 * S, 3 * D)[:, :, ::2, 5 : 5 + D]
    check(q, k, v, whole(50, 49))
    assert decode_attention(q, k, v, whole(50, 49)).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_32_bits(axis):
    # only the pages that are touched exist
    shape, strides = (2, 2, 2, 16), [64, 32, 16, 1]
    strides[axis] = 2**31
    storage = torch.empty_strided((2**31 + 2**10,), (1,), dtype=torch.float16, device=DEVICE)
    wide = storage.as_strided(shape, strides)
    narrow = inputs(2, 2, 2, 2, 16, torch.float16)
    for i in range(3):
        tensors = list(narrow)
        tensors[i] = wide.copy_(narrow[i])
        check(*tensors, whole(2, 2))
        check(*tensors, whole(2, 2), ancestors=whole(0, 1, 1, 0).view(2, 2))


def test_opcheck():
    q, k, v = inputs(2, 2, 1, 9, 16)
    arguments = (q, k, v, whole(9, 4), whole(0, 1), torch.zeros_like(whole(0)).expand(2, 9))
    opcheck(torch.ops.nanogpt2.decode_attention.default, (*arguments, 0.25, 2))


def test_compiles_without_a_break():
    q, k, v = inputs(2, 2, 1, 20, 16)

    def function(q):
        return decode_attention(2 * q, k, v, whole(20, 7), trusted=True).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(compiled(q), function(q))


GOOD = {"q": (2, 3, 1, 16), "k": (2, 3, 20, 16), "v": (2, 3, 20, 16), "lengths": (2,)}
BAD = [
    ({"q": (2, 3, 17, 16)}, {}, r"q must be \(R, H, T, D\) with T up to 16 and D in"),
    ({"q": (2, 3, 1, 48)}, {}, "q must be"),
    ({"q": (2, 3, 0, 16)}, {}, "q must be"),
    ({"k": (3, 3, 20, 16)}, {}, r"k_cache must be \(R, H, S, D\) to q's \[2, 3, 1, 16\]"),
    ({"k": (3, 20, 16)}, {}, "k_cache must be"),
    ({"k": (2, 3, 0, 16)}, {}, "k_cache must be"),
    ({"v": (2, 3, 21, 16)}, {}, "v_cache must be"),
    ({"lengths": (3,)}, {}, r"lengths must be int32 or int64 \(2,\) on the device of q"),
    ({}, {"start": torch.zeros(2)}, r"start must be int32 or int64 \(2,\)"),
    ({}, {"ancestors": torch.zeros(2, 19).long()}, r"ancestors must be int32 or int64 \(2, 20\)"),
    ({}, {"scale": 0.0}, "scale must be positive and finite, not 0.0"),
    ({}, {"splits": 0}, "splits must be 1 to 128, not 0"),
]


@pytest.mark.parametrize(("shapes", "options", "message"), BAD)
def test_wrong_use(shapes, options, message):
    q, k, v, lengths = (random(*shape) for shape in (GOOD | shapes).values())
    options = {n: x.to(DEVICE) if torch.is_tensor(x) else x for n, x in options.items()}
    with pytest.raises(ValueError, match=message):
        decode_attention(q, k, v, lengths.long(), **options)


def test_places_outside_the_cache():
    q, k, v = inputs(2, 1, 1, 5, 16)
    with pytest.raises(ValueError, match="lengths must be up to 5, the cache's positions, not 6"):
        decode_attention(q, k, v, whole(5, 6))
    ancestors = torch.zeros(2, 5, dtype=torch.int32, device=DEVICE)
    # what is not read may be anything
    ancestors[1, 4] = 99
    decode_attention(q, k, v, whole(5, 4), ancestors=ancestors)
    for row in (-1, 2):
        ancestors[0, 3] = row
        with pytest.raises(ValueError, match=f"ancestors must be rows of the cache, .* not {row}"):
            decode_attention(q, k, v, whole(5, 4), ancestors=ancestors)


def test_wrong_dtype_and_device():
    q, k, v = inputs(2, 1, 1, 5, 16)
    lengths = whole(5, 5)
    with pytest.raises(ValueError, match="q must be float32, float16 or bfloat16"):
        decode_attention(q.double(), k, v, lengths)
    with pytest.raises(ValueError, match="v_cache must have the dtype and device of q"):
        decode_attention(q, k, v.half(), lengths)
    with pytest.raises(ValueError, match="q must be on a CUDA device, not on meta"):
        decode_attention(q.to("meta"), k, v, lengths)
    with pytest.raises(ValueError, match="lengths must be int32 or int64"):
        decode_attention(q, k, v, lengths.to("meta"))
    with pytest.raises(ValueError, match="lengths must be int32 or int64"):
        decode_attention(q, k, v, lengths.float())


# ---- a step: one token a row, written and attended from in one launch


def step_inputs(R, H, S, D, dtype=FP32, cache_rows=None):
    caches = (random(cache_rows or R, H, S, D, dtype=dtype) for _ in range(2))
    return random(R, 3 * H * D, dtype=dtype), *caches


def check_step(qkv, k, v, lengths, splits=1, **options):
    """The result, and the caches with the new token in place and nothing else changed."""
    copies = k.clone(), v.clone()
    arrived = torch.zeros(99, dtype=torch.int32, device=DEVICE)
    found = decode_step(qkv, k, v, lengths, splits=splits, arrived=arrived, **options)
    expected = decode_step_ref(qkv, *copies, lengths, **options)
    assert found.dtype == qkv.dtype
    assert_close(found, expected)
    for cache, copy in zip((k, v), copies, strict=True):
        assert torch.equal(cache.nan_to_num(7), copy.nan_to_num(7))
    assert not arrived.any()
    return found


@pytest.mark.parametrize("splits", [1, 2, 8])
def test_step_lengths(splits):
    """None before, less than a block, whole blocks, and the last place of the cache."""
    lengths = whole(0, 1, 63, 64, 65, 128, 299, dtype=torch.int32)
    qkv, k, v = step_inputs(7, 2, 300, 32)
    poison(k, lengths)
    poison(v, lengths)
    check_step(qkv, k, v, lengths, splits)


@pytest.mark.parametrize("dtype", [FP32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [16, 32, 64, 128])
def test_step_head_sizes(D, dtype):
    check_step(*step_inputs(1, 2, 80, D, dtype), whole(70), splits=2)


@pytest.mark.parametrize("splits", [1, 4])
def test_step_padding(splits):
    """A row's first token may be its new one; a start behind it counts as the length."""
    lengths, start = whole(100, 100, 100, 100), whole(0, 37, 100, 105)
    qkv, k, v = step_inputs(4, 1, 140, 16)
    for b, first in enumerate(start):
        k[b, :, :first] = v[b, :, :first] = math.nan
    found = decode_step(qkv, k, v, lengths, start=start, splits=splits)
    expected = decode_step_ref(
        qkv, k.nan_to_num(), v.nan_to_num(), lengths, start=start.clamp(max=100)
    )
    assert_close(found, expected)
    assert_close(found[2], qkv[2, -16:])


@pytest.mark.parametrize("splits", [1, 4])
def test_step_of_beams(splits):
    """Steps of three beams over a shared prompt, by the table and by copies of the cache."""
    R, H, S, D, prompt = 3, 1, 75, 16, 60
    _, *copied = step_inputs(R, H, S, D)
    shared = [torch.full_like(cache, math.nan) for cache in copied]
    for cache, other in zip(copied, shared, strict=True):
        cache[:, :, :prompt] = other[0, :, :prompt] = cache[0, :, :prompt]
    ancestors = torch.zeros(R, S, dtype=torch.int32, device=DEVICE)
    own = torch.arange(R, dtype=torch.int32, device=DEVICE)
    for t in range(prompt, prompt + 4):
        # entries from the length on are not read
        ancestors[:, t:] = -(2**30)
        qkv, lengths = random(R, 3 * H * D), torch.full((R,), t, device=DEVICE)
        found = decode_step(qkv, *shared, lengths, ancestors=ancestors, splits=splits)
        assert torch.equal(found, decode_step(qkv, *copied, lengths, splits=splits))
        parents = torch.randint(R, (R,), device=DEVICE)
        ancestors[:, t] = own
        copied, ancestors = [cache[parents] for cache in copied], ancestors[parents]


def test_step_of_a_layer_of_a_larger_cache():
    """Any strides but along D, and qkv inside a wider tensor."""
    caches = random(2, 3, 6, 2, 50, 16)
    qkv = random(4, 3 * 32 + 9)[:, 5:-4]
    check_step(qkv, caches[0, 1, :4], caches[1, 1, :4], whole(3, 49, 20, 7), splits=2)
    k, v = (random(4, 50, 2, 16).transpose(1, 2) for _ in range(2))
    check_step(qkv, k, v, whole(3, 49, 20, 7))


@pytest.mark.parametrize("splits", [1, 2])
def test_step_of_a_full_row_writes_nothing(splits):
    qkv, k, v = step_inputs(2, 1, 50, 16)
    storage = [torch.cat([x.flatten(), torch.ones(99, device=DEVICE)]) for x in (k, v)]
    inside = [x[:-99].view(2, 1, 50, 16) for x in storage]
    found = decode_step(qkv, *inside, whole(50, 2**40), splits=splits)
    for x, cache in zip(storage, (k, v), strict=True):
        assert torch.equal(x, torch.cat([cache.flatten(), torch.ones(99, device=DEVICE)]))
    wide = [torch.cat([cache, cache[:, :, :1]], dim=2) for cache in (k, v)]
    assert_close(found, decode_step_ref(qkv, *wide, whole(50, 50)))


@pytest.mark.parametrize("splits", [1, 4])
def test_step_of_extreme_scores(splits):
    """Scores of some thousands, and keys of -inf: no nan, no overflow."""
    qkv, k, v = step_inputs(2, 2, 200, 16)
    check_large = decode_step(30 * qkv, 30 * k, v.clone(), whole(190, 90), splits=splits)
    expected = decode_step_ref(30 * qkv, 30 * k, v.clone(), whole(190, 90))
    assert_close(check_large, expected, factor=1000)
    k[:, :, 1:180, 0] = -math.inf
    qkv[:, ::16] = qkv[:, ::16].abs()
    assert not check_step(qkv, k, v, whole(190, 90), splits).isnan().any()


def test_step_splits():
    """Powers of two, two programs an SM at most, shares of 64 positions at least."""
    for rows, positions, expected in (
        (1, 1024, 16),
        (1, 512, 8),
        (1, 64, 1),
        (1, 1, 1),
        (5, 1024, 4),
        (8, 1024, 2),
        (64, 1024, 1),
    ):
        assert step_splits(rows, 12, positions, 132) == expected
    assert step_splits(1, 1, 2**20, 132) == 64


def test_step_library():
    qkv, k, v = step_inputs(2, 2, 9, 16)
    arguments = (qkv, k, v, whole(8, 4), whole(0, 1), torch.zeros_like(whole(0)).expand(2, 9))
    opcheck(torch.ops.nanogpt2.decode_step.default, (*arguments, 2, None))
    compiled = torch.compile(
        lambda x: decode_step(2 * x, k, v, whole(3, 7)).sin(), fullgraph=True, backend="aot_eager"
    )
    copies = k.clone(), v.clone()
    assert_close(compiled(qkv), decode_step_ref(2 * qkv, *copies, whole(3, 7)).sin())
    assert torch.equal(k, copies[0])


def test_launched_directly_where_nothing_records(monkeypatch):
    def dispatched(*_):
        raise AssertionError("the dispatcher ran")

    monkeypatch.setattr(room, "_attention_op", dispatched)
    monkeypatch.setattr(room, "_step_op", dispatched)
    decode_attention(*inputs(2, 1, 1, 20, 16), whole(20, 7))
    decode_step(*step_inputs(2, 1, 20, 16), whole(19, 7))


def test_step_wrong_use():
    qkv, k, v = step_inputs(2, 3, 20, 16)
    good = {"qkv": qkv, "k_cache": k, "v_cache": v, "lengths": whole(3, 4)}
    for message, change in {
        r"qkv and k_cache must be \(R, 3 H D\) and": {"qkv": qkv[:, :-1]},
        "q must be float32, float16 or bfloat16": {"qkv": qkv.double()},
        "v_cache must be": {"v_cache": v[:, :, :-1]},
        "k_cache must have the dtype and device of q": {"k_cache": k.half()},
        "lengths must be int32 or int64": {"lengths": whole(3)},
        "start must be int32 or int64": {"start": whole(3, 4).float()},
        r"ancestors must be int32 or int64 \(2, 20\)": {"ancestors": whole(3, 4)},
        "k_cache and v_cache must have 2 rows or more and stride 1 along D": {
            "k_cache": k.transpose(2, 3).contiguous().transpose(2, 3)
        },
        "splits must be a power of two up to 64, not 3": {"splits": 3},
        r"arrived must be int32 \(6,\) or more": {"arrived": whole(0, 0, 0)},
    }.items():
        with pytest.raises(ValueError, match=message):
            decode_step(**(good | change))
    with pytest.raises(ValueError, match="must have 2 rows or more"):
        decode_step(
            qkv, k[:1], v[:1], whole(3, 4), ancestors=torch.zeros_like(whole(0)).expand(2, 20)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [16, 32, 64, 128])
def test_natively(D, dtype):
    q, k, v = inputs(5, 12, 1, 1024, D, dtype)
    lengths = whole(1, 100, 513, 1000, 1024)
    for splits in (None, 1, 8, 13):
        check(q, k, v, lengths, splits=splits)
    ancestors = torch.randint(5, (5, 1024), device=DEVICE)
    check(q, k, v, lengths, ancestors=ancestors, start=whole(0, 7, 500, 0, 77))


@pytest.mark.gpu
def test_in_a_graph():
    """A replay reads the lengths and the table where they lie."""
    q, k, v = inputs(5, 12, 1, 1024, 64, torch.bfloat16)
    lengths, ancestors = whole(1, 1, 1, 1, 1), torch.zeros(5, 1024, device=DEVICE).long()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        decode_attention(q, k, v, lengths, ancestors=ancestors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_attention(q, k, v, lengths, ancestors=ancestors, trusted=True)
    for length in (3, 700, 1024):
        lengths.fill_(length)
        ancestors.random_(5)
        graph.replay()
        expected = decode_attention(q, k, v, lengths, ancestors=ancestors)
        assert torch.equal(captured, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 2, 16])
def test_step_natively(splits, dtype):
    qkv, k, v = step_inputs(5, 12, 1024, 64, dtype)
    lengths = whole(0, 100, 513, 1000, 1023)
    check_step(qkv, k, v, lengths, splits)
    ancestors = torch.randint(5, (5, 1024), device=DEVICE, dtype=torch.int32)
    check_step(qkv, k, v, lengths, splits, ancestors=ancestors, start=whole(0, 7, 500, 0, 77))


@pytest.mark.gpu
def test_step_in_a_graph():
    """A replay follows the lengths and the table; the counters are 0 after each."""
    qkv, k, v = step_inputs(5, 12, 1024, 64, torch.bfloat16)
    lengths, ancestors = whole(1, 1, 1, 1, 1), torch.zeros(5, 1024, device=DEVICE).long()
    arrived = torch.zeros(60, dtype=torch.int32, device=DEVICE)
    options = {"ancestors": ancestors, "splits": 4, "arrived": arrived}
    decode_step(qkv, k, v, lengths, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_step(qkv, k, v, lengths, **options)
    for length in (3, 700, 1023):
        lengths.fill_(length)
        ancestors.random_(5)
        graph.replay()
        assert torch.equal(captured, decode_step(qkv, k, v, lengths, **options))
        assert not arrived.any()
