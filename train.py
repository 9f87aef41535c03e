"""Train or fine-tune a GPT-2 on text: python train.py book.txt

Top to bottom: the command line -> the model -> the text as token ids -> the optimizer -> the loop.
What is not the lesson (batches, checkpoint files, the tokenizer) is in nanogpt2/.
"""

import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt2 import terminal
from nanogpt2.config import SENSIBLE_SAMPLING, GPTConfig, TrainConfig, fail, parse
from nanogpt2.training.run_folder import RunFolder

if TYPE_CHECKING:
    import torch

    from nanogpt2.data.corpus import Corpus, Ids
    from nanogpt2.model import GPT
    from nanogpt2.tokenizer import Tokenizer

SAMPLE_TOKENS = 60


def main(argv: list[str]) -> None:
    """Run the command line `argv`: what is wrong with it is said before anything is written."""
    config = parse(TrainConfig, argv)
    terminal.exit_on_signals()
    folder = RunFolder(Path(config.out))
    try:
        config = folder.check(config)

        from nanogpt2.data.corpus import load_corpus
        from nanogpt2.training.checkpoint import latest_checkpoint

        checkpoint = latest_checkpoint(folder.checkpoints) if config.resume else None
        model, tokenizer = make_model(config, checkpoint)
        corpus = load_corpus(config.data, tokenizer)
        config = fill_in(config, model, len(corpus.train))
        folder.lock()
        folder.check_corpus(config, corpus.sha256)
    except (ValueError, OSError) as error:
        fail(str(error))
    try:
        train(config, folder, model, tokenizer, corpus, checkpoint)
    except (FloatingPointError, OSError) as error:
        fail(str(error), code=1)


def make_model(config: TrainConfig, checkpoint: Path | None) -> "tuple[GPT, Tokenizer]":
    """Load the model to start from, or draw a new one; with its tokenizer."""
    import torch

    from nanogpt2.model import GPT
    from nanogpt2.tokenizer import byte_tokenizer, gpt2_tokenizer
    from nanogpt2.weights import choose_device, load_model, tokenizer_for

    torch.manual_seed(config.seed)
    device = choose_device(config.device)
    if checkpoint is not None or config.init != "scratch":
        model = load_model(checkpoint or config.init, device, dropout=config.dropout)
        return model, tokenizer_for(model.config.vocab_size)
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
    return GPT(shape).to(device), tokenizer


def fill_in(config: TrainConfig, model: "GPT", tokens: int) -> TrainConfig:
    """Replace the automatic values by those that suit the model, the device and the text's size."""
    on_gpu = model.wte.weight.device.type == "cuda"
    longest = model.config.block_size
    block_size = config.block_size or min(longest, 1024 if on_gpu else 256, max(8, tokens - 1))
    if block_size > longest:
        raise ValueError(f"--block_size must be <= {longest}, the model's, not {block_size}")
    sequences = config.batch_size * config.grad_accum
    steps = config.steps or math.ceil(config.epochs * (tokens // block_size) / sequences)
    lr = config.lr
    if lr is None:
        width = model.config.n_embd
        # wider models take smaller steps; a new model takes larger ones than a trained one
        lr = min(3e-3, 6e-4 * 768 / width) if config.init == "scratch" else 1e-4 * 768 / width
    eval_every = config.eval_every or max(1, steps // 10)
    return replace(
        config,
        block_size=block_size,
        steps=steps,
        lr=lr,
        warmup=min(100, steps // 20) if config.warmup is None else config.warmup,
        dtype=("bfloat16" if on_gpu else "float32") if config.dtype == "auto" else config.dtype,
        eval_every=eval_every,
        save_every=config.save_every or eval_every,
    )


def train(
    config: TrainConfig,
    folder: RunFolder,
    model: "GPT",
    tokenizer: "Tokenizer",
    corpus: "Corpus",
    checkpoint: Path | None,
) -> None:
    """Run the steps after `checkpoint`, or all of them, and leave the model in the run's folder.

    Raises FloatingPointError where the loss or the gradients are not finite.
    """
    import torch

    from nanogpt2.data.loader import BatchLoader
    from nanogpt2.training import checkpoint as store
    from nanogpt2.training.optim import learning_rate, make_optimizer

    device = model.wte.weight.device
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    batches = BatchLoader(corpus.train, config.batch_size, config.block_size, config.seed)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
    prompt = tokenizer.encode(config.prompt) or corpus.validation[:8].tolist()

    step, best = 0, math.inf
    if checkpoint is None:
        if config.resume:
            terminal.note("the run to resume has no whole checkpoint yet: starting over")
        before = {
            "sample": sample_text(model, tokenizer, prompt, config.seed),
            "val_loss": evaluate(model, corpus.validation, config, autocast),
        }
        folder.start(config, corpus_sha256=corpus.sha256, before=before)
    else:
        state = store.restore(checkpoint, optimizer)
        step, best = state["step"], state["best"]
        folder.cut_metrics(step)
        before = folder.record()["before"]
        terminal.note(f"resuming after step {step}")
    terminal.note(describe(config, model, corpus))
    print(f"before training:\n{before['sample']}\n", flush=True)

    signals = terminal.Signals()
    model.train()
    with terminal.progress(config.steps, step, "step") as bar:
        while step < config.steps:
            step += 1
            started = time.perf_counter()
            lr = learning_rate(step, config.steps, config.warmup, config.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = 0.0
            for micro in range((step - 1) * config.grad_accum, step * config.grad_accum):
                x, y = (ids.to(device) for ids in batches.batch(micro))  # each (B, T)
                with autocast:
                    micro_loss = model(x, y) / config.grad_accum
                micro_loss.backward()
                loss += micro_loss.item()
            max_norm = config.grad_clip or math.inf
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
            if not math.isfinite(loss + norm):
                raise FloatingPointError(
                    f"step {step}: loss {loss}, gradient norm {norm}; no update was made. Try a "
                    f"lower --lr than {config.lr:g}; the last good checkpoint is kept"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens = config.batch_size * config.block_size * config.grad_accum
            speed = tokens / (time.perf_counter() - started)
            figures = {
                "step": step,
                "loss": loss,
                "lr": lr,
                "grad_norm": norm,
                "tokens_per_second": round(speed, 1),
            }

            last = step == config.steps or signals.received is not None
            improved = False
            if step % config.eval_every == 0 or step == config.steps:
                figures["val_loss"] = evaluate(model, corpus.validation, config, autocast)
                improved = figures["val_loss"] < best
                best = min(best, figures["val_loss"])
                terminal.note(f"step {step}: loss {loss:.4f}, val_loss {figures['val_loss']:.4f}")
            folder.log(**figures)
            bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
            if improved or last or step % config.save_every == 0:
                folder.sync_metrics()
                saved = store.save_checkpoint(
                    folder.checkpoints, step, model, tokenizer, optimizer, {"best": best}
                )
                if improved:
                    store.mark_best(saved)
                store.publish(saved, folder.path)
                store.prune(folder.checkpoints, config.keep)
            if signals.received is not None:
                terminal.note(f"stopped after step {step}; --resume goes on")
                sys.exit(128 + signals.received)

    after = sample_text(model, tokenizer, prompt, config.seed)
    print(f"after training:\n{after}\n")
    val_loss = figures["val_loss"]
    print(f"validation loss {before['val_loss']:.4f} -> {val_loss:.4f} (best {best:.4f})")
    print(f"python sample.py --model {folder.path}")


def evaluate(model: "GPT", ids: "Ids", config: TrainConfig, autocast: "torch.autocast") -> float:
    """Mean cross-entropy in nats a token over all of `ids`; draws no random number."""
    import torch

    from nanogpt2.data.loader import validation_batches

    model.eval()
    total, count = 0.0, 0
    with torch.no_grad(), autocast:
        for x, y in validation_batches(ids, config.batch_size, config.block_size):
            device = model.wte.weight.device
            counted = int((y != -100).sum())
            total += model(x.to(device), y.to(device)).item() * counted
            count += counted
    model.train()
    return total / count


def sample_text(model: "GPT", tokenizer: "Tokenizer", prompt: list[int], seed: int) -> str:
    """The prompt continued, by a random generator of its own."""
    import torch

    from nanogpt2.generation import generate

    ids = torch.tensor([prompt], device=model.wte.weight.device)
    out = generate(model, ids, max_new_tokens=SAMPLE_TOKENS, seed=seed, **SENSIBLE_SAMPLING)
    return tokenizer.decode(out.sequences[0].tolist())


def describe(config: TrainConfig, model: "GPT", corpus: "Corpus") -> str:
    """One line on what is about to run."""
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"{parameters:,} parameters, {len(corpus.train):,} tokens to train on, "
        f"{len(corpus.validation):,} to validate, {config.steps:,} steps of "
        f"{config.grad_accum * config.batch_size} x {config.block_size} tokens in {config.dtype}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
