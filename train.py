"""Train or fine-tune a GPT-2 on text: python train.py book.txt.

Top to bottom: the command line -> the model -> the text as token ids -> the optimizer -> the loop.
What is not the lesson (batches, checkpoint files, the tokenizer) is in nanogpt2/.
"""

import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanogpt2 import terminal
from nanogpt2.config import SENSIBLE_SAMPLING, GPTConfig, TrainConfig, fail, parse, wrong_use
from nanogpt2.training.run_folder import RunFolder

if __name__ == "__main__":
    # before torch loads: --help and mistakes answer at once
    terminal.prepare()
    CONFIG = parse(TrainConfig, sys.argv[1:])
    with wrong_use("--out"):
        CONFIG = RunFolder(Path(CONFIG.out)).check(CONFIG)

import torch

from nanogpt2.data.corpus import Corpus, Ids, load_corpus
from nanogpt2.data.loader import BatchLoader, validation_batches
from nanogpt2.generation import generate
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer, byte_tokenizer, gpt2_tokenizer
from nanogpt2.training import checkpoint as store
from nanogpt2.training.optim import learning_rate, make_optimizer
from nanogpt2.weights import choose_device, load_model, load_tokenizer, new_model

SAMPLE_TOKENS = 60


def main(config: TrainConfig) -> None:
    """Make everything ready, then train: what cannot work is said before anything is written."""
    folder = RunFolder(Path(config.out))
    checkpoint = store.latest_checkpoint(folder.checkpoints) if config.resume else None
    if config.resume and checkpoint is None and store.checkpoints(folder.checkpoints):
        fail(f"--resume: no checkpoint in {str(folder.checkpoints)!r} is whole; none was removed")
    if checkpoint is not None and checkpoint.name == f"step-{config.steps}":
        terminal.note(f"the run in {folder.path} is finished: nothing to resume")
        return
    with wrong_use("--device"):
        device = choose_device(config.device)
    with wrong_use("--init"):
        model, tokenizer = make_model(config, checkpoint, device)
    with wrong_use("DATA"):
        corpus = load_corpus(config.data, tokenizer)
    with wrong_use("--block_size"):
        config = fill_in(config, model, len(corpus.train))
        batches = BatchLoader(corpus.train, config.batch_size, config.block_size, config.seed)
    with wrong_use("--out"):
        folder.check_corpus(config, corpus.sha256)
        folder.lock()
    try:
        train(config, folder, model, tokenizer, corpus, batches, checkpoint)
    except (FloatingPointError, OSError) as error:
        fail(str(error), code=1)
    finally:
        folder.close()


def make_model(config: TrainConfig, checkpoint: Path | None, device: str) -> tuple[GPT, Tokenizer]:
    """Load the model to start from, or draw a new one; with its tokenizer."""
    torch.manual_seed(config.seed)
    if checkpoint is not None or config.init != "scratch":
        source = checkpoint or config.init
        return load_model(source, device, dropout=config.dropout), load_tokenizer(source)
    tokenizer = gpt2_tokenizer() if config.tokenizer == "gpt2" else byte_tokenizer()
    shape = GPTConfig(
        vocab_size=tokenizer.vocab_size,
        block_size=config.block_size or 256,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        dropout=config.dropout,
        bos_token_id=tokenizer.end_of_text,
        eos_token_id=tokenizer.end_of_text,
    )
    return new_model(shape, device), tokenizer


def fill_in(config: TrainConfig, model: GPT, tokens: int) -> TrainConfig:
    """Replace the automatic values by those that suit the model, the device and the text's size."""
    on_gpu = model.wte.weight.device.type == "cuda"
    longest, width = model.config.block_size, model.config.n_embd
    block_size = config.block_size or min(longest, 1024 if on_gpu else 256, max(8, tokens - 1))
    if block_size > longest:
        raise ValueError(f"must be <= {longest}, the model's, not {block_size}")
    sequences = config.batch_size * config.grad_accum
    steps = config.steps or math.ceil(config.epochs * (tokens // block_size) / sequences)
    if (config.warmup or 0) > steps:
        fail(f"--warmup must be <= steps ({steps}), not {config.warmup}")
    # wider models take smaller steps; a new model takes larger ones than a trained one
    lr = min(3e-3, 6e-4 * 768 / width) if config.init == "scratch" else 1e-4 * 768 / width
    eval_every = config.eval_every or max(1, steps // 10)
    return replace(
        config,
        block_size=block_size,
        steps=steps,
        lr=lr if config.lr is None else config.lr,
        warmup=min(100, steps // 20) if config.warmup is None else config.warmup,
        dtype=("bfloat16" if on_gpu else "float32") if config.dtype == "auto" else config.dtype,
        eval_every=eval_every,
        save_every=config.save_every or eval_every,
    )


def train(
    config: TrainConfig,
    folder: RunFolder,
    model: GPT,
    tokenizer: Tokenizer,
    corpus: Corpus,
    batches: BatchLoader,
    checkpoint: Path | None,
) -> None:
    """Take the steps after `checkpoint`, or all of them; leave the model in the run's folder."""
    # the first whole words that the model has not been trained on
    words = tokenizer.decode(corpus.validation[:64].tolist()).split()[1:7]
    prompt = tokenizer.encode(config.prompt or " ".join(words)) or [tokenizer.end_of_text]
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    if checkpoint is None:
        before: dict[str, Any] = {
            "sample": sample_text(config, model, tokenizer, prompt),
            "val_loss": evaluate(config, model, corpus.validation),
        }
        folder.start(config, corpus_sha256=corpus.sha256, before=before)
        step, best = 0, math.inf
    else:
        state = store.restore(checkpoint, optimizer)
        step, best, before = state["step"], state["best"], folder.record()["before"]
        folder.cut_metrics(step)
    print_plan(config, model, corpus, step, before["sample"])

    signals = terminal.Signals()
    with terminal.Progress(config.steps, step, "step") as bar:
        while step < config.steps and signals.received is None:
            step += 1
            figures = take_step(config, model, optimizer, batches, step)
            improved = False
            if step % config.eval_every == 0 or step == config.steps:
                val_loss = figures["val_loss"] = evaluate(config, model, corpus.validation)
                if not math.isfinite(val_loss):
                    raise FloatingPointError(f"step {step}: val_loss {val_loss}; not saved")
                improved, best = val_loss < best, min(val_loss, best)
            folder.log(figures)
            bar.show(figures)
            stopping = step == config.steps or signals.received is not None
            if improved or stopping or step % config.save_every == 0:
                folder.sync_metrics()
                made = (step, model, tokenizer, optimizer, {"best": best})
                store.commit(folder.path, *made, is_best=improved, keep=config.keep)

    if step < config.steps:
        terminal.note(f"stopped after step {step}: --resume goes on")
        sys.exit(128 + signals.received)
    terminal.write(
        f"after training:\n{sample_text(config, model, tokenizer, prompt)}\n\n"
        f"validation loss {before['val_loss']:.4f} -> {val_loss:.4f} (best {best:.4f})\n"
        f"now try: python sample.py --model {folder.path}\n"
    )


def take_step(
    config: TrainConfig,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    batches: BatchLoader,
    step: int,
) -> dict[str, Any]:
    """Update the model once and return the step's figures.

    Raises FloatingPointError, before the update, where the loss or a gradient is not finite.
    """
    started = time.perf_counter()
    lr = learning_rate(step, config.steps, config.warmup, config.lr)
    for group in optimizer.param_groups:
        group["lr"] = lr
    model.train()
    loss, tokens = 0.0, 0
    for index in range((step - 1) * config.grad_accum, step * config.grad_accum):
        x, y = (ids.to(model.wte.weight.device) for ids in batches.batch(index))  # each (B, T)
        with precision(config, model):
            micro_loss = model(x, y) / config.grad_accum
        micro_loss.backward()
        loss += micro_loss.item()
        tokens += x.numel()
    max_norm = config.grad_clip or math.inf
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    if not math.isfinite(loss + norm):
        raise FloatingPointError(
            f"step {step}: loss {loss}, gradient norm {norm}: stopped before the update. The last "
            f"checkpoint is kept; try an --lr below {config.lr:g}"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    speed = tokens / (time.perf_counter() - started)
    return {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens_per_second": speed}


def precision(config: TrainConfig, model: GPT) -> torch.autocast:
    """In bfloat16 the matrix products are; the weights and the sums stay in float32."""
    device = model.wte.weight.device.type
    return torch.autocast(device, torch.bfloat16, enabled=config.dtype == "bfloat16")


@torch.no_grad()
def evaluate(config: TrainConfig, model: GPT, ids: Ids) -> float:
    """Mean cross-entropy in nats a token over all of `ids`; draws no random number."""
    model.eval()
    total, count = 0.0, 0
    for x, y in validation_batches(ids, config.batch_size, config.block_size):
        targets = int((y != -100).sum())
        device = model.wte.weight.device
        with precision(config, model):
            total += model(x.to(device), y.to(device)).item() * targets
        count += targets
    return total / count


def sample_text(config: TrainConfig, model: GPT, tokenizer: Tokenizer, prompt: list[int]) -> str:
    """The prompt continued, by a random generator of its own."""
    ids = torch.tensor([prompt], device=model.wte.weight.device)
    options = SENSIBLE_SAMPLING | {"max_new_tokens": SAMPLE_TOKENS, "seed": config.seed}
    return tokenizer.decode(generate(model, ids, **options).sequences[0].tolist())


def print_plan(config: TrainConfig, model: GPT, corpus: Corpus, step: int, sample: str) -> None:
    """Say what is about to run, and what the model writes before it."""
    parameters = sum(p.numel() for p in model.parameters())
    sequences = f"{config.batch_size * config.grad_accum} x {config.block_size} tokens"
    terminal.note(
        f"{parameters:,} parameters, {len(corpus.train):,} tokens to train on, "
        f"{len(corpus.validation):,} to validate, {config.steps:,} steps of {sequences}"
    )
    if config.resume:
        terminal.note(f"resuming after step {step}" if step else "no checkpoint yet: starting over")
    terminal.write(f"before training:\n{sample}\n\n")


if __name__ == "__main__":
    main(CONFIG)
