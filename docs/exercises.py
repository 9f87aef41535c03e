"""Break one thing in GPT-2 and see what the loss does: `python docs/exercises.py [NAME ...]`.

Each exercise replaces lines of model.py or ops.py in memory; no file changes. The broken model
gets the demo model's weights. The script prints its loss on a text at once, and after some steps
of training on another part of that text. docs/exercises.md has the questions and the solutions,
and tests/test_exercises.py compares them with this script's numbers. This file does not know the
solutions. It stands in docs/ because readers run it beside the page; no program imports it.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
# the exercises replace whole lines, so run the source beside this file and no installed one
sys.path.insert(0, str(ROOT))

from nanogpt2 import GPT, load_model, load_tokenizer  # noqa: E402

STEPS, BATCH, LENGTH = 16, 4, 32

# name -> (file, line, its replacement), in reading order
EXERCISES: Mapping[str, list[tuple[str, str, str]]] = {
    "as it is": [],
    "erf GELU": [
        (
            "ops.py",
            "y = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))",
            "y = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))",
        )
    ],
    "no scaling": [
        (
            "ops.py",
            "scores = _float32(q) @ _float32(k).transpose(2, 3) / math.sqrt(q.size(3))",
            "scores = _float32(q) @ _float32(k).transpose(2, 3)",
        )
    ],
    "mask one too far": [("ops.py", ".tril()", ".tril(1)")],
    "mask one too short": [("ops.py", ".tril()", ".tril(-1)")],
    "post-norm": [
        (
            "model.py",
            "x = x + self.attn(self.ln_1(x), mask, cache)",
            "x = self.ln_1(x + self.attn(x, mask, cache))",
        ),
        (
            "model.py",
            "return x + self.mlp(self.ln_2(x))",
            "return self.ln_2(x + self.mlp(x))",
        ),
    ],
    "untied head": [
        (
            "model.py",
            "self.ln_f = LayerNorm(config)",
            "self.ln_f = LayerNorm(config); self.head = nn.Embedding(*self.wte.weight.shape)",
        ),
        (
            "model.py",
            "rows, weight = x.flatten(0, 1), self.head_weight",
            "rows, weight = x.flatten(0, 1), self.head.weight",
        ),
    ],
}


def broken_module(file: str, changes: list[tuple[str, str, str]]) -> ModuleType:
    """Run a source file of nanogpt2 with its changes, as a module of its own.

    Raises ValueError where a line to replace does not stand exactly once in the file.
    """
    source = (ROOT / "nanogpt2" / file).read_text(encoding="utf-8")
    for name, line, replacement in changes:
        if name == file and source.count(line) != 1:
            raise ValueError(f"{file} has {source.count(line)} times, not once: {line}")
        if name == file:
            source = source.replace(line, replacement)
    module = ModuleType(f"broken_{file.removesuffix('.py')}")
    exec(compile(source, file, "exec"), module.__dict__)
    return module


def broken_model(name: str) -> GPT:
    """Return the demo model with the mistake of an exercise."""
    torch.manual_seed(0)
    module = broken_module("model.py", EXERCISES[name])
    module.__dict__["ops"] = broken_module("ops.py", EXERCISES[name])
    demo = load_model("demo")
    model: GPT = module.GPT(demo.config)
    # a head of its own has no tensor in the checkpoint
    model.load_state_dict(demo.state_dict(), strict=False)
    # the kernels that are written out as formulas
    model.use_kernels("reference")
    return model


def text() -> tuple[Tensor, Tensor]:
    """Return the tokens to train on, and those to measure the loss on."""
    tokens = (ROOT / "docs/harbour.txt").read_text(encoding="utf-8")
    ids = torch.tensor(load_tokenizer("demo").encode(tokens))
    cut = len(ids) * 3 // 4
    return ids[:cut], ids[cut:]


def batch(ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sequences and their targets, each (BATCH, LENGTH)."""
    starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=generator).tolist()
    rows = torch.stack([ids[i : i + LENGTH + 1] for i in starts])
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def loss_on(model: GPT, ids: Tensor) -> float:
    """Measure the mean loss of a text's next tokens, LENGTH at a time."""
    rows = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    return model(rows[:, :-1], rows[:, 1:]).item()


def train(model: GPT, ids: Tensor, steps: int = STEPS, lr: float = 1e-3) -> None:
    """Train on random pieces of the text, the same for every model."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)
    for _ in range(steps):
        x, y = batch(ids, generator)
        model(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def losses(name: str, steps: int = STEPS) -> tuple[float, float]:
    """Measure an exercise: the loss at once, and after training."""
    model, (seen, unseen) = broken_model(name), text()
    at_once = loss_on(model, unseen)
    train(model, seen, steps)
    return at_once, loss_on(model, unseen)


def main(names: list[str]) -> None:
    """Print the table, a line as soon as it is measured."""
    unknown = [name for name in names if name not in EXERCISES]
    if unknown:
        sys.exit(f"error: exercise {unknown[0]!r}: expected one of {', '.join(EXERCISES)}")
    print(f"{'':20}{'loss at once':>14}{f'after {STEPS} steps':>18}")
    for name in names or EXERCISES:
        at_once, after = losses(name)
        print(f"{name:20}{at_once:14.2f}{after:18.2f}", flush=True)


if __name__ == "__main__":
    # one thread: the matrices are small, and the sums keep their order
    torch.set_num_threads(1)
    main(sys.argv[1:])
