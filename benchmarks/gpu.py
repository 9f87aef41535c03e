"""Compare a kernel with its peers on one GPU: check the results, time in turns, plot the roofline.

A bench yields cases. A case is one pass of one op at one shape by several arms. For every case:

1. The gate compares each arm's tensors with a float32 reference: RMS of the difference / RMS of the
   reference. If ours is wrong, the benchmark ends. A peer that is wrong or fails is left out, and
   the report gives the reason.
2. The arms take turns, in a new order every round. A write over the whole L2 precedes each arm;
   then the device sleeps until the CPU has launched all of the arm: CUDA's events measure device
   time and no launch. An arm that the longest sleep does not cover is named in the report.
3. The roof is the least time that the chip allows: the time of a copy of as many bytes, which takes
   turns with the arms, or the time of the operations at the datasheet's bf16 rate, if longer.

Without a GPU nothing is timed. `--check` runs the gate alone, at tiny shapes; without a GPU it uses
Triton's interpreter. This file does not know which op it measures.
"""

import argparse
import importlib
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter cannot multiply bfloat16
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
if DEVICE == "cpu":
    # set before triton is imported: triton reads it on import
    os.environ["TRITON_INTERPRET"] = "1"

# RMS ratio: allows a few roundings to the dtype and the sums of eager operations
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# 20 times an H100's L2; writing it takes 0.3 ms
FLUSH_BYTES = 2**30
# clock cycles: 1 ms at 2 GHz, and the longest
SLEEP, LONGEST_SLEEP = 2_000_000, 64_000_000
WARM_UP = 3
OURS = "ours"
NO_GPU = "no CUDA device"

Function = Callable[..., Any]
Arms = Mapping[str, Function | str]  # a missing arm holds the reason


@dataclass(frozen=True)
class Case:
    """One pass of one op at one shape."""

    name: str
    arms: Arms  # each returns the same tensors
    reference: Function  # the same tensors in float32
    bytes: float  # least memory traffic
    flops: float
    bounds: Mapping[str, Function] = field(default_factory=dict)  # timed, not checked


@dataclass(frozen=True)
class Row:
    """One arm's measurements: seconds at the 20th, 50th and 80th percentile, and the rest."""

    case: str
    arm: str
    low: float
    median: float
    high: float
    bandwidth: float  # bytes a second
    throughput: float  # operations a second
    share: float  # of the roof
    against_ours: float  # times as long as ours
    memory: int  # bytes at the peak, above those allocated before


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def compiled(function: Function) -> Function | str:
    """Compile with torch.compile, for one shape."""
    if DEVICE == "cpu":
        return NO_GPU
    # reset, so that earlier shapes do not count towards the recompile limit
    torch._dynamo.reset()
    # keep buffers: the backward pass is repeated on the same graph
    functorch = importlib.import_module("torch._functorch.config")
    functorch.donated_buffer = False
    return torch.compile(function, dynamic=False)


def on_gpu(function: Function) -> Function | str:
    return function if DEVICE == "cuda" else NO_GPU


def liger(module: str, name: str) -> Function | str:
    """Import a function of Liger-Kernel, e.g. ("transformers.functional", "liger_layer_norm")."""
    if DEVICE == "cpu":
        return NO_GPU
    try:
        return getattr(importlib.import_module(f"liger_kernel.{module}"), name)
    except ImportError:
        return "liger-kernel is not installed"


def _tuple(results: object) -> tuple[Tensor, ...]:
    return tuple(results) if isinstance(results, tuple | list) else (results,)


def _leaves(inputs: Sequence[object]) -> list[Any]:
    """Copy tensors and require gradients; copies, because an arm may overwrite its inputs."""
    return [
        x.detach().clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x
        for x in inputs
    ]


def _forward(function: Function, inputs: Sequence[object], grads: Sequence[Tensor]) -> Function:
    inputs = _leaves(inputs)

    def work() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return _tuple(function(*inputs))

    return work


def _both(function: Function, inputs: Sequence[object], grads: Sequence[Tensor]) -> Function:
    inputs = _leaves(inputs)
    wanted = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]

    def work() -> tuple[Tensor, ...]:
        results = _tuple(function(*inputs))
        return *results, *torch.autograd.grad(results, wanted, grads)

    return work


def _backward(function: Function, inputs: Sequence[object], grads: Sequence[Tensor]) -> Function:
    inputs, results = _leaves(inputs), []
    wanted = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]

    def work() -> tuple[Tensor, ...]:
        if not results:
            results.extend(_tuple(function(*inputs)))
        return torch.autograd.grad(results, wanted, grads, retain_graph=True)

    return work


PASSES = {"forward": _forward, "backward": _backward, "forward and backward": _both}


def passes(
    shape: str,
    functions: Arms,
    reference: Function,
    inputs: Sequence[object],
    work: Mapping[str, tuple[float, float]],
    bounds: Mapping[str, Function] | None = None,
) -> Iterator[Case]:
    """Yield a case for each pass in `work`, which gives its bytes and operations.

    Each arm's backward gets the same gradients: random, or 1 if the result is a loss.
    """
    floats = [x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    results = _forward(reference, floats, ())()
    grads = [randn(*y.shape) if y.dim() else torch.ones_like(y) for y in results]
    for kind, (size, flops) in work.items():
        make = PASSES[kind]
        arms = {
            name: f if isinstance(f, str) else make(f, inputs, grads)
            for name, f in functions.items()
        }
        expected = make(reference, floats, [grad.float() for grad in grads])
        yield Case(f"{shape}, {kind}", arms, expected, size, flops, bounds or {})


def rms_ratio(result: Tensor, reference: Tensor) -> float:
    """RMS of the difference / RMS of the reference; equal infinities do not differ."""
    assert result.shape == reference.shape, f"{[*result.shape]}, not {[*reference.shape]}"
    result, reference = result.float(), reference.float()
    same = result == reference
    difference = torch.where(same, 0.0, result - reference).pow(2).mean().sqrt()
    scale = torch.where(reference.isfinite(), reference, 0.0).pow(2).mean().sqrt()
    return (difference / torch.where(scale > 0, scale, 1.0)).item()


def gate(case: Case, tolerance: float) -> tuple[dict[str, float], dict[str, str]]:
    """Return the error of each correct arm, and the reason for leaving out each other arm.

    Raises AssertionError if ours is wrong.
    """
    expected = [x.float() for x in _tuple(case.reference())]
    errors, left_out = {}, {}
    for name, arm in case.arms.items():
        if isinstance(arm, str):
            left_out[name] = arm
            continue
        try:
            found = _tuple(arm())
            error = max(rms_ratio(x, y) for x, y in zip(found, expected, strict=True))
        except Exception as failure:
            # catch everything: any failure of a peer leaves it out; a failure of ours ends the run
            if name.startswith(OURS):
                raise
            said = str(failure).strip() or type(failure).__name__
            left_out[name] = f"failed: {said.splitlines()[0][:120]}"
            continue
        # a NaN error fails this comparison
        if error <= tolerance:
            errors[name] = error
            continue
        left_out[name] = f"wrong: RMS ratio {error:.1e}, allowed {tolerance:.0e}"
        assert not name.startswith(OURS), f"{case.name}: {name} is {left_out[name]}"
    return errors, left_out


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return fifths[0], statistics.median(samples), fifths[3]


def roof(copy: float, flops: float, peak: float) -> tuple[float, bool]:
    """Return the least seconds that the chip needs, and whether the work is memory-bound."""
    return max(copy, flops / peak), copy >= flops / peak


class Stopwatch:
    """Device seconds of some work that starts with cold caches, without the time to launch it.

    The device sleeps before the timed region. If the region began before its launches were all
    made, the sleep was too short: it doubles, for good, and the work is timed again. `uncovered`
    counts the timings that even the longest sleep did not cover; they hold launch time.
    """

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self.sleep, self.uncovered = SLEEP, 0

    def __call__(self, work: Function) -> float:
        while True:
            seconds, covered = self.time(work)
            if covered:
                return seconds
            if self.sleep == LONGEST_SLEEP:
                self.uncovered += 1
                return seconds
            self.sleep *= 2

    def time(self, work: Function) -> tuple[float, bool]:
        """Return the seconds, and whether the sleep outlasted the launches."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(self.sleep)
        begin.record()
        work()
        end.record()
        covered = not begin.query()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, covered

    def said(self) -> str:
        """Say in one sentence how launches were hidden."""
        hidden = f"The device slept {self.sleep:,} cycles before each timing to hide the launches"
        if not self.uncovered:
            return f"{hidden}; it always outlasted them."
        return f"{hidden}; in {self.uncovered} timings it did not, and these hold launch time."


def peak_memory(work: Function) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def a_copy(size: float) -> Function:
    """Return a copy that reads half of the bytes and writes the other half."""
    source = torch.empty(int(size) // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure(
    case: Case,
    names: Iterable[str],
    rounds: int,
    seconds: Callable[[Function], float],
    memory: Callable[[Function], int],
    peak: float,
) -> tuple[list[Row], dict[str, list[float]]]:
    """Time the named arms and the bounds; return a row for each, and all the samples."""
    works = {"copy": a_copy(case.bytes), **case.bounds, **{name: case.arms[name] for name in names}}
    for work in works.values():
        for _ in range(WARM_UP):
            work()
    samples = harness.turns(works, rounds, seconds)
    found = {name: quantiles(times) for name, times in samples.items()}
    least, _ = roof(found["copy"][1], case.flops, peak)
    ours = next(median for name, (_, median, _) in found.items() if name.startswith(OURS))
    rows = [
        Row(
            case.name, name, low, median, high,
            bandwidth=case.bytes / median,
            throughput=case.flops / median,
            share=least / median,
            against_ours=median / ours,
            memory=memory(works[name]),
        )
        for name, (low, median, high) in found.items()
    ]  # fmt: skip
    return rows, samples


def markdown(rows: Sequence[Row], by_memory: Mapping[str, bool]) -> str:
    header = ["case", "arm", "ms (20-80 %)", "GB/s", "TFLOP/s", "of the roof"]
    header += ["time / ours", "peak memory"]
    lines = [
        (
            row.case,
            row.arm,
            f"{1e3 * row.median:.4f} ({1e3 * row.low:.4f}-{1e3 * row.high:.4f})",
            f"{row.bandwidth / 1e9:,.0f}",
            f"{row.throughput / 1e12:,.1f}",
            f"{row.share:.0%} of {'a copy' if by_memory[row.case] else 'the peak'}",
            f"{row.against_ours:.2f}",
            f"{row.memory / 1e6:,.0f} MB",
        )
        for row in rows
    ]
    return harness.table(header, lines)


def draw(path: Path, title: str, cases: Sequence[Mapping], peak: float) -> None:
    """Plot the roofline: operations a second over operations a byte, a mark for each arm."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} was not drawn: matplotlib is not installed", file=sys.stderr)
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    bandwidth = max(
        case["bytes"] / row["median"]
        for case in cases
        for row in case["rows"]
        if row["arm"] == "copy"
    )
    intensities = [case["flops"] / case["bytes"] for case in cases]
    ends = [min(intensities) / 4, max(*intensities, peak / bandwidth) * 4]
    steps = [ends[0] * (ends[1] / ends[0]) ** (i / 100) for i in range(101)]
    axes.loglog(steps, [min(x * bandwidth, peak) / 1e12 for x in steps], "k-", label="the roof")
    arms = {row["arm"] for case in cases for row in case["rows"]}
    for arm in sorted(arms - {"copy"}, key=lambda arm: (not arm.startswith(OURS), arm)):
        marks = [
            (case["flops"] / case["bytes"], case["flops"] / row["median"] / 1e12)
            for case in cases
            for row in case["rows"]
            if row["arm"] == arm
        ]
        axes.loglog(*zip(*marks, strict=True), "o" if arm.startswith(OURS) else "x", label=arm)
    axes.set(xlabel="FLOP a byte", ylabel="TFLOP/s", title=title)
    axes.legend()
    figure.savefig(path, dpi=120)


def rig() -> dict:
    """harness.rig with the versions and the power limit that GPU timings also depend on."""
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        found = ["unknown"]
    triton = importlib.import_module("triton")
    return harness.rig("cuda", dtype=str(DTYPE), triton=triton.__version__, driver=found[0])


def main(file: str, doc: str, shapes: Mapping[str, Sequence[tuple]], cases: Function) -> None:
    """Run `python -m benchmarks.bench_<op>`: shapes["full" | "quick" | "check"], cases(*shape)."""
    title, _, about = doc.split("\n\n", 2)
    title, name = title.splitlines()[0], Path(file).stem.removeprefix("bench_")
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--check", action="store_true", help="compare results only, tiny shapes")
    parser.add_argument("--quick", action="store_true", help="few shapes; writes nothing")
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    torch.manual_seed(0)
    size = "check" if args.check else "quick" if args.quick else "full"
    chosen = (case for shape in shapes[size] for case in cases(*shape))
    if args.check:
        check(name, chosen)
    elif DEVICE == "cpu":
        print(f"{name}: not measured, {NO_GPU}; --check compares the results without one")
    else:
        run(name, title, about.strip(), chosen, args.rounds, keep=not args.quick)


def check(name: str, cases: Iterable[Case]) -> None:
    rows, left_out = [], {}
    for case in cases:
        errors, reasons = gate(case, TOLERANCE[DTYPE])
        rows += [(case.name, arm, f"{error:.1e}") for arm, error in errors.items()]
        left_out |= reasons
    print(harness.table([f"{name}: case", "arm", f"RMS ratio (<= {TOLERANCE[DTYPE]:g})"], rows))
    for arm, reason in left_out.items():
        print(f"{arm}: {reason}")


def run(name: str, title: str, about: str, cases: Iterable[Case], rounds: int, keep: bool) -> None:
    from nanogpt2.training.estimate import device_rate, measure_matmul_rate

    machine, peak = rig(), device_rate("cuda", "bfloat16")
    products = measure_matmul_rate("cuda", "bfloat16")
    stopwatch, rows, raw, left_out, by_memory = Stopwatch(), [], [], {}, {}
    for case in cases:
        print(case.name, file=sys.stderr)
        errors, reasons = gate(case, TOLERANCE[DTYPE])
        found, samples = measure(case, errors, rounds, stopwatch, peak_memory, peak.flops)
        copy = next(row.median for row in found if row.arm == "copy")
        by_memory[case.name] = roof(copy, case.flops, peak.flops)[1]
        rows += found
        left_out |= {f"{case.name}: {arm}": reason for arm, reason in reasons.items()}
        raw.append(
            {"case": case.name, "bytes": case.bytes, "flops": case.flops, "errors": errors}
            | {"rows": [asdict(row) for row in found], "seconds": samples}
        )
    notes = [
        f"The peak is {peak.flops / 1e12:,.0f} TFLOP/s ({peak.source}); products of 4096 x 4096 "
        f"reached {products / 1e12:,.0f} in this run. Median of {rounds} rounds. "
        f"{stopwatch.said()}",
        *(f"Not timed: {arm}: {reason}." for arm, reason in left_out.items()),
    ]
    body = "\n\n".join([about, markdown(rows, by_memory), *notes])
    numbers = {"cases": raw, "left_out": left_out, "peak": peak.flops, "products": products}
    numbers |= {"sleep_cycles": stopwatch.sleep, "uncovered": stopwatch.uncovered}
    harness.report(name, title, machine, body, numbers, keep)
    if keep:
        draw(harness.RESULTS / f"{name}.png", title, raw, peak.flops)
