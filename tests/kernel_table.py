"""Compile every kernel ahead of time, as its launcher launches it for GPT-2's shapes.

    python tests/kernel_table.py [--json] [WORD ...]

No GPU is needed. Each case calls a launcher; the launches are recorded, not run, and each is
compiled for each chip. What is compiled is thus what is launched: types, block sizes, warps and the
alignments that Triton specialises on. WORDs choose the cases whose names hold one of them.
"""

import contextlib
import json
import sys

import torch
from kernel_reference import TARGETS, compile_for, record_launches

from nanogpt2.kernels import (
    attention,
    cross_entropy,
    decode_attention,
    gelu,
    layer_norm,
    sampling,
    softmax,
)

BF16, FP32 = torch.bfloat16, torch.float32


def new(*shape, dtype=BF16):
    """Nothing reads it: no launch runs."""
    return torch.empty(shape, dtype=dtype)


def softmax_cases():
    scores, logits = new(2, 1024, 1024), new(2, 50257)
    for x, causal, log in ((scores, True, False), (logits, False, False), (logits, False, True)):
        name = f"{'log_' if log else ''}softmax N={x.size(-1)}{' causal' if causal else ''}"
        for dtype in (BF16, FP32):
            x = x.to(dtype)
            yield f"{name} {dtype}", softmax._softmax_fwd, (x, causal, log, 1.0)
            yield f"{name} {dtype}", softmax._softmax_bwd, (x, x, causal, log, 1.0)


def layer_norm_cases():
    for N, dtype in ((768, BF16), (1600, BF16), (768, FP32)):
        x, weight, statistics = new(64, N, dtype=dtype), new(N), new(64, dtype=FP32)
        yield (
            f"layer_norm N={N} {dtype}",
            layer_norm._layer_norm_fwd,
            (x, None, weight, weight, 1e-5),
        )
        yield (
            f"layer_norm N={N} {dtype}",
            layer_norm._layer_norm_bwd,
            (x, None, x, weight, statistics, statistics),
        )
        name = f"residual_layer_norm N={N} {dtype}"
        yield name, layer_norm._layer_norm_fwd, (x, x, weight, weight, 1e-5)
        yield name, layer_norm._layer_norm_bwd, (x, x, x, weight, statistics, statistics)


def gelu_cases():
    for N, dtype in ((3072, BF16), (3072, FP32)):
        x, bias = new(64, N, dtype=dtype), new(N)
        yield f"gelu N={N} {dtype}", gelu._gelu_fwd, (x, None)
        yield f"gelu N={N} {dtype}", gelu._gelu_bwd, (x, x, None)
        yield f"bias_gelu N={N} {dtype}", gelu._gelu_fwd, (x, bias)
        yield f"bias_gelu N={N} {dtype}", gelu._gelu_bwd, (x, x, bias)


def cross_entropy_cases():
    targets, stats = new(64, dtype=torch.int64), new(64, 2, dtype=FP32)
    # the last is the buffer of linear_cross_entropy
    for N, dtype in ((50257, BF16), (50257, FP32), (50304, BF16)):
        logits, name = new(64, N, dtype=dtype), f"cross_entropy N={N} {dtype}"
        overwrite = N == 50304
        yield name, cross_entropy._losses, (logits, targets, -100, 50257, overwrite)
        inputs = (stats[0, 0], logits, targets, stats, -100, 50257)
        yield name, cross_entropy._cross_entropy_bwd, inputs


def sampling_cases():
    one, ids = new(4, dtype=torch.int64), new(4, 100, dtype=torch.int64)
    for dtype, top_k, n in ((FP32, 50, 2), (BF16, 0, 0)):
        inputs = (new(4, 50257, dtype=dtype), ids, one if n else None, one, one[0])
        name = f"sampling V=50257 {dtype} top_k={top_k} n={n}"
        yield name, sampling._sample, (*inputs, 5, 0.7, top_k, n, 50257)


def attention_cases():
    """Packed, (B, T, 3C); the second has every feature at once."""
    B, T, H, D = 2, 1024, 12, 64
    start, seed = torch.zeros(B, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    lse = new(B, H, T, dtype=FP32)
    for name, dtype, options, forms in (
        ("", BF16, (None, None, True, 0.125, 0.0), (False, True)),
        (" padded, with dropout", BF16, (start, seed, True, 0.125, 0.1), (False,)),
        ("", FP32, (None, None, True, 0.125, 0.0), (False,)),
    ):
        q, k, v = attention._split(new(B, T, 3 * H * D, dtype=dtype), H)
        o = attention._empty_like(q)
        name = f"attention D={D}{name} {dtype}"
        yield name, attention._attention_fwd, (q, k, v, o, *options)
        for deterministic in forms:
            arguments = (o, q, k, v, o, lse, q, k, v, *options, deterministic)
            yield name, attention._attention_bwd, arguments


def decode_attention_cases():
    """Five beams over one cache of 1024 positions, in one share and in eight."""
    R, H, S, D = 5, 12, 1024, 64
    for dtype, splits, shared in ((BF16, 8, True), (BF16, 1, False), (FP32, 8, False)):
        q, cache = new(R, H, 1, D, dtype=dtype), new(R, H, S, D, dtype=dtype)
        rows = torch.zeros(R, dtype=torch.int64)
        start, ancestors = (rows, torch.zeros(R, S, dtype=torch.int32)) if shared else (None, None)
        inputs = (q, cache, cache, q, rows, start, ancestors, 0.125, splits)
        name = f"decode_attention D={D} splits={splits}{' of beams' if shared else ''} {dtype}"
        yield name, decode_attention._decode_attention_fwd, inputs


CASES = [
    softmax_cases,
    layer_norm_cases,
    gelu_cases,
    cross_entropy_cases,
    sampling_cases,
    attention_cases,
    decode_attention_cases,
]


@contextlib.contextmanager
def pytorch_for(target):
    """Launchers ask torch.version.hip whose chip they launch on."""
    original = torch.version.hip
    torch.version.hip = "6.4" if target.startswith("gfx") else None
    try:
        yield
    finally:
        torch.version.hip = original


def table(words=()):
    """One dict a case, kernel and target."""
    rows = []
    for name, launcher, arguments in (case for cases in CASES for case in cases()):
        name = name.replace("torch.", "")
        if words and not any(word in name for word in words):
            continue
        for target, (_, limit) in TARGETS.items():
            with record_launches() as launches, pytorch_for(target):
                launcher(*arguments)
            for launch in launches:
                found = compile_for(
                    launch.kernel,
                    launch.signature,
                    launch.constexprs,
                    target,
                    launch.attrs,
                    **launch.options,
                )
                warps = launch.options.get("num_warps", 4)
                kernel = launch.kernel.__name__
                rows.append(
                    {"case": name, "kernel": kernel, "target": target, "warps": warps}
                    | found
                    | {"limit": limit}
                )
    return rows


if __name__ == "__main__":
    arguments = sys.argv[1:]
    rows = table([word for word in arguments if word != "--json"])
    if "--json" in arguments:
        print(json.dumps(rows))
    else:
        print("| case | kernel | target | warps | registers | spilled bytes | shared bytes |")
        print("|---|---|---|---|---|---|---|")
        for row in rows:
            print("|", " | ".join(str(v) for k, v in row.items() if k != "limit"), "|")
