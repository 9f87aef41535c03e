"""How good is a trained model? Writes docs/demo.md and its loss curve from a run and its text.

    python benchmarks/demo_report.py RUN DATA

RUN is a folder written by train.py, DATA its training text. The report measures three predictors on
the same validation tokens:

- unigram: p(w) = (c(w) + 1) / (N + V);
- interpolated bigram, absolute discounting (Ney, Essen and Kneser 1994) with the usual estimate
  D = n1 / (n1 + 2 n2): p(w | h) = max(c(h, w) - D, 0) / c(h) + D t(h) / c(h) p(w), where t(h)
  counts the different tokens seen after h;
- the demo model: the weights packaged with the project, in float32.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

from nanogpt2 import generate, load_model, load_tokenizer
from nanogpt2.config import SENSIBLE_SAMPLING
from nanogpt2.data.corpus import Ids, load_corpus
from nanogpt2.data.loader import validation_batches

ROOT = Path(__file__).parent.parent
PROMPT = "The state of the Union is"


def ngram_losses(train: Ids, validation: Ids, vocab_size: int) -> tuple[float, float]:
    """Cross-entropies of unigram and bigram, in nats a token, on all tokens but the first."""
    train, validation = train.astype(np.int64), validation.astype(np.int64)
    counts = np.bincount(train, minlength=vocab_size)
    unigram = (counts + 1) / (len(train) + vocab_size)

    pairs, seen = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    before = np.bincount(train[:-1], minlength=vocab_size)  # c(h)
    followers = np.bincount(pairs // vocab_size, minlength=vocab_size)  # t(h)
    discount = (seen == 1).sum() / ((seen == 1).sum() + 2 * (seen == 2).sum())
    h, w = validation[:-1], validation[1:]
    place = np.minimum(np.searchsorted(pairs, h * vocab_size + w), len(pairs) - 1)
    together = np.where(pairs[place] == h * vocab_size + w, seen[place], 0)  # c(h, w)
    known = np.maximum(before[h], 1)
    bigram = (np.maximum(together - discount, 0) + discount * followers[h] * unigram[w]) / known
    bigram = np.where(before[h] > 0, bigram, unigram[w])
    return float(-np.log(unigram[w]).mean()), float(-np.log(bigram).mean())


@torch.no_grad()
def model_loss(model: torch.nn.Module, validation: Ids, block_size: int) -> float:
    """Cross-entropy in nats a token, in windows of `block_size`."""
    total, count = 0.0, 0
    for x, y in validation_batches(validation, 8, block_size):
        targets = int((y != -100).sum())
        total += model(x, y).item() * targets
        count += targets
    return total / count


def draw_curve(rows: list[dict], path: Path) -> None:
    """Plot training loss, smoothed over 20 steps, and validation loss against the step."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = np.convolve([row["loss"] for row in rows], np.ones(20) / 20, mode="valid")
    evaluated = [row for row in rows if "val_loss" in row]
    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(range(20, len(rows) + 1), losses, lw=0.8, label="training, mean of 20 steps")
    axes.plot(
        [row["step"] for row in evaluated],
        [row["val_loss"] for row in evaluated],
        "o-",
        ms=3,
        label="validation",
    )
    axes.set(xlabel="step", ylabel="nats a token", ylim=(3.5, 8))
    axes.legend()
    figure.savefig(path, dpi=110)


def main(run: Path, data: str) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((run / "run.json").read_text())
    config = record["config"]
    model, tokenizer = load_model("demo"), load_tokenizer("demo")
    corpus = load_corpus(data, tokenizer)
    assert corpus.sha256 == record["corpus_sha256"], "DATA is not the text that RUN was trained on"
    unigram, bigram = ngram_losses(corpus.train, corpus.validation, tokenizer.vocab_size)
    loss = model_loss(model, corpus.validation, config["block_size"])

    def fill(template: str) -> str:
        shape = model.config
        size = sum(p.numel() for p in model.parameters())
        return template.format(
            parameters=f"{size:,}",
            shape=f"{shape.n_layer} layers, {shape.n_head} heads, width {shape.n_embd}",
            tokens=f"{len(corpus.train):,}",
            held_out=f"{len(corpus.validation):,}",
            corpus_sha256=corpus.sha256,
            **{key: config[key] for key in ("batch_size", "block_size", "epochs", "seed", "dtype")},
            steps=f"{config['steps']:,}",
            lr=f"{config['lr']:g}",
            warmup=config["warmup"],
            losses="\n".join(
                f"| {name} | {nats:.3f} | {np.exp(nats):,.0f} |"
                for name, nats in (
                    ("unigram", unigram),
                    ("interpolated bigram", bigram),
                    ("the demo model", loss),
                )
            ),
            curve="\n".join(
                f"| {row['step']:,} | {row['loss']:.3f} | {row['val_loss']:.3f} |"
                for row in rows
                if "val_loss" in row
            ),
            samples="\n\n".join(sample(model, tokenizer, seed) for seed in range(10)),
        )

    template = (Path(__file__).parent / "demo_report.md").read_text()
    (ROOT / "docs/demo.md").write_text(fill(template))
    draw_curve(rows, ROOT / "docs/demo_curve.png")
    print(json.dumps({"unigram": unigram, "bigram": bigram, "demo": loss}))


def sample(model, tokenizer, seed: int) -> str:
    """Quote the output of `sample.py PROMPT --model demo --seed SEED`."""
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    out = generate(model, ids, max_new_tokens=100, seed=seed, **SENSIBLE_SAMPLING)
    text = tokenizer.decode([i for i in out.sequences[0].tolist() if i != tokenizer.end_of_text])
    return f"Seed {seed}:\n\n" + "\n".join(f"> {line}".rstrip() for line in text.splitlines())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
