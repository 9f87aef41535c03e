"""Time the layouts of a model's matrices on this machine, once, and keep the table.

Which layout is fastest depends on the processor, on PyTorch, on the number of threads, on a
matrix's shape and on the rows. So a few of the model's own matrices are multiplied in each layout,
in less than a second, and the table of times is kept in ~/.cache/nanogpt2. A layout whose product
is not exact enough is left out. `nanogpt2 tune` prints the table and makes it anew.

A small model stays in the processor's caches, gains little and is not timed. This file does not
choose a layout: plan.py does.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt2.atomic import whole_file
from nanogpt2.cpu import malloc
from nanogpt2.cpu.prepacked import FloatLinear, Int8Linear, PrepackedLinear
from nanogpt2.cpu.processor import cache_folder, processor_name

VERSION = 1  # of the file's format and of the way to measure
ROWS = (1, 5, 64)  # a text, a few beams, a prompt
LEAST_BYTES = 2**26  # of a model's matrices: a smaller model is not timed
SAMPLE_BYTES = 7 * 2**24  # of the matrices timed, in float32: more than most caches hold
HEAD_PART = 4  # a fourth of a head's outputs stands for all of them
# int8 takes a sixteenth of these, and other memory is read before each pass: a model that is narrow
# to save memory must not take much of it for being timed
INT8_PART = 16
PASSES = 2
TOLERANCE = 1e-5  # RMS of the error / RMS of the result; float32 sums in another order


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one matrix in one layout."""

    rows: dict[int, float]  # of one product, for each number of ROWS
    lay_out: float  # of laying it out


Shape = tuple[int, int]
Table = dict[Shape, dict[str, Timing]]


def table_for(
    products: Sequence[PrepackedLinear], anew: bool = False, passes: int = PASSES
) -> Table | None:
    """Return the times of these matrices' layouts, measured here unless the cache has them.

    None for a model too small to gain, unless `nanogpt2 tune` was run for it. anew: measure in any
    case, by this number of passes.
    """
    key = _key(products)
    name = f"layouts-{sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    folder = cache_folder()
    if not anew:
        table = _measured.get(name) or (folder and _read(folder / name, key))
        if table:
            return table
        # int8 made on loading is laid out already: only a copy of it could be timed
        if sum(map(_bytes, products)) < LEAST_BYTES or not _untouched(products):
            return None
    busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1)
    # a busy machine's table serves this process alone
    _measured[name] = table = measure(products, passes)
    if folder and (anew or not busy):
        _write(folder / name, key, table)
    return table


_measured: dict[str, Table] = {}  # by the files' names


@torch.inference_mode()
def measure(products: Sequence[PrepackedLinear], passes: int = PASSES) -> Table:
    """Time every layout of every shape; leave out those whose product is wrong.

    products: in the order of their use. The sample goes through its matrices in this order, so
    that each is read from memory, not from a cache. A layout takes turns with the usual one: a
    machine's speed changes from second to second, and the ratio of the two hardly does.
    """
    untouched = _untouched(products) or products
    makers = _sample(untouched)
    base = [make() for make in makers]
    flush = _to_flush(untouched)
    usual = {product.usual for product in base}
    _lay_out(base, *usual)
    least: dict[Shape, dict[int, float]] = {}
    ratios: dict[str, dict[Shape, dict[int, float]]] = {}
    costs: dict[str, dict[Shape, float]] = {}
    for name in dict.fromkeys(name for p in products for name in p.layouts if name not in usual):
        other = [make() for make in makers]
        costs[name] = _lay_out(other, name)
        exact = {p.shape: _is_exact(b, p) for b, p in zip(base, other, strict=True)}
        for rows in ROWS:
            before, found = _times(base, other, rows, passes, flush)
            for shape in (shape for shape, is_exact in exact.items() if is_exact):
                ratio = found[shape] / before[shape]
                ratios.setdefault(name, {}).setdefault(shape, {})[rows] = ratio
                of_shape = least.setdefault(shape, {})
                of_shape[rows] = min(before[shape], of_shape.get(rows, before[shape]))
        del other
        malloc.return_free()
    del base
    malloc.return_free()
    (first,) = usual
    table: Table = {}
    for product in products:
        part = _part(product)
        shape = (product.shape[0] // part, product.shape[1])
        if product.shape in table or shape not in least:
            continue
        times = {rows: part * ms for rows, ms in least[shape].items()}
        table[product.shape] = {first: Timing(times, 0.0)}
        for name, found_ratios in ratios.items():
            if shape in found_ratios and name in product.layouts:
                scaled = {n: times[n] * ratio for n, ratio in found_ratios[shape].items()}
                table[product.shape][name] = Timing(scaled, part * costs[name][shape])
    return table


def _lay_out(products: Sequence[PrepackedLinear], name: str) -> dict[Shape, float]:
    """Lay out all; return the milliseconds that the last of each shape took."""
    taken = {}
    for product in products:
        start = time.perf_counter()
        product.lay_out(name)
        taken[product.shape] = (time.perf_counter() - start) * 1e3
    return taken


def _times(
    base: Sequence[PrepackedLinear],
    other: Sequence[PrepackedLinear],
    rows: int,
    passes: int,
    flush: Sequence[Tensor],
) -> tuple[dict[Shape, float], dict[Shape, float]]:
    """Return the milliseconds of one product of each shape on both sides: each a pass's least.

    flush: read before each pass, so that caches hold nothing of the matrices.
    """
    if rows == ROWS[-1]:
        # many rows take long and read little memory: one matrix of a shape and few passes do
        base, other = ([*{p.shape: p for p in side}.values()] for side in (base, other))
        passes = max(1, passes // 5)
    inputs = {K: torch.linspace(-1, 1, rows * K).view(rows, K) for _, K in (p.shape for p in base)}
    count = Counter(p.shape for p in base)
    least: list[dict[Shape, float]] = [{}, {}]
    for _ in range(passes):
        for side, products in enumerate((base, other)):
            for weight in flush:
                weight.sum()
            taken: Counter[Shape] = Counter()
            for product in products:
                x = inputs[product.shape[1]]
                start = time.perf_counter()
                product(x)
                taken[product.shape] += time.perf_counter() - start  # type: ignore[assignment]
            for shape, seconds in taken.items():
                ms = seconds / count[shape] * 1e3
                least[side][shape] = min(ms, least[side].get(shape, ms))
    return least[0], least[1]


def _is_exact(usual: PrepackedLinear, other: PrepackedLinear) -> bool:
    """Compare two layouts of a matrix, on usual inputs and on the largest."""
    K = usual.shape[1]
    x = torch.stack([torch.linspace(-3, 2, K).sin(), (torch.arange(K) % 2).float()])
    for rows in x.split(1):
        expected, found = usual(rows), other(rows)
        if not (found - expected).norm() <= TOLERANCE * expected.norm():
            return False
    return True


def _sample(products: Sequence[PrepackedLinear]) -> list[Callable[[], PrepackedLinear]]:
    """Choose the first matrices and the largest; return functions that make a layer of each."""
    sample: list[Callable[[], PrepackedLinear]] = []
    size = 0
    is_float = isinstance(products[0], FloatLinear)
    most = SAMPLE_BYTES if is_float else SAMPLE_BYTES // INT8_PART
    for product in products:
        if size < most or _part(product) > 1:
            sample.append(partial(_make, product))
            size += _bytes(product)
    return sample


def _untouched(products: Sequence[PrepackedLinear]) -> list[PrepackedLinear]:
    """Return those whose weight can be read without a copy: int8's have no layout yet."""
    return [p for p in products if isinstance(p, FloatLinear) or p.layout is None]


def _to_flush(products: Sequence[PrepackedLinear]) -> list[Tensor]:
    """Return int8's weights as whole numbers; nothing for float32, whose sample is large."""
    weights = [p.stored()[""].flatten() for p in products if isinstance(p, Int8Linear)]
    return [weight[: len(weight) // 8 * 8].view(torch.int64) for weight in weights]


def _make(product: PrepackedLinear) -> PrepackedLinear:
    """Make a layer of a product's weight, or of a part of it, without a bias."""
    stored = product.stored()
    weight = stored.pop("")
    weight = weight[: len(weight) // _part(product)]
    if isinstance(product, Int8Linear):
        (scale,) = stored.values()
        return type(product)(weight, scale[: len(weight)], None)
    return FloatLinear(weight, None)


def _part(product: PrepackedLinear) -> int:
    """Return the divisor of the outputs to time: a head's are many."""
    part = HEAD_PART if isinstance(product, FloatLinear) else INT8_PART
    return part if product.shape[0] > part * 4 * product.shape[1] else 1


def _bytes(product: PrepackedLinear) -> int:
    N, K = product.shape
    return N * K * (1 if isinstance(product, Int8Linear) else 4)


# ---- the file


def _key(products: Sequence[PrepackedLinear]) -> dict[str, Any]:
    """Describe everything that the times depend on."""
    return {
        "version": VERSION,
        "torch": torch.__version__,
        "processor": processor_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "products": _fingerprint(),
        "threads": torch.get_num_threads(),
        "kinds": sorted({type(p).__name__ for p in products}),
        "shapes": sorted({(*p.shape, len(p.layouts)) for p in products}),
    }


def _fingerprint() -> str:
    """Digest a product's last bits, which tell the instructions that oneDNN may use here."""
    x = torch.linspace(-1, 1, 5 * 771).sin().view(5, 771)
    weight = torch.linspace(-2, 3, 67 * 771).cos().view(67, 771)
    return sha256(FloatLinear(weight, None)(x).numpy().tobytes()).hexdigest()[:12]


def _read(path: Path, key: dict[str, Any]) -> Table | None:
    """Read a table. None where it is missing, damaged or another key's."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] != json.loads(json.dumps(key)):
            return None
        table = dict(_entries(stored["times"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    timings = [t for layouts in table.values() for t in layouts.values()]
    return table if all(sorted(t.rows) == [*ROWS] for t in timings) else None


def _entries(times: list[Any]) -> Iterator[tuple[Shape, dict[str, Timing]]]:
    for N, K, layouts in times:
        yield (
            (N, K),
            {
                name: Timing(
                    {int(n): float(ms) for n, ms in t["rows"].items()}, float(t["lay_out"])
                )
                for name, t in layouts.items()
            },
        )


def _write(path: Path, key: dict[str, Any], table: Table) -> None:
    """Keep a table; a folder that cannot be written keeps none."""
    times = [
        [*shape, {name: {"rows": t.rows, "lay_out": t.lay_out} for name, t in layouts.items()}]
        for shape, layouts in table.items()
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            partial.write_text(json.dumps({"key": key, "times": times}, indent=1), encoding="utf-8")
    except OSError:
        return
