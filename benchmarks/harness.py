"""Compare arms fairly: check their results, then time them in turns.

An arm is a name and a function that does the work once. All arms take turns within one run, in a
new order every round, so other load on the machine affects all arms alike. Reports give the median
of the rounds with the least and the most, and every ratio names the arm that it is against. Peak
memory is measured separately, each arm in its own process.

This file does not know the work of the arms.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one arm's work over all rounds.

    Other programs on the machine prolong wall time, but hardly CPU time. CPU times are comparable
    between single-threaded runs.
    """

    median: float
    least: float
    most: float
    rounds: int
    cpu: float  # median CPU seconds of all threads


def assert_equal(found: Mapping[str, Sequence[float]], against: str, tolerance: float) -> float:
    """Compare every arm's numbers with those of `against`; return the largest relative difference.

    Raises AssertionError above the tolerance: arms with different results are not worth timing.
    """
    largest = 0.0
    for name, numbers in found.items():
        for n, (a, b) in enumerate(zip(numbers, found[against], strict=True)):
            largest = max(largest, abs(a - b) / abs(b))
            assert abs(a - b) <= tolerance * abs(b), f"{name}: number {n} is {a}, not {b}"
    return largest


def turns(
    arms: Mapping[str, Work], rounds: int, measure: Callable[[Work], Any]
) -> dict[str, list[Any]]:
    """Measure each arm once a round, in a new random order every round; return the samples."""
    samples: dict[str, list[Any]] = {name: [] for name in arms}
    order, rng = list(arms), random.Random(0)
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            samples[name].append(measure(arms[name]))
    return samples


def interleave(
    arms: Mapping[str, Work], rounds: int = 5, synchronize: Work = lambda: None
) -> dict[str, Timing]:
    """Time each arm once a round, in a new random order; the caller has warmed up the arms."""

    def seconds(work: Work) -> tuple[float, float]:
        synchronize()
        started, used = time.perf_counter(), time.process_time()
        work()
        synchronize()
        return time.perf_counter() - started, time.process_time() - used

    timings = {}
    for name, pairs in turns(arms, rounds, seconds).items():
        clock, cpu = zip(*pairs, strict=True)
        median = statistics.median(clock)
        timings[name] = Timing(median, min(clock), max(clock), rounds, statistics.median(cpu))
    return timings


def memory_of_this_process() -> tuple[int, int]:
    """Return the bytes resident now, and the peak so far.

    Reads /proc, because getrusage's peak includes that of the parent process.
    """
    status = Path("/proc/self/status").read_text()
    now, most = (int(status.partition(f"{key}:")[2].split()[0]) for key in ("VmRSS", "VmHWM"))
    return 1024 * now, 1024 * most


def in_a_process(module: str, *arguments: str) -> dict:
    """Run one of our modules in its own process; return the JSON object on its last line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        check=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def rig(device: str = "cpu", **more: object) -> dict:
    """Describe the machine, versions and commit of a measurement."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "features": features(),
        "products": torch.backends.cpu.get_cpu_capability(),
        "reads": f"{read_bandwidth() / 1e9:.0f} GB/s",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "commit": commit.stdout.strip() + ("+" if changed.stdout else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **more,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo").read_text()
    models = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    wide = "AVX-512" if "avx512f" in info else "AVX2" if "avx2" in info else "no AVX2"
    return f"{models[0] if models else platform.machine()} ({wide})"


FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile")


def features() -> str:
    """The instructions that matter here and that this processor has."""
    info = Path("/proc/cpuinfo").read_text().split()
    return " ".join(name for name in FEATURES if name in info) or "none"


def is_held_to_avx2() -> bool:
    """True where a processor with AVX-512 is held to AVX2 by ATEN_CPU_CAPABILITY."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and "avx512f" in features()


@cache
def _large() -> torch.Tensor:
    return torch.ones(2**26)


def read_bandwidth(passes: int = 5) -> float:
    """Bytes a second that all threads read, the best of some passes over 256 MiB."""
    large, best = _large(), float("inf")
    for _ in range(passes):
        started = time.perf_counter()
        large.sum()
        best = min(best, time.perf_counter() - started)
    return large.numel() * large.element_size() / best


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(timing: Timing) -> str:
    return f"{timing.median:.3f} ({timing.least:.3f}-{timing.most:.3f})"


def report(name: str, title: str, rig: Mapping, body: str, raw: Mapping, keep: bool = True) -> None:
    """Print the report, then one JSON object; with `keep` also write results/NAME.md and .json."""
    facts = ", ".join(f"{key} {value}" for key, value in rig.items())
    page = f"# {title}\n\nRig: {facts}.\n\n{body}\n"
    made = {"benchmark": name, "rig": rig, **raw}
    if keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(made, indent=1, default=asdict) + "\n")
        (RESULTS / f"{name}.md").write_text(page)
    print(page)
    print(json.dumps(made, default=asdict))
