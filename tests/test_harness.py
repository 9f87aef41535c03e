"""What can be known of the benchmarks without timing anything: by a stopwatch that is told what to
say, and by the gate."""

import importlib
import itertools
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from reference import HUNG, ROOT

from benchmarks import __main__ as command
from benchmarks import bench_softmax, gpu, harness
from nanogpt2.training import estimate

NAN = float("nan")
KERNELS = [name for name in command.names() if name in command.KERNELS]


def case(size=8.0, flops=6.0, bounds=None, **arms):
    """By default of two numbers; underscores of the arms' names are spaces."""
    arms = {name.replace("_", " "): arm for name, arm in arms.items()}
    return gpu.Case("a case", arms, lambda: torch.tensor([3.0, 4.0]), size, flops, bounds or {})


def returns(*numbers):
    return lambda: torch.tensor(numbers)


class Stopwatch:
    """Says what it was told each work takes, in turn, and remembers who came when."""

    def __init__(self, works, seconds):
        self.names = {id(work): name for name, work in works.items()}
        self.left = {name: list(times) for name, times in seconds.items()}
        self.order = []

    def __call__(self, work):
        name = self.names.get(id(work), "copy")
        self.order.append(name)
        return self.left[name].pop(0)


def test_arms_take_turns_in_a_new_order():
    works = {name: (lambda: None) for name in "abcd"}
    times = {name: list(range(10)) for name in works}
    stopwatch = Stopwatch(works, times)
    assert harness.turns(works, 10, stopwatch) == times
    rounds = [tuple(stopwatch.order[i : i + 4]) for i in range(0, 40, 4)]
    # each once a round, in orders that differ
    assert all(sorted(order) == list(works) for order in rounds)
    assert len(set(rounds)) > 5


def test_interleaving_times_each_arm():
    done = []
    arms = {name: (lambda name=name: done.append(name)) for name in "ab"}
    waited = []
    timings = harness.interleave(arms, 3, lambda: waited.append(len(done)))
    assert sorted(done) == list("aaabbb")
    # before and after each
    assert waited == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    for timing in timings.values():
        assert timing.rounds == 3 and 0 <= timing.least <= timing.median <= timing.most


def test_quantiles():
    assert gpu.quantiles([5, 1, 2, 4, 3, 0]) == (1.0, 2.5, 4.0)


@pytest.mark.parametrize(
    ("copy", "flops", "peak", "least", "by_memory"),
    [(2.0, 10.0, 10.0, 2.0, True), (2.0, 90.0, 10.0, 9.0, False)],
)
def test_the_roof(copy, flops, peak, least, by_memory):
    assert gpu.roof(copy, flops, peak) == (least, by_memory)


def test_what_is_right_may_be_timed():
    errors, left_out = gpu.gate(case(ours=returns(3, 4), peer=returns(3.01, 4)), 0.01)
    assert errors["ours"] == 0 and errors["peer"] == pytest.approx(0.01 / 5, rel=1e-3)
    assert left_out == {}


@pytest.mark.parametrize(
    ("peer", "reason"),
    [
        (returns(3, 5), "wrong: RMS ratio 2.0e-01, allowed 1e-02"),
        (returns(3, NAN), "wrong: RMS ratio nan"),
        (returns(3), r"failed: \[1\], not \[2\]"),
        (lambda: (torch.tensor([3.0, 4.0]),) * 2, "failed: zip"),
        (lambda: 1 / 0, "failed: division by zero"),
        ("not installed", "not installed"),
    ],
)
def test_a_peer_that_is_wrong_fails_or_is_not_there_is_left_out(peer, reason):
    errors, left_out = gpu.gate(case(ours=returns(3, 4), peer=peer), 0.01)
    assert list(errors) == ["ours"]
    assert pytest.approx(0) == errors["ours"]
    (said,) = left_out.values()
    assert re.match(reason, said)


@pytest.mark.parametrize("name", ["ours", "ours_in_another_form"])
def test_nothing_is_timed_where_ours_is_wrong(name):
    with pytest.raises(AssertionError, match=r"a case: ours.* is wrong: RMS ratio 2\.0e-01"):
        gpu.gate(case(**{name: returns(3, 5)}, peer=returns(3, 4)), 0.01)
    with pytest.raises(AssertionError, match="is wrong: RMS ratio nan"):
        gpu.gate(case(**{name: returns(3, NAN)}), 0.01)
    with pytest.raises(ZeroDivisionError):
        gpu.gate(case(**{name: lambda: 1 / 0}), 0.01)


def test_the_same_infinity_is_no_error():
    inf = float("inf")
    reference = torch.tensor([-inf, 3.0, 4.0])
    assert gpu.rms_ratio(reference, reference) == 0
    assert gpu.rms_ratio(torch.tensor([-inf, 3.0, 5.0]), reference) == pytest.approx(0.2)
    assert not gpu.rms_ratio(torch.tensor([0.0, 3.0, 4.0]), reference) < 1
    # where the reference is 0 the error is absolute
    assert gpu.rms_ratio(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5


def test_rates_shares_and_ratios():
    """8 bytes that a copy takes 2 s for; ours takes 4 s, a peer 10, and a bound 3."""
    works = {name: (lambda: None) for name in ("ours", "peer", "bound")}
    bounds = {"bound": works["bound"]}
    arms = {"ours": works["ours"], "peer": works["peer"], "absent": "not installed"}
    seconds = {"copy": [2] * 5, "ours": [4, 3, 5, 4, 4], "peer": [10] * 5, "bound": [3] * 5}
    memory = {id(works[name]): 7 * i for i, name in enumerate(works)}
    rows, samples = gpu.measure(
        case(**arms, bounds=bounds),
        ["ours", "peer"],
        5,
        Stopwatch(works, seconds),
        lambda work: memory.get(id(work), 0),
        peak=100.0,
    )
    assert samples == seconds
    found = {row.arm: row for row in rows}
    assert list(found) == ["copy", "bound", "ours", "peer"]
    ours, peer = found["ours"], found["peer"]
    assert (ours.low, ours.median, ours.high) == pytest.approx((3.8, 4, 4.2))
    assert (ours.bandwidth, ours.throughput) == (2.0, 1.5)
    assert (ours.share, ours.against_ours) == (0.5, 1.0)
    assert (peer.bandwidth, peer.share, peer.against_ours) == (0.8, 0.2, 2.5)
    assert (found["copy"].share, found["bound"].against_ours) == (1.0, 0.75)
    assert (ours.memory, peer.memory, found["bound"].memory) == (0, 7, 14)
    # the same times where arithmetic is the roof: 6 operations, 3 s at the least
    rows, _ = gpu.measure(
        case(**arms), ["ours"], 5, Stopwatch(works, seconds | {"ours": [6] * 5, "copy": [2] * 5}),
        lambda _: 0, peak=2.0,
    )  # fmt: skip
    found = {row.arm: row for row in rows}
    assert (found["ours"].throughput, found["ours"].share) == (1.0, 0.5)


def test_the_table():
    row = gpu.Row("a case", "ours", 1e-3, 2e-3, 3e-3, 5e11, 5e11, 0.25, 1.0, 3_000_000)
    (line,) = gpu.markdown([row], {"a case": True}).splitlines()[2:]
    assert line == (
        "| a case | ours | 2.0000 (1.0000-3.0000) | 500 | 0.5 | 25% of a copy | 1.00 | 3 MB |"
    )
    (line,) = gpu.markdown([row], {"a case": False}).splitlines()[2:]
    assert "| 25% of the peak |" in line


def test_the_roofline_picture(tmp_path, monkeypatch, capsys):
    rows = [{"arm": arm, "median": 1e-3 * i} for i, arm in enumerate(("copy", "ours", "peer"), 1)]
    cases = [{"bytes": 1e9, "flops": flops, "rows": rows} for flops in (1e9, 1e12)]
    gpu.draw(tmp_path / "op.png", "An op", cases, 9e14)
    assert (tmp_path / "op.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    gpu.draw(tmp_path / "another.png", "An op", cases, 9e14)
    assert not (tmp_path / "another.png").exists()
    assert "matplotlib is not installed" in capsys.readouterr().err


def test_passes():
    """Values and gradients of the same inputs, although an arm overwrites its own."""
    x = gpu.randn(3, 5)

    def spoils(x):
        y = x.square()
        x.data.zero_()
        return y

    arms = {"ours": torch.square, "spoils": spoils}
    work = {"forward": (1, 2), "backward": (3, 4), "forward and backward": (5, 6)}
    forward, backward, both = gpu.passes("3 x 5", arms, torch.square, (x,), work)
    assert [c.name for c in (forward, backward, both)] == [f"3 x 5, {kind}" for kind in work]
    assert (backward.bytes, backward.flops) == (3, 4)
    for _ in range(2):
        assert gpu.gate(forward, 1e-2)[0].keys() >= {"ours"}
        assert gpu.gate(backward, 1e-2)[0].keys() == {"ours"}
        errors, left_out = gpu.gate(both, 1e-2)
        assert list(errors) == ["ours"] and left_out["spoils"].startswith("wrong")
    assert x.abs().min() > 0
    assert [len(c.reference()) for c in (forward, backward, both)] == [1, 1, 2]


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernels_bench_passes_its_gate(name, capsys):
    bench = importlib.import_module(f"benchmarks.bench_{name}")
    assert {"full", "quick", "check"} == bench.SHAPES.keys()
    found = [case for shape in bench.SHAPES["check"] for case in bench.cases(*shape)]
    assert all(case.bytes > 0 and case.flops > 0 for case in found)
    gpu.check(name, found)
    said = capsys.readouterr().out
    assert all(f"| {case.name} | ours |" in said for case in found)


def test_every_kernel_has_a_bench():
    assert set(KERNELS) == command.KERNELS
    for name in command.names():
        assert command.about(name)


@pytest.mark.parametrize("check", [False, True])
def test_what_a_machine_without_a_gpu_leaves_out(check):
    for name in command.names():
        if name in KERNELS:
            assert command.why_not(name, check, gpu=False) == ("" if check else "no CUDA device")
        elif check:
            assert "has no --check" in command.why_not(name, check, gpu=False)
    assert not command.why_not("softmax", check, gpu=True)


def test_the_command_lists_and_leaves_out(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--list"])
    assert command.main() == 0
    said = capsys.readouterr().out
    assert all(f"| {name} | {command.about(name)} |" in said for name in command.names())
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "classify"])
    assert command.main() == 0
    assert "left out: needs the mails" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "nothing"])
    with pytest.raises(SystemExit, match="2"):
        command.main()


def test_the_command_runs_and_reports_a_failure(monkeypatch, capsys):
    codes = iter([0, 3])
    ran = []

    def process(arguments, **_):
        ran.append(arguments)
        return subprocess.CompletedProcess(arguments, next(codes))

    monkeypatch.setattr(subprocess, "run", process)
    monkeypatch.setattr(
        sys, "argv", ["benchmarks", "--check", "--only", "softmax", "gelu", "train"]
    )
    assert command.main() == 1
    assert [arguments[1:] for arguments in ran] == [
        ["-m", f"benchmarks.bench_{name}", "--check"] for name in ("softmax", "gelu")
    ]
    said = capsys.readouterr().out
    assert "failed with exit code 3" in said and "has no --check" in said


def test_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    harness.report("op", "An op", {"device": "a chip"}, "body", {"rows": [1]}, keep=False)
    assert not (tmp_path / "results").exists()
    harness.report("op", "An op", {"device": "a chip"}, "body", {"rows": [1]})
    assert "Rig: device a chip." in (tmp_path / "results/op.md").read_text()
    expected = {"benchmark": "op", "rig": {"device": "a chip"}, "rows": [1]}
    assert json.loads((tmp_path / "results/op.json").read_text()) == expected
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == expected


def test_a_whole_run_with_a_stopwatch_of_the_cpus(tmp_path, monkeypatch, capsys):
    """All that a GPU's run does but for the two things that only a GPU has."""
    ticks = itertools.count()

    class Stopwatch(gpu.Stopwatch):
        def __init__(self):
            self.sleep, self.uncovered = 64, 0

        def time(self, work):
            return work() is None or 1e-3 * next(ticks), True

    monkeypatch.setattr(gpu, "Stopwatch", Stopwatch)
    monkeypatch.setattr(gpu, "peak_memory", lambda work: 5_000_000)
    monkeypatch.setattr(gpu, "rig", lambda: {"device": "a chip"})
    rate = estimate.Rate(9e14, "its datasheet")
    monkeypatch.setattr(estimate, "device_rate", lambda *_: rate)
    monkeypatch.setattr(estimate, "measure_matmul_rate", lambda *_: 6e14)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    gpu.run("softmax", "Softmax", "About.", bench_softmax.cases(3, 37, False), 5, keep=True)
    numbers = json.loads((tmp_path / "softmax.json").read_text())
    assert [case["case"] for case in numbers["cases"]] == ["3 x 37, forward", "3 x 37, backward"]
    for case in numbers["cases"]:
        assert [row["arm"] for row in case["rows"]] == ["copy", "ours", "eager"]
        assert all(len(times) == 5 for times in case["seconds"].values())
    page = (tmp_path / "softmax.md").read_text()
    assert "Not timed: 3 x 37, forward: Liger: no CUDA device." in page
    assert "The peak is 900 TFLOP/s (its datasheet); products of 4096 x 4096 reached 600" in page
    assert "slept 64 cycles before each timing to hide the launches; it always outlasted" in page
    assert numbers["sleep_cycles"] == 64 and numbers["uncovered"] == 0
    assert (tmp_path / "softmax.png").exists()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == numbers


@pytest.mark.gpu
def test_natively(capsys):
    cases = list(bench_softmax.cases(64, 1024, False))
    gpu.run("softmax", "Softmax", "About.", cases, 5, keep=False)
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    for case in numbers["cases"]:
        assert {"copy", "ours", "eager", "torch.compile"} <= {row["arm"] for row in case["rows"]}
        assert all(row["median"] > 0 for row in case["rows"])


@pytest.mark.parametrize(("launch", "slept"), [(1, 2), (9, 16), (100, 64)])
def test_a_stopwatch_sleeps_until_all_is_launched(launch, slept, monkeypatch):
    """A device that sleeps `cycles` ticks, beside a host that takes `launch` ticks to launch."""
    device = SimpleNamespace(host=0, busy=0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = max(device.busy, device.host)

        def query(self):
            return self.at <= device.host

        def elapsed_time(self, end):
            return end.at - self.at

    def work():
        device.host += launch
        device.busy = max(device.busy, device.host) + 5

    def sleep(cycles):
        device.busy = max(device.busy, device.host) + cycles

    def synchronize():
        device.host = max(device.host, device.busy)

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device, **k: empty(1, **k))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(gpu, "SLEEP", 2)
    monkeypatch.setattr(gpu, "LONGEST_SLEEP", 64)
    stopwatch = gpu.Stopwatch()
    covered = launch < 64
    assert stopwatch(work) == pytest.approx(0.005 if covered else (launch + 5 - 64) / 1e3)
    assert (stopwatch.sleep, stopwatch.uncovered) == (slept, 0 if covered else 1)
    assert ("always" in stopwatch.said()) == covered


def test_the_loaders_benchmark_runs():
    argv = [sys.executable, "-m", "benchmarks.bench_data", "--megabytes", "1", "--rounds", "1"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=HUNG)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"1 processes", "2 processes", "read"} <= found["rates"].keys()
    assert all(rate > 0 for rate in found["rates"].values())
