"""Compile every kernel ahead of time, as its launcher launches it for GPT-2's shapes.

    python tests/kernel_table.py [--json] [--chips sm_90,gfx942] [WORD ...]

No GPU is needed. Each case calls a launcher; the launches are recorded, not run, and each is
compiled for each chip. What is compiled is thus what is launched: types, block sizes, warps and the
alignments that Triton specialises on. WORDs choose the cases whose names hold one of them.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from kernel_reference import TARGETS, compile_for, distance, record_launches

from nanogpt2.kernels import (
    attention,
    cross_entropy,
    decode_attention,
    decode_linear,
    gelu,
    layer_norm,
    sampling,
    softmax,
)

BF16, FP32 = torch.bfloat16, torch.float32
# the kernels whose instructions are counted
MEASURED = {
    "_attention_fwd_kernel",
    "_attention_bwd_kernel",
    "_attention_bwd_dq_kernel",
    "_softmax_fwd_kernel",
    "_softmax_bwd_kernel",
    "_cross_entropy_fwd_kernel",
    "_cross_entropy_bwd_kernel",
    "_layer_norm_fwd_kernel",
    "_layer_norm_bwd_kernel",
    "_layer_norm_sum_kernel",
    "_gelu_fwd_kernel",
    "_gelu_bwd_kernel",
}
COLUMNS = {
    "case": "case",
    "kernel": "kernel",
    "target": "target",
    "warps": "warps",
    "registers": "registers",
    "spills": "spilled bytes",
    "shared": "shared bytes",
    "programs": "programs an SM",
    "slots": "issue slots",
    "ahead": "loads ahead",
}
# counts that switch something off
OFF = {"SPLITS": 1, "NGRAM": 0, "ENDS": 0}


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
            (x, None, weight, weight, 1e-5, None),
        )
        yield (
            f"layer_norm N={N} {dtype}",
            layer_norm._layer_norm_bwd,
            (x, None, x, weight, statistics, statistics, None),
        )
        name = f"residual_layer_norm N={N} {dtype}"
        yield name, layer_norm._layer_norm_fwd, (x, x, weight, weight, 1e-5, None)
        yield name, layer_norm._layer_norm_bwd, (x, x, x, weight, statistics, statistics, None)
    # under autocast: a branch in bf16, the residual stream in fp32
    branch, x, weight = new(64, 768), new(64, 768, dtype=FP32), new(768, dtype=FP32)
    statistics, name = new(64, dtype=FP32), "residual_layer_norm N=768 autocast"
    yield name, layer_norm._layer_norm_fwd, (branch, x, weight, weight, 1e-5, BF16)
    yield name, layer_norm._layer_norm_bwd, (branch, x, x, weight, statistics, statistics, BF16)


def gelu_cases():
    for N, dtype in ((3072, BF16), (3072, FP32)):
        x, bias = new(64, N, dtype=dtype), new(N)
        yield f"gelu N={N} {dtype}", gelu._gelu_fwd, (x, None)
        yield f"gelu N={N} {dtype}", gelu._gelu_bwd, (x, x, None)
        yield f"bias_gelu N={N} {dtype}", gelu._gelu_fwd, (x, bias)
        yield f"bias_gelu N={N} {dtype}", gelu._gelu_bwd, (x, x, bias)


def cross_entropy_cases():
    """The ignored index is a number at run time: every row has it."""
    targets, stats = new(64, dtype=torch.int64), new(64, 2, dtype=FP32)
    for N, dtype in ((50257, BF16), (50257, FP32), (50304, BF16)):
        logits, padded = new(64, N, dtype=dtype), " padded vocabulary" if N > 50257 else ""
        name = f"cross_entropy N={N}{padded} {dtype}"
        yield name, cross_entropy._losses, (logits, targets, -100, 50257, False)
        inputs = (stats[0, 0], logits, targets, stats, -100, 50257)
        yield name, cross_entropy._cross_entropy_bwd, inputs
    # the buffer of linear_cross_entropy
    inputs = (logits, targets, -100, 50257, True)
    yield f"cross_entropy in place N={N}{padded} {dtype}", cross_entropy._losses, inputs


def texts(R, T=1024):
    """Ids and, for each row, one of every number that sampling reads."""
    one = new(R, dtype=torch.int64)
    return new(R, T, dtype=torch.int64), one, one, one, one


def sampling_cases():
    """One row and eight of the head, a batch of logits, and every way to choose."""
    V = 50257
    everything = sampling.Options(True, 0.7, 50, 0.9, 1.3, 2, 5)
    top_k, top_p = sampling.Options(True, 0.7, 50), sampling.Options(True, top_p=0.9)
    greedy, noise = sampling.Options(), sampling.Options(True)
    for name, R, dtype, options in (
        (" greedy", 1, BF16, greedy),
        (" noise", 1, BF16, noise),
        (" penalty, n-gram ban", 1, BF16, everything),
        (" penalty, n-gram ban", 8, BF16, everything),
        (" greedy", 5, FP32, greedy),
    ):
        inputs = (new(R, 768, dtype=dtype), new(V, 768, dtype=dtype), *texts(R))
        name = f"sampling head V={V} R={R}{name} {dtype}"
        yield name, sampling._head_fwd, (*inputs, *sampling._first_options(options))
    for name, dtype, options in (
        (" penalty, n-gram ban", FP32, everything),
        (" noise", BF16, noise),
    ):
        inputs = (new(4, V, dtype=dtype), *texts(4), *sampling._first_options(options), V)
        yield f"sampling candidates V={V}{name} {dtype}", sampling._candidates_fwd, inputs
    for name, options, mask, ends_step in (
        (" greedy, end of a step", greedy, False, True),
        (" top-k, end of a step", top_k, False, True),
        (" noise", noise, False, False),
        (" top-p", top_p, True, False),
        (" top-k, top-p", everything, True, False),
    ):
        blocks = -(-V // sampling.HEAD_BLOCK)
        yield (
            f"sampling draw V={V}{name}",
            sampling._draw_fwd,
            drawn(V, blocks, options, mask, ends_step),
        )


def drawn(V, blocks, options, mask, ends_step):
    """Arguments of _draw_fwd for one row."""
    ids, one, *_ = texts(1)
    o = options
    chosen = (one, one, o.seed, o.do_sample, o.top_k, o.top_p, mask)
    rest = (None, None, 0, None, None, None, None)
    if ends_step:
        whole = new(1, dtype=torch.int32)
        rest = (new(1, dtype=torch.bool), one, 0, ids, one, whole, whole)
    return new(1, V, dtype=FP32), new(1, blocks, dtype=FP32), *chosen, *rest


def decode_linear_cases():
    """The products of a step of the 124M, one row and eight; of the XL, whose K is longer."""
    every = [BF16, FP32]
    for R, N, K, normed, dtypes in (
        (1, 2304, 768, True, every),
        (1, 768, 768, False, every),
        (1, 3072, 768, True, every),
        (1, 768, 3072, False, every),
        (8, 2304, 768, True, every),
        (8, 768, 3072, False, every),
        (1, 4800, 1600, True, [BF16]),
        (8, 1600, 6400, False, [BF16]),
    ):
        for dtype in dtypes:
            norm = new(K, dtype=dtype) if normed else None
            bias, residual = new(N, dtype=dtype), None if normed else new(R, N, dtype=dtype)
            inputs = (new(R, K, dtype=dtype), new(N, K, dtype=dtype), bias, norm, norm, 1e-5)
            name = f"decode_linear N={N} K={K} R={R}{' norm' if normed else ''} {dtype}"
            yield name, decode_linear._decode_linear_fwd, (*inputs, N == 3072, residual, None)
    inputs = (new(2, 40), new(30, 40), None, None, None, 1e-5, False, None, None)
    yield "decode_linear without bias", decode_linear._decode_linear_fwd, inputs
    tokens, table = new(2, dtype=torch.int64), new(1024, 768)
    for start in (None, tokens):
        name = f"decode_embed{' padded' if start is not None else ''}"
        yield name, decode_linear._decode_embed_fwd, (tokens, tokens, table, table, start)


def attention_cases():
    """Packed, (B, T, 3C). D = 64, which is GPT-2's, goes to every chip, all else to one."""
    B, T, H = 2, 1024, 12
    start, seed = torch.zeros(B, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    causal, padded = (None, None, True, 0.125, 0.0), (start, None, True, 0.125, 0.0)
    dropped = (start, seed, True, 0.125, 0.1)
    everything = "padded, dropout"
    rows = [
        (64, "", BF16, causal, TARGETS),
        (64, everything, BF16, dropped, TARGETS),
        (64, "", FP32, causal, TARGETS),
        (64, "padded", BF16, padded, TARGETS),
        (64, "not causal", BF16, (None, None, False, 0.125, 0.0), TARGETS),
    ]
    for D in (16, 32, 128):
        rows += [(D, "", BF16, causal, ["sm_90"]), (D, everything, BF16, dropped, ["sm_90"])]
    for D, name, dtype, options, targets in rows:
        q, k, v = attention._split(new(B, T, 3 * H * D, dtype=dtype), H)
        o, lse = attention._empty_like(q), new(B, H, T, dtype=FP32)
        name = f"attention D={D} {name} {dtype}".replace("  ", " ")
        yield name, attention._attention_fwd, (q, k, v, o, *options), targets
        arguments = (o, q, k, v, o, lse, q, k, v, *options)
        yield name, attention._attention_bwd, (*arguments, False), targets
        name = name.replace(f"D={D}", f"D={D} deterministic")
        yield name, attention._attention_bwd, (*arguments, True), targets


def decode_attention_cases():
    """Five beams over one cache of 1024 positions, in one share and in more."""
    R, H, S = 5, 12, 1024
    rows, table = torch.zeros(R, dtype=torch.int64), torch.zeros(R, S, dtype=torch.int32)
    for D, dtype, splits, name, start, ancestors, targets in (
        (64, BF16, 8, " padded, ancestor table", rows, table, TARGETS),
        (64, BF16, 1, "", None, None, TARGETS),
        (64, FP32, 8, "", None, None, TARGETS),
        # the most that the joining kernel holds
        (128, BF16, 128, "", None, None, ["sm_90"]),
        (16, BF16, 8, "", None, None, ["sm_90"]),
        (32, BF16, 8, "", None, None, ["sm_90"]),
    ):
        q, cache = new(R, H, 1, D, dtype=dtype), new(R, H, S, D, dtype=dtype)
        inputs = (q, cache, cache, q, rows, start, ancestors, 0.125, splits)
        name = f"decode_attention D={D} splits={splits}{name} {dtype}"
        yield name, decode_attention._decode_attention_fwd, inputs, targets


def decode_step_cases():
    """One row of the 124M, in one share and in more, and five beams."""
    H, S = 12, 1024
    for D, dtype, R, splits, beams, targets in (
        (64, BF16, 1, 1, False, TARGETS),
        (64, BF16, 1, 16, False, TARGETS),
        (64, BF16, 5, 4, True, TARGETS),
        (64, FP32, 5, 4, True, TARGETS),
        (128, BF16, 1, 64, True, ["sm_90"]),
        (32, BF16, 1, 8, True, ["sm_90"]),
        (16, BF16, 1, 8, True, ["sm_90"]),
    ):
        rows, cache = torch.zeros(R, dtype=torch.int32), new(R, H, S, D, dtype=dtype)
        start, table = (rows, torch.zeros(R, S, dtype=torch.int32)) if beams else (None, None)
        inputs = (new(R, 3 * H * D, dtype=dtype), cache, cache, rows, start, table, splits, None)
        name = f"decode_step D={D} R={R} splits={splits}{' beams' if beams else ''} {dtype}"
        yield name, decode_attention._decode_step_fwd, inputs, targets


def ones_cases():
    """Sizes of 1, which Triton takes for constants: what the interpreter cannot show."""
    targets, name = ["sm_90"], "sizes of 1"
    x, statistic, one = new(1, 1), new(1, dtype=FP32), new(1, dtype=torch.int64)
    yield name, softmax._softmax_fwd, (x, True, False, 1.0), targets
    yield name, softmax._softmax_bwd, (x, x, True, False, 1.0), targets
    yield name, layer_norm._layer_norm_fwd, (x, x, x[0], x[0], 1e-5, None), targets
    yield name, layer_norm._layer_norm_bwd, (x, x, x, x[0], statistic, statistic, None), targets
    yield name, gelu._gelu_fwd, (x, x[0]), targets
    yield name, gelu._gelu_bwd, (x, x, x[0]), targets
    yield name, cross_entropy._losses, (x, one, -100, 1, True), targets
    inputs = (statistic[0], x, one, new(1, 2, dtype=FP32), 1, 1)
    yield name, cross_entropy._cross_entropy_bwd, inputs, targets
    options = sampling.Options(True, 1.0, 1, 0.5, 2.0, 1, 1)
    first = (*texts(1, 1), *sampling._first_options(options))
    yield name, sampling._candidates_fwd, (x, *first, 1), targets
    yield name, sampling._head_fwd, (x, x, *first), targets
    yield name, sampling._draw_fwd, drawn(1, 1, options, True, True), targets
    yield (
        name,
        decode_linear._decode_linear_fwd,
        (x, x, x[0], x[0], x[0], 1e-5, True, x, None),
        targets,
    )
    yield name, decode_linear._decode_embed_fwd, (one, one, x, x, one), targets
    q = new(1, 1, 1, 16)
    for start, causal in ((None, True), (one, False)):
        options, lse = (start, None, causal, 1.0, 0.0), new(1, 1, 1, dtype=FP32)
        yield name, attention._attention_fwd, (q, q, q, q, *options), targets
        arguments = (q, q, q, q, q, lse, q, q, q, *options)
        for deterministic in (False, True):
            yield name, attention._attention_bwd, (*arguments, deterministic), targets
    for splits in (1, 2):
        inputs = (q, q, q, q, one, one, one[None], 1.0, splits)
        yield name, decode_attention._decode_attention_fwd, inputs, targets
        inputs = (new(1, 48), q, q, one, one, one[None], splits, None)
        yield name, decode_attention._decode_step_fwd, inputs, targets


def growing_cases():
    """A step's launches, for texts and caches of unlike lengths: no length is a constant."""
    H, D, V = 12, 64, 50257
    everything = sampling.Options(True, 0.7, 50, 0.9, 1.3, 2, 5)
    first = sampling._first_options(everything)
    for T in (2, 15, 16, 17, 1023, 1024):
        yield "head", sampling._head_fwd, (new(1, 768), new(V, 768), *texts(1, T), *first)
        yield "candidates", sampling._candidates_fwd, (new(1, V), *texts(1, T), *first, V)
        scores, best, *chosen = drawn(V, 99, everything, False, True)
        chosen[-4] = new(1, T, dtype=torch.int64)
        yield "draw", sampling._draw_fwd, (scores, best, *chosen)
        rows, table = new(1, dtype=torch.int32), new(1, T, dtype=torch.int32)
        cache = new(1, H, T, D)
        inputs = (new(1, 3 * H * D), cache, cache, rows, rows, table, 4, None)
        yield "decode_step", decode_attention._decode_step_fwd, inputs
        q = new(1, H, 1, D)
        inputs = (q, cache, cache, q, rows, rows, table, 0.125, 4)
        yield "decode_attention", decode_attention._decode_attention_fwd, inputs


def variants(cases):
    """{kernel: how many variants the cases' launches make Triton compile}."""
    found = {}
    for _, launcher, arguments in cases:
        with record_launches() as launches:
            launcher(*arguments)
        for launch in launches:
            variant = str((launch.signature, launch.constexprs, launch.attrs, launch.options))
            found.setdefault(launch.kernel.__name__, set()).add(variant)
    return {kernel: len(seen) for kernel, seen in found.items()}


CASES = [
    ones_cases,
    softmax_cases,
    layer_norm_cases,
    gelu_cases,
    cross_entropy_cases,
    sampling_cases,
    attention_cases,
    decode_attention_cases,
    decode_step_cases,
    decode_linear_cases,
]


@contextlib.contextmanager
def pytorch_for(target):
    """Launchers ask PyTorch which chip they launch on."""
    original = torch.version.hip, torch.cuda.get_device_capability
    torch.version.hip = "6.4" if target.startswith("gfx") else None
    arch = TARGETS[target][0].arch
    torch.cuda.get_device_capability = lambda device: divmod(arch, 10)
    try:
        yield
    finally:
        torch.version.hip, torch.cuda.get_device_capability = original


def record(words=(), chips=tuple(TARGETS)):
    """(name of the case, target, launch) of every launch of every case, for these chips."""
    for name, launcher, arguments, *targets in (case for cases in CASES for case in cases()):
        name = name.replace("torch.", "")
        if words and not any(word in name for word in words):
            continue
        for target in chips:
            if targets and target not in targets[0]:
                continue
            with record_launches() as launches, pytorch_for(target):
                launcher(*arguments)
            for launch in launches:
                yield name, target, launch


def choices(launch):
    """Whether each compile-time choice is on, and each tensor that may be None is there."""
    found = {
        name: True
        for name, kind in launch.signature.items()
        if kind.startswith(("*", "tensordesc"))
    }
    for name, value in launch.constexprs.items():
        if name in OFF:
            found[name] = value > OFF[name]
        elif value is None or type(value) is bool:
            found[name] = bool(value)
    return found


def hot_loops(sass, kernel):
    """[first, end) of the loops where a kernel spends its time; the whole of one without loops.

    Attention: of the loops with products the shortest, which masks nothing. Row kernels: a sweep
    takes large blocks, then small ones, so a loop counts that has as many exponentials as any.
    """
    if not sass.loops:
        return [(0, len(sass.lines))]
    if "attention" in kernel:
        products = [loop for loop in sass.loops if sass.count("H", "UTCH", within=loop)]
        return [min(products or sass.loops, key=lambda loop: loop[1] - loop[0])]
    work = [sass.count("MUFU", within=loop) or 0 for loop in sass.loops]
    if max(work) < 8:
        work = [end - first for first, end in sass.loops]
    return [loop for loop, n in zip(sass.loops, work, strict=True) if n >= 0.8 * max(work)]


def issue(sass, kernel, constexprs, warps):
    """{"slots", "ahead"}: instructions issued for a unit of work, and how far loads are ahead.

    slots: attention, cycles that a quarter of an SM issues for 64 x 64 scores; row kernels,
    instructions a thread issues for one element. ahead: tiles under way when the hot loop begins
    (by descriptor), groups of tiles still under way when it goes on (by address), or instructions
    between a load and its first use.
    """
    loops = hot_loops(sass, kernel)
    count = sum(end - first for first, end in loops)
    sizes = [constexprs[name] for name in ("BLOCK_M", "BLOCK_P", "BLOCK_N") if name in constexprs]
    first, end = loops[0]
    if "attention" in kernel and len(sizes) == 2:
        slots = count * warps / 4 / (math.prod(sizes) / 4096)
    else:
        slots = count * 32 * warps / math.prod(sizes)
    before = max((b for _, b in sass.loops if b <= first), default=0)
    waits = [
        int(found[1])
        for line in sass.lines[first:end]
        if (found := re.search(r"DEPBAR\.LE SB0, 0x(\w+)", line))
    ]
    ahead = sass.count("UTMALDG", within=(before, first)) or min(waits, default=None)
    if ahead is None and sass.loops:
        ahead = distance(sass.lines[first:end])
    return {"slots": round(slots, 1), "ahead": ahead}


def programs(registers, shared, warps, target):
    """How many programs an SM of NVIDIA's holds at once."""
    # registers are given out by eights a thread, 256 a warp; a program costs 1 KB of shared memory
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    by_memory = {"sm_80": 164, "sm_90": 228, "sm_100": 228}[target] * 1024 // (shared + 1024)
    return min(by_registers, by_memory, 64 // warps, 32)


def compiled(case):
    """One dict for what `record` yields."""
    name, target, launch = case
    found = compile_for(
        launch.kernel,
        launch.signature,
        launch.constexprs,
        target,
        launch.attrs,
        **launch.options,
    )
    kernel, warps, sass = (
        launch.kernel.__name__,
        launch.options.get("num_warps", 4),
        found.pop("sass"),
    )
    if sass is not None:
        found["programs"] = programs(found["registers"], found["shared"], warps, target)
        if kernel in MEASURED:
            found |= issue(sass, kernel, launch.constexprs, warps)
    return {
        "case": name,
        "kernel": kernel,
        "target": target,
        "warps": warps,
        **found,
        "limit": TARGETS[target][1],
        "on": choices(launch),
    }


def table(words=(), chips=tuple(TARGETS)):
    """One dict a case, kernel and target; ptxas, which takes the most time, runs beside Python."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, list(record(words, chips))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="only cases with one of these")
    parser.add_argument("--chips", default=",".join(TARGETS), help="by default %(default)s")
    parser.add_argument("--json", action="store_true", help="the rows as one JSON list")
    parser.add_argument("--growing", action="store_true", help="only count variants, as JSON")
    arguments = parser.parse_args()
    if arguments.growing:
        print(json.dumps(variants(growing_cases())))
        sys.exit()
    rows = table(arguments.words, arguments.chips.split(","))
    if arguments.json:
        print(json.dumps(rows))
    else:
        print("|", " | ".join(COLUMNS.values()), "|")
        print("|---" * len(COLUMNS) + "|")
        for row in rows:
            print("|", " | ".join(str(row.get(name, "")) for name in COLUMNS), "|")
