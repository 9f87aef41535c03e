"""The kernels in the first eight minutes: correct, timed as CUDA graphs, and swept over tile sizes.

Cases, arms, bytes and operations are those of bench_OP.py. An arm is captured as one CUDA graph, so
that the time of a replay holds no time of the host; where the capture fails, its launches are timed
as they come, and the table says so. The L2 is overwritten before every call. A sweep times one pass
of one kernel with other tiles, warps or stages, and names the fastest beside the present choice.
Only tables of the source change the choice; a sweep changes nothing. Compiled peers and Liger are
left to `python -m benchmarks`. This file does not know processes and files.
"""

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks import __main__ as command
from benchmarks import gpu, harness
from nanogpt2.training import estimate

TINY = gpu.DEVICE == "cpu"
ROUNDS = 2 if TINY else 20
ROOMS = [name for name in command.names() if name in command.KERNELS]
# room -> the arguments of its bench's cases(); by default its "quick" shapes
SHAPES = {
    "attention": [(16, 12, 1024, 64), (4, 12, 4096, 64)],
    "cross_entropy": [(16384, 50257, 50257, 768)],
    "layer_norm": [(65536, 768)],
}
# the interpreter's: less than the benches' own, which also take it longer
if TINY:
    SHAPES = {"attention": [(1, 2, 17, 16)], "sampling": [(2, 61, 7)]}
DTYPES = (torch.float32,) if TINY else (torch.bfloat16, torch.float32)
LEFT_OUT = ("torch.compile", "Liger")

Found = dict[str, Any]
Patch = Callable[[], contextlib.AbstractContextManager]


def shapes_of(room: str, tiny: bool = TINY) -> list[tuple]:
    shapes = bench_of(room).SHAPES
    if tiny and not TINY:
        return shapes["check"]
    return SHAPES.get(room, shapes["check"][:1] if tiny else shapes["quick"])


def module_of(room: str) -> Any:
    return importlib.import_module(f"nanogpt2.kernels.{room}")


def bench_of(room: str) -> Any:
    return importlib.import_module(f"benchmarks.bench_{room}")


def cases_of(room: str, shape: tuple) -> Iterator[gpu.Case]:
    """The bench's cases, without the peers that take minutes to compile."""
    # a bench compiles its peer when it makes its cases
    with mock.patch.object(gpu, "compiled", lambda _: "left out"):
        for case in bench_of(room).cases(*shape):
            arms = {name: arm for name, arm in case.arms.items() if name not in LEFT_OUT}
            yield replace(case, arms=arms)


def ours_alone(case: gpu.Case) -> gpu.Case:
    arms = {name: arm for name, arm in case.arms.items() if name.startswith(gpu.OURS)}
    return replace(case, arms=arms, bounds={})


# ---- correct


def correct_case(room: str, shape: tuple, dtype: torch.dtype) -> Found:
    """RMS ratios of ours to the float32 reference. Raises AssertionError above the tolerance."""
    errors: dict[str, float] = {}
    with mock.patch.object(gpu, "DTYPE", dtype):
        for case in cases_of(room, shape):
            found, _ = gpu.gate(ours_alone(case), gpu.TOLERANCE[dtype])
            errors |= {f"{case.name}, {arm}": error for arm, error in found.items()}
    rows = [(name, f"{error:.1e}") for name, error in errors.items()]
    header = [f"{room}, {dtype}", f"RMS ratio (<= {gpu.TOLERANCE[dtype]:g})"]
    return {"errors": errors, "table": harness.table(header, rows)}


def correct_cases() -> dict[str, Callable[[], Found]]:
    return {
        f"{room} {' '.join(map(str, shape))}, {dtype}": partial(correct_case, room, shape, dtype)
        for dtype in DTYPES
        for room in ROOMS
        for shape in shapes_of(room)
    }


def tiny_cases() -> dict[str, Callable[[], Found]]:
    """Every room at a tiny size, for a sanitizer."""
    return {
        f"{room} {' '.join(map(str, shape))}": partial(correct_case, room, shape, gpu.DTYPE)
        for room in ROOMS
        for shape in shapes_of(room, tiny=True)
    }


# ---- time


def stopwatch() -> Callable[[Callable], float]:
    """Return a stopwatch: events after a flush of the L2; without a GPU the host's clock."""
    if not TINY:
        return gpu.events()

    def seconds(work: Callable) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return seconds


def graph_of(work: Callable) -> tuple[Callable, str]:
    """Return a replay of what `work` launches, and its clock; `work` itself without a graph.

    `work` has run before, on this stream, which is not the default one.
    """
    if TINY:
        return work, "no graph, interpreted"
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            # held, so that nothing else is given its memory
            results = work()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return work, f"no graph: {str(error).splitlines()[0][:80]}"

    def replay(_: object = results) -> None:
        graph.replay()

    return replay, "graph"


def timed(case: gpu.Case, names: list[str]) -> tuple[list[gpu.Row], dict[str, str]]:
    """Time the named arms and the bounds as graphs, beside a copy; return rows and clocks."""
    functions = {name: case.arms[name] for name in names}
    for work in case.bounds.values():
        # the gate has called the arms
        work()
    graphs = {name: graph_of(work) for name, work in {**functions, **case.bounds}.items()}
    arms = {name: graphs[name][0] for name in functions}
    bounds = {name: graphs[name][0] for name in case.bounds}
    memory = gpu.peak_memory if not TINY else lambda _: 0
    case = replace(case, arms=arms, bounds=bounds)
    rows, _ = gpu.measure(case, names, ROUNDS, stopwatch(), lambda _: 0, peak())
    # a replay allocates nothing: the memory is that of the arm itself
    rows = [
        replace(row, memory=memory(functions[row.arm])) if row.arm in functions else row
        for row in rows
    ]
    return rows, {name: clock for name, (_, clock) in graphs.items()}


def peak() -> float:
    return 1.0 if TINY else estimate.device_rate("cuda", "bfloat16").flops


def timed_case(room: str, shape: tuple) -> Found:
    """Gate and time every pass at this shape; return rows, clocks and the table to commit."""
    rows: list[gpu.Row] = []
    clocks, left_out, by_memory = {}, {}, {}
    for case in cases_of(room, shape):
        errors, reasons = gpu.gate(case, gpu.TOLERANCE[gpu.DTYPE])
        found, how = timed(case, list(errors))
        copy = next(row.median for row in found if row.arm == "copy")
        by_memory[case.name] = gpu.roof(copy, case.flops, peak())[1]
        rows += found
        clocks |= {f"{case.name}: {arm}": clock for arm, clock in how.items()}
        left_out |= {f"{case.name}: {arm}": reason for arm, reason in reasons.items()}
    notes = [f"{arm}: {clock}." for arm, clock in clocks.items() if clock != "graph"]
    notes += [f"Not timed: {arm}: {reason}." for arm, reason in left_out.items()]
    return {
        "rows": [asdict(row) for row in rows],
        "clocks": clocks,
        "left_out": left_out,
        "table": "\n".join([gpu.markdown(rows, by_memory), "", *notes]),
    }


# ---- sweep


@dataclass(frozen=True)
class Sweep:
    """One pass of one room at one shape, and the choices to try: label -> a patch that makes it."""

    room: str
    shape: tuple
    which: str  # the end of the case's name
    choices: dict[str, Patch]


def entry(module: Any, table: str, key: Any, values: list[tuple]) -> dict[str, Patch]:
    """Choices in a table of the source, such as attention.FORWARD; the present one first."""
    present = getattr(module, table)[key]
    return {
        str(value): partial(mock.patch.dict, getattr(module, table), {key: value})
        for value in [present, *(value for value in values if value != present)]
    }


def config(module: Any, changes: list[dict[str, int]]) -> dict[str, Patch]:
    """Changes to what the room's `_config` returns; the present choice first."""

    def patch(change: dict[str, int]) -> contextlib.AbstractContextManager:
        original = module._config
        return mock.patch.object(module, "_config", lambda *args: original(*args) | change)

    names = {"as it is": {}} | {
        ", ".join(f"{name} {value}" for name, value in change.items()): change for change in changes
    }
    return {name: partial(patch, change) for name, change in names.items()}


def constants(module: Any, names: tuple[str, ...], values: list[tuple]) -> dict[str, Patch]:
    """Choices of module constants; the present one first."""
    present = tuple(getattr(module, name) for name in names)
    return {
        str(value): partial(mock.patch.multiple, module, **dict(zip(names, value, strict=True)))
        for value in [present, *(value for value in values if value != present)]
    }


def attention_sweep(which: str, table: str, tiles: list[tuple]) -> Sweep:
    shape = shapes_of("attention")[0]
    module, key = module_of("attention"), (gpu.DTYPE.itemsize, shape[3])
    return Sweep("attention", shape, f", {which}", entry(module, table, key, tiles))


def decode_sweep(tiles: list[tuple]) -> Sweep:
    choices = entry(module_of("decode_attention"), "CONFIG", gpu.DTYPE.itemsize, tiles)
    return Sweep("decode_attention", shapes_of("decode_attention")[-1], "forward", choices)


def config_sweep(room: str, which: str, changes: list[dict[str, int]]) -> Sweep:
    shape = shapes_of(room)[0]
    if room == "cross_entropy" and not TINY:
        # fewer rows: the warm-up's processes try all the choices at once, in one GPU's memory
        shape = bench_of(room).SHAPES["quick"][0]
    return Sweep(room, shape, which, config(module_of(room), changes))


def sampling_sweep(blocks: list[tuple]) -> Sweep:
    choices = constants(module_of("sampling"), ("BLOCK_V", "NUM_WARPS"), blocks)
    return Sweep("sampling", shapes_of("sampling")[0], "forward", choices)


WARPS = [{"num_warps": warps} for warps in (2, 4, 8, 16)]
BLOCKS = [{"BLOCK_N": n, "num_warps": warps} for n in (4096, 8192, 16384) for warps in (8, 16, 32)]
FORWARD = [(128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 3), (128, 128, 8, 3), (128, 64, 8, 2)]
BACKWARD = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)]
CACHED = [(64, 4, 5), (64, 8, 3), (128, 4, 3), (128, 8, 3), (32, 4, 4)]
DRAWN = [(1024, 8), (2048, 8), (4096, 16), (4096, 32), (8192, 32)]
if TINY:
    WARPS, BLOCKS = WARPS[1:3], BLOCKS[:1]
    FORWARD, BACKWARD, CACHED, DRAWN = [(16, 16, 4, 1)], [(16, 16, 4, 1)], [(16, 4, 1)], DRAWN[:1]
# choices that a static count cannot decide; each is made where it is used, so that a change of one
# room's source costs its own sweep alone
SWEEPS: dict[str, Callable[[], Sweep]] = {
    "attention, forward": partial(attention_sweep, "forward", "FORWARD", FORWARD),
    "attention, backward": partial(attention_sweep, "backward", "BACKWARD", BACKWARD),
    "decode_attention": partial(decode_sweep, CACHED),
    "layer_norm, forward": partial(config_sweep, "layer_norm", ", forward", WARPS),
    "layer_norm, backward": partial(config_sweep, "layer_norm", ", backward", WARPS),
    "gelu, forward": partial(config_sweep, "gelu", ", forward", WARPS),
    "gelu, backward": partial(config_sweep, "gelu", ", backward", WARPS),
    "cross_entropy, one pass": partial(config_sweep, "cross_entropy", "one pass", BLOCKS),
    "softmax, forward": partial(config_sweep, "softmax", ", forward", WARPS[1:]),
    "sampling": partial(sampling_sweep, DRAWN),
}


def chosen(sweep: Sweep) -> gpu.Case:
    """The case of the sweep's pass, with ours alone."""
    found = (c for c in cases_of(sweep.room, sweep.shape) if c.name.endswith(sweep.which))
    case = ours_alone(next(found))
    return replace(case, arms={"ours": case.arms["ours"]})


def sweep_case(make: Callable[[], Sweep]) -> Found:
    """Time each choice in turns with the others; one that is wrong or fails is left out."""
    sweep = make()
    graphs, left_out = {}, {}
    for name, patch in sweep.choices.items():
        # a case of its own: an arm may overwrite its inputs
        case = chosen(sweep)
        try:
            with patch():
                gpu.gate(case, gpu.TOLERANCE[gpu.DTYPE])
                graphs[name] = graph_of(case.arms["ours"])
        except Exception as error:
            # too much shared memory, or a wrong result: other choices may do
            said = str(error).strip() or type(error).__name__
            left_out[name] = said.splitlines()[0][:120]
    works = {"copy": gpu.a_copy(case.bytes), **{name: work for name, (work, _) in graphs.items()}}
    samples = harness.turns(works, ROUNDS, stopwatch())
    medians = {name: gpu.quantiles(times)[1] for name, times in samples.items()}
    present = next(iter(sweep.choices))
    ranked = sorted(graphs, key=medians.__getitem__)
    base = medians.get(present, float("nan"))
    rows = [(n, f"{1e3 * medians[n]:.4f}", f"{medians[n] / base:.3f}") for n in [*ranked, "copy"]]
    notes = [f"Left out: {name}: {reason}." for name, reason in left_out.items()]
    return {
        "present": present,
        "fastest": ranked[0] if ranked else None,
        "medians": medians,
        "clocks": {name: clock for name, (_, clock) in graphs.items()},
        "left_out": left_out,
        "table": "\n".join([harness.table([case.name, "ms", f"/ {present}"], rows), "", *notes]),
    }


def timed_cases() -> dict[str, Callable[[], Found]]:
    """Every room at its shapes, then the sweeps."""
    rooms = {
        f"{room} {' '.join(map(str, shape))}": partial(timed_case, room, shape)
        for room in ROOMS
        for shape in shapes_of(room)
    }
    return rooms | {f"sweep {name}": partial(sweep_case, make) for name, make in SWEEPS.items()}


def sweep_once() -> dict[str, Callable[[], Found]]:
    """Each choice of each sweep, called once, so that several processes can compile them."""

    def call(sweep: Sweep, patch: Patch) -> Found:
        with patch():
            chosen(sweep).arms["ours"]()
        return {}

    found = {}
    for name, make in SWEEPS.items():
        # an error here comes again, and counts, where the sweep is timed
        with contextlib.suppress(AttributeError, KeyError):
            sweep = make()
            found |= {
                f"{name}, {each}": partial(call, sweep, p) for each, p in sweep.choices.items()
            }
    return found
