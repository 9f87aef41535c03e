"""How fast is a training step, and how much memory does it take? Writes results/train_DEVICE.*

    python -m benchmarks.bench_train                  124M parameters, 4 x 256 tokens, float32
    python -m benchmarks.bench_train --quick          a small shape, one minute; writes nothing
    python -m benchmarks.bench_train --device cuda    16 x 1024 tokens, bfloat16; --batch_size 32

On a busy machine set OMP_NUM_THREADS=1 and compare the CPU seconds.

Ours is `take_step` of train.py, the whole step of the script. The peers train the same random
weights on the same batches: a plain loop on transformers' GPT-2, with default and with fused AdamW,
and nanoGPT's recipe (see peers.py). All clip the gradients. The losses of the first steps must
agree before any step is timed. On a GPU transformers and the recipe are also compiled. MFU is the
share of the device's rate, at (6 N + 12 L C T) FLOP a token: see nanogpt2/training/estimate.py.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import train
from benchmarks import harness, peers
from nanogpt2 import GPT, load_model, save_model
from nanogpt2.config import PRESETS, GPTConfig, TrainConfig
from nanogpt2.training import distributed, estimate
from nanogpt2.training.trainer import Trainer

SHAPES = {
    "124M": (PRESETS["gpt2"], 4, 256),
    "124M on a GPU": (PRESETS["gpt2"], 16, 1024),
    "quick": (GPTConfig(block_size=128, n_layer=4, n_head=4, n_embd=128), 4, 64),
}
RATE = 1e-4
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
TOLERANCE = {"cpu": 1e-4, "cuda": 1e-2}  # relative difference of losses
CHECKED = 3  # first steps whose losses must agree
AGAINST = "transformers"


class RandomBatches:
    """Token ids drawn by the sequence's number: a step costs the same on any text."""

    def __init__(self, vocab_size: int, block_size: int) -> None:
        self.vocab_size, self.block_size = vocab_size, block_size
        self.sequences = 10**9

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        rows = [
            torch.randint(
                self.vocab_size, (self.block_size + 1,), generator=torch.Generator().manual_seed(n)
            )
            for n in range(first, first + count)
        ]
        ids = torch.stack(rows)
        return ids[:, :-1], ids[:, 1:]


class Ours:
    """train.py's own step, with its flags' defaults."""

    def __init__(
        self, folder: Path, device: str, batch_size: int, block_size: int, flag: str
    ) -> None:
        self.config = TrainConfig(
            data="pydocs",
            init=str(folder),
            batch_size=batch_size,
            block_size=block_size,
            steps=10**6,
            lr=RATE,
            warmup=0,
            schedule="constant",
            device=device,
            dtype=DTYPE[device],
            activation_checkpointing=flag == "--activation_checkpointing",
            compile=flag == "--compile",
        )
        world = distributed.join(device)
        self.trainer = Trainer(self.config, load_model(folder, device), world)

    def step(self, batches: RandomBatches, n: int) -> float:
        return train.take_step(self.config, self.trainer, batches, n)["loss"]


def make_arm(
    name: str, folder: Path, shape: tuple[GPTConfig, int, int], device: str
) -> Callable[[], float]:
    """Return a function that takes the next step and returns the loss."""
    model, batch_size, block_size = shape
    batches, state = RandomBatches(model.vocab_size, block_size), {"step": 0}
    if name.startswith("ours"):
        ours = Ours(folder, device, batch_size, block_size, name.partition(", ")[2])
    elif name == "nanoGPT's recipe":
        peer: peers.Peer = peers.NanoGPT(folder, device)
    else:
        peer = peers.Transformers(folder, device, fused="fused" in name or "compiled" in name)
    if not name.startswith("ours") and device == "cuda":
        peer.precision = torch.autocast(device, torch.bfloat16)
        if "compiled" in name or "recipe" in name:
            peer.model = torch.compile(peer.model)

    def step() -> float:
        state["step"] += 1
        if name.startswith("ours"):
            return ours.step(batches, state["step"])
        x, y = batches.rows((state["step"] - 1) * batch_size, batch_size)
        return peer.step(x.to(device), y.to(device), RATE)

    return step


ARMS = {
    "cpu": (
        "ours",
        "ours, --activation_checkpointing",
        "transformers",
        "transformers, fused AdamW",
        "nanoGPT's recipe",
    ),
    "cuda": (
        "ours",
        "ours, --compile",
        "transformers",
        "transformers, compiled",
        "nanoGPT's recipe",
    ),
}


def measure_memory(name: str, folder: Path, shape: tuple[GPTConfig, int, int], device: str) -> dict:
    """Peak bytes of three steps above the imports' memory; run in its own process."""
    if name.startswith("transformers"):
        from transformers import GPT2LMHeadModel  # noqa: F401
    before, _ = harness.memory_of_this_process()
    step = make_arm(name, folder, shape, device)
    for _ in range(CHECKED):
        step()
    if device == "cuda":
        return {"peak": torch.cuda.max_memory_allocated()}
    return {"peak": harness.memory_of_this_process()[1] - before}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small shape; writes nothing")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch_size", type=int, help="sequences in a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", metavar="ARM", help="print the profile of one arm")
    parser.add_argument("--memory", nargs=2, metavar=("ARM", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    called = "quick" if args.quick else "124M on a GPU" if args.device == "cuda" else "124M"
    model, batch_size, block_size = SHAPES[called]
    batch_size = args.batch_size or batch_size
    shape, arms = (model, batch_size, block_size), ARMS[args.device]
    if args.memory:
        name, folder = args.memory
        print(json.dumps(measure_memory(name, Path(folder), shape, args.device)))
        return
    rig = harness.rig(args.device, dtype=DTYPE[args.device])
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_model(GPT(model), folder)
        make = partial(make_arm, folder=Path(folder), shape=shape, device=args.device)
        if args.profile:
            profile(make(args.profile))
            return
        flags = ["--quick"] if args.quick else []
        flags += ["--device", args.device, "--batch_size", str(batch_size)]
        memory = {
            name: harness.in_a_process("benchmarks.bench_train", *flags, "--memory", name, folder)[
                "peak"
            ]
            for name in arms
        }
        steps = {name: make(name) for name in arms}
        losses = {name: [step() for _ in range(CHECKED)] for name, step in steps.items()}
        apart = harness.assert_equal(losses, AGAINST, TOLERANCE[args.device])
        wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
        times = harness.interleave(steps, args.rounds, wait)
    tokens = batch_size * block_size
    flops = estimate.model_flops(model, tokens, block_size)
    rate = estimate.device_rate(args.device, DTYPE[args.device])
    rows = [
        (
            name,
            harness.spread(times[name]),
            f"{tokens / times[name].median:,.0f}",
            f"{flops / times[name].median / rate.flops:.0%}",
            f"{times[AGAINST].median / times[name].median:.2f}x",
            f"{times[name].cpu:.2f}",
            f"{times[AGAINST].cpu / times[name].cpu:.2f}x",
            f"{memory[name] / 1e9:.2f} GB",
            f"{memory[name] / memory[AGAINST]:.2f}x",
        )
        for name in arms
    ]
    header = ["arm", "seconds a step (least-most)", "tokens/s", "MFU", "speed"]
    header += ["CPU seconds", "speed by them", "peak memory", "memory"]
    body = (
        f"A step of {batch_size} x {block_size} tokens, {called}, {DTYPE[args.device]}, AdamW, "
        f"clipped. MFU is of {rate.flops / 1e12:,.2f} TFLOP/s, {rate.source}. Times are the "
        f"median of {args.rounds} rounds, the arms taking turns in one process. Ratios against "
        f"{AGAINST}. The first {CHECKED} losses agree within {apart:.1e}. Peak memory: each arm in "
        f"its own process, above its imports.\n\n{harness.table(header, rows)}"
    )
    raw = {
        "shape": called,
        "batch_size": batch_size,
        "rate": rate,
        "seconds": times,
        "memory": memory,
        "losses": losses,
    }
    result = f"train_{args.device}" + (f"_{batch_size}" if args.batch_size else "")
    harness.report(result, "A training step", rig, body, raw, keep=not args.quick)


def profile(step: Callable[[], float]) -> None:
    """Profile two steps with torch's profiler; print the operations, sorted by self time."""
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiled:
        step()
        step()
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))


if __name__ == "__main__":
    main(sys.argv[1:])
