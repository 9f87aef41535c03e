"""The parts of the first eight minutes on a GPU, each run by first_light.py in its own process.

    python -m benchmarks.first_light_parts PART FILE [--device cuda] [--share 2/16]

A part is a list of cases, each with a name and a function that returns what it found, as JSON. FILE
holds the cases that ended and the name of the one that runs. A process that starts with a FILE goes
on after the cases there. A case that reaches its limit is killed with the whole process; so is
everything after an error that leaves the GPU unusable. first_light.py then starts another process.

The part `share` runs a share of all the other parts' cases once, untimed. first_light.py starts one
for each core, which fills Triton's and Inductor's caches on disk. The rooms' cases are in
first_light_rooms.py.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import bench_train, first_light, first_light_rooms, gpu, harness
from nanogpt2 import GPT, generate, save_model
from nanogpt2.config import PRESETS, GPTConfig
from nanogpt2.generation import engine
from nanogpt2.training import estimate

Found = dict[str, Any]
Cases = dict[str, Callable[[], Found]]

TINY = gpu.DEVICE == "cpu"
# the interpreter takes heads of 16 and more; the sizes are mutually distinct
MODEL = GPTConfig(61, 40, 1, 2, 32, eos_token_id=None)
if not TINY:
    # no end token: every text has its full length
    MODEL = dataclasses.replace(PRESETS["gpt2"], eos_token_id=None)


def lost() -> bool:
    """Whether the GPU refuses further work from this process, as after an illegal access."""
    if gpu.DEVICE == "cpu":
        return False
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def synchronize() -> None:
    if gpu.DEVICE == "cuda":
        torch.cuda.synchronize()


def median_seconds(work: Callable[[], object], rounds: int = 20, warm_up: int = 3) -> float:
    """Median seconds of one call, by the clock that first_light_rooms uses."""
    for _ in range(warm_up):
        work()
    stopwatch = first_light_rooms.stopwatch()
    return statistics.median(stopwatch(work) for _ in range(rounds))


# ---- machine


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> Found:
    query = "name,driver_version,power.limit,clocks.max.sm,clocks.max.mem,memory.total"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        board = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        board = f"no answer from nvidia-smi: {error}"
    git = ["git", "-C", str(harness.ROOT), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    found = {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "numpy", "transformers")},
        "cores": os.cpu_count(),
        "commit": commit or "unknown",
        "board": board,
    }
    if gpu.DEVICE == "cuda":
        chip = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": chip.name,
            "capability": f"{chip.major}.{chip.minor}",
            "processors": chip.multi_processor_count,
            "memory": chip.total_memory,
            "l2": getattr(chip, "L2_cache_size", None),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found | {"table": harness.table(["what", "here"], list(found.items()))}


def copies() -> Found:
    """Bytes a second of a copy, read and written, by its size."""
    sizes = [2**20] if TINY else [2**25, 2**28, 2**31]
    rates = {size: size / median_seconds(gpu.a_copy(size)) for size in sizes}
    rows = [(f"{size / 2**20:,.0f}", f"{rate / 1e9:,.0f}") for size, rate in rates.items()]
    return {"rates": rates, "table": harness.table(["MiB read and written", "GB/s"], rows)}


def products() -> Found:
    """Operations a second of PyTorch's products, in GPT-2's shapes and a large square."""
    C, V, M = MODEL.n_embd, -(-MODEL.vocab_size // 64) * 64, 64 if TINY else 16384
    square = 64 if TINY else 8192
    shapes = [(square, square, square), (M, C, 3 * C), (M, C, C), (M, C, 4 * C), (M, 4 * C, C)]
    rates = {}
    for rows, inner, columns in [*shapes, (M, C, V)]:
        # random numbers: a GPU multiplies constants unrealistically fast
        a, b = gpu.randn(rows, inner), gpu.randn(columns, inner)
        seconds = median_seconds(partial(torch.mm, a, b.t()))
        rates[f"{rows} x {inner} x {columns}"] = 2 * rows * inner * columns / seconds
    rows = [(shape, f"{rate / 1e12:,.1f}") for shape, rate in rates.items()]
    return {"rates": rates, "table": harness.table([f"{gpu.DTYPE} product", "TFLOP/s"], rows)}


def launches() -> Found:
    """Seconds of a kernel that does nearly nothing: launched by Python, and in a CUDA graph."""
    x, count = torch.zeros(32, device=gpu.DEVICE), 10 if TINY else 1000

    def many() -> None:
        for _ in range(count):
            x.add_(1)

    many()
    replay, clock = first_light_rooms.graph_of(many)
    synchronize()
    began = time.perf_counter()
    many()
    synchronize()
    eager = (time.perf_counter() - began) / count
    graph = median_seconds(replay) / count
    rows = [("launched by Python", f"{1e6 * eager:.2f}"), (clock, f"{1e6 * graph:.2f}")]
    return {"eager": eager, "graph": graph, "table": harness.table(["one kernel", "us"], rows)}


def machine() -> Cases:
    return {"versions": versions, "copy": copies, "products": products, "launches": launches}


# ---- correct: the model; the rooms' cases are in first_light_rooms.py


def random_model(dtype: torch.dtype = torch.float32, kernels: str = "torch") -> GPT:
    """GPT-2's shape with random weights, equal in every call, sharp enough that no two scores of
    the next token are nearly equal."""
    torch.manual_seed(0)
    with torch.device(gpu.DEVICE):
        model = GPT(MODEL)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * (0.2 if TINY else 0.02))
    model = model.to(dtype).eval()
    model.use_kernels(kernels)
    return model


def numbers_of(model: GPT, autocast: bool) -> dict[str, torch.Tensor]:
    """Logits, loss and every gradient of two rows."""
    torch.manual_seed(1)
    T = 9 if TINY else MODEL.block_size
    ids = torch.randint(MODEL.vocab_size, (2, T + 1), device=gpu.DEVICE)
    x, y = ids[:, :-1], ids[:, 1:].contiguous()
    model.zero_grad(set_to_none=True)
    with torch.autocast(gpu.DEVICE, torch.bfloat16, enabled=autocast):
        loss = model(x, y)
        loss.backward()
        with torch.no_grad():
            logits = model(x)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": logits, "loss": loss.detach(), **gradients}


def model_case(kernels: str, autocast: bool) -> Found:
    """RMS ratios to PyTorch in float32. bf16 may be 1.5 times as far as PyTorch's own bf16."""
    expected = numbers_of(random_model(), False)

    def distances(by: str) -> dict[str, float]:
        found = numbers_of(random_model(kernels=by), autocast)
        return {name: gpu.rms_ratio(found[name], x) for name, x in expected.items()}

    ours = distances(kernels)
    allowed = dict.fromkeys(ours, 0.0001)
    if autocast:
        allowed = {name: 1.5 * ratio + 1e-3 for name, ratio in distances("torch").items()}
    # a NaN is not within its limit either
    wrong = {name: ours[name] for name in ours if not ours[name] <= allowed[name]}
    worst = max(ours, key=lambda name: ours[name] / allowed[name])
    shown = [(name, f"{ours[name]:.1e}", f"{allowed[name]:.1e}") for name in ("logits", "loss")]
    shown.append((f"worst: {worst}", f"{ours[worst]:.1e}", f"{allowed[worst]:.1e}"))
    found = {"ratios": ours, "allowed": allowed}
    found["table"] = harness.table(["result", "RMS ratio", "allowed"], shown)
    if wrong:
        names = ", ".join(wrong)
        found["error"] = f"{len(wrong)} of {len(ours)} results are wrong: {names}"[:300]
    return found


def correct() -> Cases:
    # the interpreter cannot multiply bfloat16
    low = {} if TINY else {"model, Triton, bf16": partial(model_case, "triton", True)}
    model = {"model, Triton, float32": partial(model_case, "triton", False), **low}
    return first_light_rooms.correct_cases() | model


# ---- decode

ARMS = {
    "PyTorch, eager": ("torch", False),
    "Triton, eager": ("triton", False),
}
if importlib.util.find_spec("nanogpt2.cuda") is not None:
    ARMS["CUDA graph"] = ("triton", True)
NEW = (1, 4) if TINY else (8, 72)  # tokens of the short text and of the long one
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 50, "noise": "counter", "seed": 7}
SETTINGS = {
    "greedy": {},
    "sampled": SAMPLED,
    "5 sampled beams, no repeated bigram": SAMPLED | {"num_beams": 5, "no_repeat_ngram_size": 2},
}


@contextlib.contextmanager
def decoding(graph: bool) -> Iterator[list[str]]:
    """Let generate() decode by nanogpt2/cuda or not: the one place here that knows that package.

    Yields a list that gets the class of every decoder made inside.
    """
    used: list[str] = []
    choose = engine.decoder_for

    def noted(*args: Any, **kwargs: Any) -> Any:
        decoder = choose(*args, **kwargs)
        used.append(type(decoder).__name__)
        return decoder

    with contextlib.ExitStack() as stack:
        if "CUDA graph" in ARMS:
            module = importlib.import_module("nanogpt2.cuda.decoder")
            stack.enter_context(mock.patch.object(module, "DEVICES", (gpu.DEVICE,) * graph))
        stack.enter_context(mock.patch.object(engine, "decoder_for", noted))
        yield used


@cache
def decoding_model(dtype: torch.dtype, kernels: str) -> GPT:
    return random_model(dtype, kernels)


def text_of(arm: str, dtype: torch.dtype, options: Mapping, new: int) -> tuple[list, list[str]]:
    """The new tokens, and the decoders that chose them."""
    kernels, graph = ARMS[arm]
    model = decoding_model(dtype, kernels)
    prompt = torch.arange(1, 8, device=gpu.DEVICE)[None]
    with decoding(graph) as used:
        out = generate(model, prompt, max_new_tokens=new, **options)
    if graph and set(used) == {"ModelDecoder"}:
        raise LookupError("generate() chose no decoder of nanogpt2/cuda")
    return out.sequences[:, 7:].tolist(), used


def tokens_case(arm: str, setting: str) -> Found:
    """In float32 the tokens must be those of PyTorch's eager path."""
    new = NEW[1] if TINY else NEW[1] // 2
    expected, _ = text_of("PyTorch, eager", torch.float32, SETTINGS[setting], new)
    found, used = text_of(arm, torch.float32, SETTINGS[setting], new)
    pairs = list(zip(found[0], expected[0], strict=False))
    same = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    result: Found = {"tokens": new, "equal": same, "decoders": sorted(set(used))}
    if found != expected:
        result["error"] = f"token {same} of {new} differs from PyTorch's"
    return result


def seconds_of(arm: str, setting: str) -> Found:
    """Seconds a token, by two lengths of text; tokens beside those of PyTorch in the same dtype."""
    texts, used, best = {}, [], {}
    for new in NEW:
        times = []
        for _ in range(1 if TINY else 3):  # the first may compile and capture
            synchronize()
            began = time.perf_counter()
            texts[new], used = text_of(arm, gpu.DTYPE, SETTINGS[setting], new)
            synchronize()
            times.append(time.perf_counter() - began)
        best[new] = min(times)
    expected, _ = text_of("PyTorch, eager", gpu.DTYPE, SETTINGS[setting], NEW[1])
    pairs = list(zip(texts[NEW[1]][0], expected[0], strict=False))
    each = (best[NEW[1]] - best[NEW[0]]) / (NEW[1] - NEW[0])
    weights = MODEL.n_parameters * gpu.DTYPE.itemsize
    return {
        "seconds_a_token": each,
        "first_tokens_equal": next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs)),
        "bytes_of_weights": weights,
        "decoders": sorted(set(used)),
        "table": harness.table(
            [f"{setting}, {gpu.DTYPE}", "ms a token", "tokens/s", "GB/s of weights"],
            [(arm, f"{1e3 * each:.3f}", f"{1 / each:,.0f}", f"{weights / each / 1e9:,.0f}")],
        ),
    }  # fmt: skip


def decode() -> Cases:
    others = [arm for arm in ARMS if arm != "PyTorch, eager"]
    tokens = {
        f"tokens: {setting}, {arm}": partial(tokens_case, arm, setting)
        for setting in SETTINGS
        for arm in others
    }
    timed = {
        f"time: {setting}, {arm}": partial(seconds_of, arm, setting)
        for setting in SETTINGS
        for arm in ARMS
    }
    return tokens | timed


# ---- train

STEPS = 10
TRAINED = ["ours", "nanoGPT's recipe"] if TINY else ["ours", "ours, --compile", "nanoGPT's recipe"]
BATCH = (2, 8) if TINY else (16, 1024)
# relative difference of a step's losses
LOSSES_APART = 1e-3 if TINY else 1e-2


# the arms of this process: a later process makes them anew
LIVE: dict[str, Callable[[], float]] = {}
FOLDERS = contextlib.ExitStack()


@cache
def saved_model() -> Path:
    folder = Path(FOLDERS.enter_context(tempfile.TemporaryDirectory(prefix="first-light-")))
    torch.manual_seed(0)
    save_model(GPT(MODEL), folder)
    return folder


def make_arm(arm: str) -> Callable[[], float]:
    return bench_train.make_arm(arm, saved_model(), (MODEL, *BATCH), gpu.DEVICE)


def first_steps(arm: str) -> Found:
    """Make the arm and take its first steps, which compile; its peak memory and its losses."""
    before = 0
    if gpu.DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    step = make_arm(arm)
    losses = [step() for _ in range(bench_train.CHECKED)]
    LIVE[arm] = step
    return {"losses": losses, "memory": estimate.memory_used(gpu.DEVICE) - before}


def ten_steps(report: first_light.Report) -> Found:
    """Ten steps of every arm that took its first, in turns; the losses of all must agree."""
    firsts = {arm: report.cases[arm] for arm in TRAINED if "error" not in report.cases[arm]}
    losses: dict[str, list[float]] = {}

    def noted(arm: str) -> None:
        losses[arm].append(LIVE[arm]())

    for arm, first in firsts.items():
        if arm not in LIVE:
            first_steps(arm)
        losses[arm] = list(first["losses"])
    times = harness.interleave({arm: partial(noted, arm) for arm in firsts}, STEPS, synchronize)
    tokens = BATCH[0] * BATCH[1]
    flops = estimate.model_flops(MODEL, tokens, BATCH[1])
    rate = estimate.device_rate(gpu.DEVICE, str(gpu.DTYPE).removeprefix("torch."))
    rows = [
        (
            arm,
            harness.spread(time),
            f"{tokens / time.median:,.0f}",
            f"{flops / time.median / rate.flops:.1%}",
            f"{time.median / times['ours'].median:.2f}" if "ours" in times else "",
            f"{firsts[arm]['memory'] / 1e9:.1f} GB",
        )
        for arm, time in times.items()
    ]
    header = [f"{BATCH[0]} x {BATCH[1]} tokens", "seconds a step (least-most)", "tokens/s"]
    header += [f"MFU of {rate.flops / 1e12:,.0f} TFLOP/s", "time / ours", "peak memory"]
    found: Found = {
        "losses": losses,
        "seconds": {arm: dataclasses.asdict(time) for arm, time in times.items()},
        "table": harness.table(header, rows),
    }
    try:
        found["apart"] = harness.assert_equal(losses, next(iter(losses)), LOSSES_APART)
    except AssertionError as error:
        found["error"] = f"losses differ: {error}"
    return found


def train(report: first_light.Report) -> Cases:
    arms: Cases = {arm: partial(first_steps, arm) for arm in TRAINED}
    return arms | {"ten steps": partial(ten_steps, report)}


# ---- profile


def top_kernels(work: Callable[[], object], rows: int = 15) -> Found:
    """The device's kernels by their time, of one call of `work` after a first."""
    work()
    synchronize()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if gpu.DEVICE == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiled:
        work()
        synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    events = [
        (
            event.key,
            event.count,
            event.self_cpu_time_total if TINY else event.self_device_time_total,
        )
        for event in profiled.key_averages()
        if TINY or event.device_type == on_gpu
    ]
    events.sort(key=lambda event: -event[2])
    whole = sum(us for *_, us in events)
    lines = [
        (name.replace("|", "/")[:70], count, f"{us:,.1f}", f"{us / max(whole, 1e-9):.1%}")
        for name, count, us in events[:rows]
    ]
    return {
        "launches": sum(count for _, count, _ in events),
        "microseconds": whole,
        "kernels": [
            dict(zip(("name", "count", "us"), event, strict=True)) for event in events[:60]
        ],
        "table": harness.table(["kernel", "launches", "us", "share"], lines),
    }


def profile_step(arm: str) -> Found:
    return top_kernels(make_arm(arm))


def profile_text(arm: str) -> Found:
    new = NEW[0]
    return top_kernels(lambda: text_of(arm, gpu.DTYPE, SETTINGS["greedy"], new)) | {"tokens": new}


def profile() -> Cases:
    cases: Cases = {"a training step, ours": partial(profile_step, "ours")}
    return cases | {f"greedy decoding, {arm}": partial(profile_text, arm) for arm in ARMS}


# ---- sanitizer

TOOLS = ("memcheck", "racecheck", "synccheck")
# below the limit of the case, so that one check's time does not cost the others' results
SANITIZER_SECONDS = first_light.LIMITS["sanitizer"][1] - 5


def sanitizer_of() -> str | None:
    found = shutil.which("compute-sanitizer")
    others = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
    return found or (str(others[-1]) if others else None)


def sanitized(tool: str, check: str) -> Found:
    """Run the rooms at tiny sizes under one check of compute-sanitizer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.json"
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m"]
        command += ["benchmarks.first_light_parts", "tiny", str(path), "--device", gpu.DEVICE]
        # one allocation a tensor: an access past its end is then an error
        alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        options: Found = {"cwd": harness.ROOT, "env": alone, "capture_output": True, "text": True}
        try:
            done = subprocess.run(command, **options, timeout=SANITIZER_SECONDS)
        except subprocess.TimeoutExpired:
            done = None
        cases = first_light.read(path)["cases"]
    if done is None:
        return {"summary": [], "cases": cases, "error": f"took more than {SANITIZER_SECONDS} s"}
    summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
    found: Found = {"summary": summary, "cases": cases, "log": done.stdout[-2000:]}
    wrong = [name for name, case in cases.items() if "error" in case]
    if done.returncode or wrong or not summary:
        found["error"] = f"exit code {done.returncode}: {' '.join([*summary, *wrong])}"
    return found


def all_sanitized(tool: str) -> Found:
    """The checks run side by side: nothing here is timed."""
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        found = dict(zip(TOOLS, pool.map(partial(sanitized, tool), TOOLS), strict=True))
    wrong = [f"{check}: {each['error']}" for check, each in found.items() if "error" in each]
    rows = [(check, " ".join(each["summary"]) or "no summary") for check, each in found.items()]
    table = harness.table(["check", "says"], rows)
    return {"checks": found, "table": table} | ({"error": "; ".join(wrong)} if wrong else {})


def sanitizer() -> Cases:
    tool = sanitizer_of()
    if tool is None or gpu.DEVICE == "cpu":
        why = "no CUDA device" if tool else "compute-sanitizer is not installed"
        return {"left out": lambda: {"left_out": why, "table": f"Left out: {why}."}}
    return {"checks": partial(all_sanitized, tool)}


# ---- share


def once() -> Cases:
    """What the other parts compile, without measuring."""
    prepared: Cases = {f"correct: {name}": case for name, case in correct().items()}
    prepared |= {f"rooms: {name}": case for name, case in first_light_rooms.sweep_once().items()}
    prepared |= {
        f"decode: {arm}, {setting}, {dtype}": partial(_text_once, arm, dtype, options)
        for arm in ARMS
        for setting, options in SETTINGS.items()
        for dtype in dict.fromkeys([torch.float32, gpu.DTYPE])
    }
    prepared |= {f"train: {arm}": partial(first_steps, arm) for arm in TRAINED}
    prepared |= {f"tiny: {name}": case for name, case in first_light_rooms.tiny_cases().items()}
    # the longest first: a compiled training step
    return dict(sorted(prepared.items(), key=lambda item: not item[0].startswith("train")))


def _text_once(arm: str, dtype: torch.dtype, options: Mapping) -> Found:
    text_of(arm, dtype, options, NEW[1])
    return {}


# ---- the process


def cases_of(part: str, report: first_light.Report) -> Cases:
    if part == "train":
        return train(report)
    makers = {
        "machine": machine,
        "correct": correct,
        "rooms": first_light_rooms.timed_cases,
        "decode": decode,
        "profile": profile,
        "sanitizer": sanitizer,
        "share": once,
        "tiny": first_light_rooms.tiny_cases,
    }
    return makers[part]()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part")
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--case_seconds", type=int, default=600)
    parser.add_argument("--share", default="0/1", help="K/N: every Nth case from the Kth on")
    args = parser.parse_args(argv)
    if args.device != gpu.DEVICE:
        sys.exit(f"error: --device {args.device}: this machine has no CUDA device")
    report = first_light.Report(args.file, args.case_seconds, lost)
    first, count = map(int, args.share.split("/"))
    # not the default stream, which no graph can capture: autograd remembers a forward's stream
    aside = torch.cuda.Stream() if gpu.DEVICE == "cuda" else None
    with FOLDERS, torch.cuda.stream(aside):
        for name, case in list(cases_of(args.part, report).items())[first::count]:
            report.run(name, case)
    report.save(running=None)


if __name__ == "__main__":
    main()
