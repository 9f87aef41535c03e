"""How fast is decoding, and how much memory does it take? Writes results/generate_DEVICE.*

    pip install -e ".[bench]"                      ctranslate2, gguf
    pip install llama-cpp-python                   compiles for about ten minutes
    python -m benchmarks.bench_generate            124M parameters, ten minutes on two cores
    python -m benchmarks.bench_generate --quick    a small shape, a minute; writes nothing
    python -m benchmarks.bench_generate --only mission --seeds 50
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        CT2_FORCE_CPU_ISA=AVX2 python -m benchmarks.bench_generate    held to AVX2

All arms decode with the same random weights, seeded and scaled so that a text does not repeat
itself. The arms take turns, each in its own process (see generate_peers.py). The report names the
peers that are not installed.
Where a step reads the weights once, a row gives the share of the limit: the time in which this
machine reads that many bytes, measured beside it. llama.cpp cannot be held to AVX2 after it was
compiled.
The tokens are compared first. Exact arms must give transformers' tokens; the other arms must
predict at least half of the next tokens along transformers' text. Then whole calls are timed.
"""

import argparse
import functools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.generate_peers import (
    Apart,
    CTranslate2,
    DiedError,
    LlamaCpp,
    MissingError,
    Ours,
    Transformers,
    WithoutCache,
)
from nanogpt2.config import PRESETS, GPTConfig

AGAINST = "transformers"
ARMS: dict[str, dict[str, Callable]] = {
    "cpu": {
        "ours": Ours,
        "ours, in C": partial(Ours, compiled=True),
        "ours, counter noise": partial(Ours, noise="counter"),
        "ours, fp16": partial(Ours, quantize="fp16"),
        "ours, fp16, in C": partial(Ours, quantize="fp16", compiled=True),
        "ours, int8": partial(Ours, quantize="int8"),
        "ours, int8, in C": partial(Ours, quantize="int8", compiled=True),
        "transformers": Transformers,
        "CTranslate2": CTranslate2,
        "CTranslate2, int8": partial(CTranslate2, weights="int8"),
        "llama.cpp": LlamaCpp,
        "llama.cpp, Q8_0": partial(LlamaCpp, weights="Q8_0"),
        "no cache, as nanoGPT": WithoutCache,
    },
    "cuda": {
        "ours": partial(Ours, device="cuda", dtype="bfloat16"),
        "ours, counter noise": partial(Ours, device="cuda", dtype="bfloat16", noise="counter"),
        "transformers": partial(Transformers, device="cuda", dtype="bfloat16"),
        "transformers, static cache, compiled": partial(
            Transformers, device="cuda", dtype="bfloat16", static=True
        ),
    },
}
# in float32 on a CPU these arms must give exactly transformers' tokens
EXACT = ("ours", "ours, in C", "no cache, as nanoGPT")
OTHER_NOISE = "counter noise"
SETTLED = 256  # rows decoded one by one, after which ours has packed all its weights
LEAST_AGREEMENT = 0.5  # of next tokens along transformers' text; a broken arm has about 0

BEAMS = {"num_beams": 5}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 50}
MISSION = {**BEAMS, "do_sample": True, "temperature": 0.7, "top_k": 50, "no_repeat_ngram_size": 2}


@dataclass(frozen=True)
class Row:
    """A task to measure, and the arms that can do it."""

    title: str
    unit: str
    arms: tuple[str, ...]
    options: Mapping[str, object] = field(default_factory=dict)
    new: int = 0  # tokens of a timed call
    remark: str = "transformers' tokens"  # header of the last column


WIDE = ("ours", "ours, in C", "transformers", "transformers, static cache, compiled", "CTranslate2")
SAMPLERS = ("ours", "ours, in C", "ours, counter noise", *WIDE[2:4])
NARROW = (
    "ours, fp16",
    "ours, fp16, in C",
    "ours, int8",
    "ours, int8, in C",
    "transformers",
    "CTranslate2, int8",
    "llama.cpp, Q8_0",
)
ALONE = ("ours", "ours, fp16", "ours, int8", *WIDE[1:])
ROWS = {
    "greedy": Row("greedy, one row", "ms a token", (*WIDE, "llama.cpp", EXACT[2]), {}, 32),
    "sampled": Row("sampled, one row", "ms a token", SAMPLERS, SAMPLED, 32),
    "beams": Row("5 beams", "ms a token", WIDE, BEAMS, 24),
    "mission": Row(
        "the mission's command: 5 beams, sampled, T 0.7, top-k 50, no repeated bigram",
        "ms a token",
        (*SAMPLERS, *NARROW[:4]),
        MISSION,
        24,
    ),
    "int8": Row("greedy, one row, narrow weights", "ms a token", NARROW, {}, 32),
    "first": Row("first token of a prompt of {long}, 5 beams", "s", WIDE, BEAMS),
    "step": Row("a step at context {long}, 5 beams", "ms", WIDE, BEAMS, 32),
    "start": Row(
        "from the process's start to its first token, weights on disk", "s", (), remark=""
    ),
    "memory": Row("peak of anonymous memory, 5 beams", "MB", ALONE, remark="of its weights"),
    "resident": Row(
        "the same with the pages of mapped files", "MB", ALONE, remark="of its weights"
    ),
    "cache": Row("cache of 5 beams, {long} tokens and room for {new}", "MB", ALONE, remark=""),
}
# rows measured together
TOGETHER = {"first": ("first", "step"), "memory": ("memory", "resident", "cache")}
SCALE = {"ms a token": 1e3, "ms": 1e3, "s": 1.0, "MB": 1e-6}


def prompt_of(length: int) -> list[int]:
    """Random token ids, the same in every run."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(50256, (length,), generator=generator).tolist()


def save_random_model(folder: Path, shape: GPTConfig) -> None:
    """Write weights that behave like a trained model's for speed and rounding.

    GPT-2's initialisation repeats the last token again and again. Here the layers outweigh the
    embedding of the token just read, and the last gain sets the lead of the best token. No token
    ends a text, so all texts have the same length.
    """
    from nanogpt2 import GPT, save_model

    torch.manual_seed(0)
    model = GPT(replace(shape, eos_token_id=None))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif name.startswith("h.") and "ln_" not in name:
                parameter.normal_(std=2 / math.sqrt(parameter.size(1)))
        # wte has standard deviation 0.02, so the scores get 3
        model.ln_f.weight.fill_(3 / (0.02 * math.sqrt(shape.n_embd)))
    save_model(model, folder)


def leading(tokens: Sequence[int], expected: Sequence[int]) -> int:
    """Number of equal tokens before the first difference."""
    same = [a == b for a, b in zip(tokens, expected, strict=True)]
    return [*same, False].index(False)


def gate(texts: Mapping[str, Sequence[int]], exact: Sequence[str]) -> dict[str, str]:
    """Compare each arm's text with transformers'; return a remark on each.

    Raises AssertionError if an exact arm gives a different token.
    """
    said = {}
    for name, tokens in texts.items():
        same = leading(tokens, texts[AGAINST])
        if name in exact:
            assert same == len(tokens), (
                f"{name}: token {same} is {tokens[same]}, not {texts[AGAINST][same]}"
            )
        first = "all" if same == len(tokens) else f"first {same}"
        said[name] = "other noise" if OTHER_NOISE in name else f"{first} of {len(tokens)}"
    return said


def agreement(arm: object, prompt: list[int], text: list[int]) -> float:
    """Share of the places along a text at which the arm's next token equals the text's."""
    found = [arm.generate(prompt + text[:n], 1)[0] for n in range(len(text))]
    return sum(a == b for a, b in zip(found, text, strict=True)) / len(text)


class Bench:
    """The arms, each made once, with their agreements and the reasons for missing arms."""

    def __init__(
        self, folder: Path, shape: GPTConfig, args: argparse.Namespace, make: Callable = Apart
    ) -> None:
        """make: makes an arm from its entry in ARMS and the folder."""
        save_random_model(folder, shape)
        self.make = make
        self.folder, self.args, self.device = folder, args, args.device
        self.parameters = shape.n_parameters
        self.long = 90 if args.quick else 900
        self.exact = EXACT if args.device == "cpu" else ()
        self.missing: dict[str, str] = {}
        self.agreements: dict[str, float] = {}
        self.made: dict[str, object] = {}
        self.prompt = prompt_of(16)

    @functools.cached_property
    def text(self) -> list[int]:
        """Transformers' greedy text, which the other arms are compared with."""
        return self.arm(AGAINST).generate(self.prompt, 8 if self.args.quick else 32)

    def arm(self, name: str) -> object:
        """Make an arm once. Raises MissingError, and AssertionError if its next tokens differ."""
        if name not in self.made:
            print(f"making: {name}", file=sys.stderr)
            self.made[name] = self.make(ARMS[self.device][name], self.folder)
            if name != AGAINST:
                share = self.agreements[name] = agreement(self.made[name], self.prompt, self.text)
                least = 1.0 if name in self.exact else LEAST_AGREEMENT
                assert share >= least, f"{name}: only {share:.0%} of next tokens equal {AGAINST}'"
        return self.made[name]

    def arms(self, row: Row) -> dict[str, object]:
        """Make the row's arms; note in `missing` why an arm cannot be made here."""
        found = {}
        for name in row.arms:
            if name not in ARMS[self.device]:
                continue
            try:
                found[name] = self.arm(name)
            except MissingError as why:
                self.missing[name] = str(why)
            except DiedError:
                if name.startswith("ours"):
                    raise
                # as llama.cpp's 8-bit products do on some processors with AMX
                self.made.pop(name, None)
                self.missing[name] = "its process crashed on this processor"
        return found

    def weights(self, name: str) -> int:
        """Bytes of the weights as the arm uses them, without the scales of narrow weights."""
        narrow = {"fp16": 2, "int8": 1, "Q8_0": 1}
        sizes = [narrow[part] for part in name.split(", ") if part in narrow]
        return self.parameters * (sizes[0] if sizes else 4 if self.device == "cpu" else 2)

    def limit(self, name: str) -> float:
        """Seconds in which this machine reads the arm's weights once, measured now."""
        return self.weights(name) / harness.read_bandwidth() if self.device == "cpu" else math.nan

    def take_turns(self, arms: Mapping[str, Callable[[], object]]) -> dict[str, list]:
        """Call each arm once a round, in a new random order every round; return its results."""
        found: dict[str, list] = {name: [] for name in arms}

        def note(name: str) -> None:
            found[name].append(arms[name]())

        harness.interleave({name: partial(note, name) for name in arms}, self.args.rounds)
        return found


@dataclass
class Measured:
    """A row's numbers: one a round for each arm, in seconds or bytes, and a remark on the arm."""

    numbers: dict[str, list[float]]
    said: dict[str, str] = field(default_factory=dict)
    notes: str = ""
    limits: dict[str, float] = field(default_factory=dict)  # seconds to read the weights once


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure_tokens(bench: Bench, name: str) -> dict[str, Measured]:
    """Time whole calls, prefill of the short prompt included, per new token.

    Ours packs its weights only after enough calls to pay for the packing; peers pack at once. So
    decode until ours has packed before timing.
    """
    row = ROWS[name]
    new = 8 if bench.args.quick else row.new
    arms = bench.arms(row)
    texts = {
        arm: decoder.generate(bench.prompt, new, **row.options) for arm, decoder in arms.items()
    }
    said, notes = gate(texts, bench.exact), ""
    if name == "mission" and bench.exact:
        for seed in range(1, bench.args.seeds):
            texts = {
                arm: arms[arm].generate(bench.prompt, 20, seed, **row.options)
                for arm in ("ours", AGAINST)
            }
            gate(texts, bench.exact)
        notes = f"Tokens equal to {AGAINST}' for {bench.args.seeds} of {bench.args.seeds} seeds."

    def call(decoder) -> float:
        return seconds(lambda: decoder.generate(bench.prompt, new, **row.options)) / new

    for arm, decoder in arms.items():
        if arm.startswith("ours"):
            decoder.generate(bench.prompt, new if bench.args.quick else SETTLED, **row.options)
    works = {arm: partial(call, decoder) for arm, decoder in arms.items()}
    limits = {arm: bench.limit(arm) for arm in arms}
    return {name: Measured(bench.take_turns(works), said, notes, limits)}


def measure_long(bench: Bench, _: str) -> dict[str, Measured]:
    """Time the first token after a long prompt, then each step.

    Of an arm that does not say when a step ends, a shorter call's time is subtracted.
    """
    prompt, new = prompt_of(bench.long), 4 if bench.args.quick else ROWS["step"].new
    arms = bench.arms(ROWS["step"])
    texts = {arm: decoder.generate(prompt, 1 + new, **BEAMS) for arm, decoder in arms.items()}
    said = gate(texts, bench.exact)

    def calls(decoder) -> tuple[float, float]:
        steps = decoder.steps(prompt, 1 + new, **BEAMS)
        if steps is not None:
            return steps[0], statistics.median(steps[1:])
        first = seconds(lambda: decoder.generate(prompt, 1, **BEAMS))
        return first, (seconds(lambda: decoder.generate(prompt, 1 + new, **BEAMS)) - first) / new

    pairs = bench.take_turns({arm: partial(calls, decoder) for arm, decoder in arms.items()})
    firsts = {arm: [first for first, _ in found] for arm, found in pairs.items()}
    steps = {arm: [step for _, step in found] for arm, found in pairs.items()}
    limits = {arm: bench.limit(arm) for arm in arms}
    return {"first": Measured(firsts, said), "step": Measured(steps, said, limits=limits)}


OUR_LINES = """
import sys, torch
from nanogpt2 import generate, load_generator, load_tokenizer
folder, device, dtype = sys.argv[1:]
model, tokenizer = load_generator(folder, device, dtype), load_tokenizer(folder)
ids = torch.tensor([tokenizer.encode("Once upon a time")])
print(tokenizer.decode(generate(model, ids, max_new_tokens=1).sequences[0].tolist()), flush=True)
"""
THEIR_LINES = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, device, dtype = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
inputs = tokenizer("Once upon a time", return_tensors="pt").to(device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=1)[0]), flush=True)
"""


def programs(bench: Bench) -> dict[str, list[str]]:
    """Arguments to `python` that print a text's first token, as a user of each would write them."""
    folder, device = str(bench.folder), bench.device
    where = [folder, device, "float32" if device == "cpu" else "bfloat16"]
    flags = ["--model", folder, "--device", device, "--dtype", where[-1], "--max_new_tokens", "1"]
    return {
        "ours, sample.py": ["sample.py", "Once upon a time", *flags],
        "ours, in Python": ["-c", OUR_LINES, *where],
        AGAINST: ["-c", THEIR_LINES, *where],
        "import torch alone": ["-c", "import torch; print(flush=True)"],
    }


def measure_start(bench: Bench, name: str) -> dict[str, Measured]:
    """Time programs from their start to their first output."""
    works = {arm: partial(first_output, program) for arm, program in programs(bench).items()}
    for work in works.values():
        work()
    notes = "Each program has run before, so its files are in the page cache."
    return {name: Measured(bench.take_turns(works), notes=notes)}


def first_output(program: list[str]) -> float:
    """Seconds until a Python program writes its first byte."""
    settings = {
        "PYTHONPATH": str(harness.ROOT),
        "PYTHONDONTWRITEBYTECODE": "",  # an installed package has cached bytecode
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *program],
        cwd=harness.ROOT,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        written = process.stdout.read(1)
        found = time.perf_counter() - started
        process.stdout.read()
    assert written and process.returncode == 0, f"{program[:2]} failed"
    return found


def measure_memory(bench: Bench, _: str) -> dict[str, Measured]:
    """Run one process for each arm and round, because malloc's fragmentation varies by chance."""

    def measure(arm: str) -> dict:
        return harness.in_a_process(
            "benchmarks.generate_alone",
            *(arm, str(bench.folder), bench.device, str(bench.long), str(ROWS["step"].new)),
        )

    found = bench.take_turns({arm: partial(measure, arm) for arm in bench.arms(ROWS["memory"])})
    rows = {}
    for name in ("memory", "resident", "cache"):
        numbers = {arm: [f[name] for f in each if name in f] for arm, each in found.items()}
        rows[name] = Measured({arm: taken for arm, taken in numbers.items() if taken})
        if name != "cache":
            rows[name].said = {
                arm: f"{statistics.median(taken) / bench.weights(arm):.2f}x"
                for arm, taken in rows[name].numbers.items()
            }
    return {name: measured for name, measured in rows.items() if measured.numbers}


MEASURES = {"first": measure_long, "start": measure_start, "memory": measure_memory}


def lines_of(measured: Measured, unit: str) -> list[tuple]:
    """Table lines, one for each arm, with the ratio to transformers in the same run."""
    base = statistics.median(measured.numbers[AGAINST])
    lines = []
    for arm, numbers in measured.numbers.items():
        median, least, most = (
            f"{SCALE[unit] * f(numbers):.4g}" for f in (statistics.median, min, max)
        )
        spread = f"{median} ({least}-{most})" if len(numbers) > 1 else median
        ratio = f"{base / statistics.median(numbers):.2f}x"
        line = [arm, spread, ratio, measured.said.get(arm, "")]
        if measured.limits:
            line.append(f"{measured.limits[arm] / statistics.median(numbers):.0%}")
        lines.append(line)
    return lines


def page(bench: Bench, rows: Mapping[str, Measured]) -> str:
    """The whole report as Markdown."""
    parts = []
    for name, measured in rows.items():
        row = ROWS[name]
        title = row.title.format(long=bench.long, new=ROWS["step"].new)
        header = ["arm", f"{row.unit}: median (least-most)", "better by", row.remark]
        header += ["of the limit: reading the weights once"] if measured.limits else []
        body = harness.table(header, lines_of(measured, row.unit))
        parts.append(f"## {title}\n\n{measured.notes}\n\n{body}".replace("\n\n\n\n", "\n\n"))
    shares = [(name, f"{share:.0%}") for name, share in bench.agreements.items()]
    if shares:
        header = ["arm", f"next tokens equal to {AGAINST}'"]
        parts.append(f"## Along one text\n\n{harness.table(header, shares)}")
    if bench.missing:
        left_out = "\n".join(f"- {name}: {why}" for name, why in bench.missing.items())
        parts.append(f"## Left out\n\n{left_out}")
    return "\n\n".join(parts)


def plot(rows: Mapping[str, Measured], file: Path) -> None:
    """Plot the ratio to transformers: a bar for each arm, a panel for each row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.28 * sum(2 + len(m.numbers) for m in rows.values())))
    heights = [len(m.numbers) for m in rows.values()]
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (name, measured) in zip(panels, rows.items(), strict=True):
        base = statistics.median(measured.numbers[AGAINST])
        ratios = {arm: base / statistics.median(n) for arm, n in measured.numbers.items()}
        colours = ["C0" if arm.startswith("ours") else "0.6" for arm in ratios]
        bars = panel.barh(list(ratios), list(ratios.values()), color=colours)
        panel.bar_label(bars, fmt="%.2fx", padding=2, fontsize=7)
        panel.set_title(name, loc="left", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.invert_yaxis()
        panel.axvline(1, color="0.3", linewidth=0.7)
        panel.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape; writes nothing")
    parser.add_argument("--device", default="cpu", choices=tuple(ARMS))
    parser.add_argument("--only", choices=tuple(ROWS), help="one row; writes nothing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the mission's command")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    dtype = "float32" if args.device == "cpu" else "bfloat16"
    rig = harness.rig(args.device, dtype=dtype, rounds=args.rounds)
    shape = GPTConfig(n_layer=2, n_head=4, n_embd=128) if args.quick else PRESETS["gpt2"]
    first_of = {name: first for first, names in TOGETHER.items() for name in names}
    asked = [args.only] if args.only else list(ROWS)
    rows: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), shape, args)
        for first in dict.fromkeys(first_of.get(name, name) for name in asked):
            print(f"measuring: {first}", file=sys.stderr)
            rows |= MEASURES.get(first, measure_tokens)(bench, first)
        body = page(bench, rows)
    keep = not (args.quick or args.only)
    held = "_avx2" if args.device == "cpu" and harness.is_held_to_avx2() else ""
    raw = {"rows": rows, "agreement": bench.agreements, "left out": bench.missing}
    harness.report(f"generate_{args.device}{held}", "Decoding", rig, body, raw, keep)
    if keep:
        try:
            plot(rows, harness.RESULTS / f"generate_{args.device}{held}.png")
        except ImportError:
            print("no plot: matplotlib is not installed", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
