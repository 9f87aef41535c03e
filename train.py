"""Train or fine-tune a GPT-2 on text: python train.py book.txt.

Top to bottom: the command line -> the model -> the data -> the loop, its step, its evaluation.
What is not the lesson (batches, optimizers, checkpoint files, several devices) is in nanogpt2/.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanogpt2 import terminal
from nanogpt2.config import TrainConfig, fail, parse, usage_error
from nanogpt2.training.run_folder import RunFolder

if __name__ == "__main__":
    # before torch loads: --help and mistakes answer at once
    terminal.prepare()
    with terminal.checked_output():
        CONFIG = parse(TrainConfig, sys.argv[1:])
    with usage_error("--out"):
        CONFIG = RunFolder(Path(CONFIG.out)).check(CONFIG)

import torch

from nanogpt2 import ops
from nanogpt2.checkpoints import load as weights
from nanogpt2.checkpoints.folder import model_digest
from nanogpt2.classifier import GPTClassifier, Model
from nanogpt2.data.corpus import Columns, Corpus, load_corpus
from nanogpt2.data.examples import Examples
from nanogpt2.data.loader import Batches, ValidationBatches, make_batches, validation_batches
from nanogpt2.data.preview import preview
from nanogpt2.tokenizer import Tokenizer, byte_tokenizer, gpt2_tokenizer
from nanogpt2.training import checkpoint as store
from nanogpt2.training import distributed, plan
from nanogpt2.training.adapter import save_adapter
from nanogpt2.training.optim import learning_rate
from nanogpt2.training.report import TensorBoard, finish
from nanogpt2.training.snapshot import Snapshot, take_snapshot
from nanogpt2.training.trainer import Trainer
from nanogpt2.training.validation import validate


@dataclass(frozen=True)
class Run:
    """All that a run works with."""

    config: TrainConfig
    folder: RunFolder
    trainer: Trainer
    tokenizer: Tokenizer
    batches: Batches
    validation: ValidationBatches
    prompt: list[int]  # of the samples; a classifier has none


def main(config: TrainConfig) -> None:
    """Make everything ready, then train: what cannot work is said before anything is written."""
    folder = RunFolder(Path(config.out))
    with usage_error("--device"):
        world = distributed.join(config.device)
    folder.writes = world.is_first
    terminal.speak(world.is_first)
    try:
        with usage_error("--resume"):
            checkpoint = store.latest_checkpoint(folder.checkpoints) if config.resume else None
        tensors, state = store.read_checkpoint(checkpoint) if checkpoint else ({}, {})
        if state.get("finished") and "after" in folder.record():
            terminal.note(f"the run in {folder.path} is finished: nothing to resume")
            return
        with usage_error():
            ops.choose_kernels(config.kernels, world.device)
        with usage_error("--init"):
            model, tokenizer = make_model(config, checkpoint, world.device)
            model.use_kernels(config.kernels, world.device)
        with usage_error("DATA"), world.first_before_others():
            corpus = read_data(config, model, tokenizer)
        with usage_error("--resume"):
            init = {"init": model_digest(config.init)} if config.lora_rank else {}
            folder.hold_to(config, data=corpus.sha256, **init)
        if config.task == "classify" and not isinstance(model, GPTClassifier):
            model = GPTClassifier(model, corpus.labels)
        with usage_error():
            block_size = plan.block_size(config, model.config, world, corpus.rooms)
            batches = make_batches(corpus.train, block_size, config.seed)
            config = plan.fill_in(config, model.config, world, block_size, batches.sequences)
        validation = validation_batches(corpus.validation, config.batch_size, block_size)
        trainer = Trainer(config, model, world)
        prompt = tokenizer.encode(config.prompt) or corpus.prompt(tokenizer)
        run = Run(config, folder, trainer, tokenizer, batches, validation, prompt)
        if isinstance(corpus.train, Examples):
            first = state.get("step", 0) * config.batch_size * config.grad_accum
            x, y = batches.rows(first, min(2, config.batch_size))
            terminal.note(preview(x, y, tokenizer, corpus.labels))
        if config.dry_run:
            speed = [take_step(config, trainer, batches, step) for step in (1, 2)][-1]
            terminal.write(plan.describe(config, trainer, batches.sequences, speed) + "\n")
            return
        with usage_error("--out"):
            folder.lock()
        if checkpoint is not None:
            trainer.restore(tensors, state["micro_batch"])
        train(run, state)
    except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        fail(str(error), code=1)
    finally:
        folder.close()
        world.leave()


def make_model(
    config: TrainConfig, checkpoint: Path | None, device: str
) -> tuple[Model, Tokenizer]:
    """Load the model to start from, or draw a new one; with its tokenizer."""
    torch.manual_seed(config.seed)
    # what is to be shared out is read on the CPU
    device = "cpu" if config.fsdp else device
    if config.init == "scratch" and checkpoint is None:
        tokenizer = gpt2_tokenizer() if config.tokenizer == "gpt2" else byte_tokenizer()
        shape = config.shape(tokenizer.vocab_size, tokenizer.end_of_text)
        return weights.new_model(shape, device), tokenizer
    # adapters are trained beside the weights that the run began with
    source = config.init if checkpoint is None or config.lora_rank else checkpoint
    has_head = config.task == "classify" and weights.is_classifier(source)
    load = weights.load_classifier if has_head else weights.load_model
    return load(source, device, dropout=config.dropout), weights.load_tokenizer(source)


def read_data(config: TrainConfig, model: Model, tokenizer: Tokenizer) -> Corpus:
    """Read the task's data; a model that knows labels allows no others."""
    return load_corpus(
        config.data,
        tokenizer,
        config.task,
        validation=config.validation,
        columns=Columns(config.text_column, config.label_column),
        vocab_size=model.config.vocab_size,
        labels=getattr(model, "labels", None),
    )


def train(run: Run, state: dict[str, Any]) -> None:
    """Take the steps after the checkpoint's, or all of them; leave the model in the folder."""
    config, folder, trainer = run.config, run.folder, run.trainer
    if not state:
        if config.resume:
            terminal.note("no checkpoint yet: starting over")
        state = {"step": 0, "best": math.inf, "stale": 0, "finished": False}
        before = snapshot(run, validate(trainer, run.validation))
        folder.start(config, before=asdict(before))
    else:
        before = Snapshot(**folder.record()["before"])
        folder.cut_metrics(state["step"])
        if trainer.world.is_first:
            store.settle(folder.path, state, config.keep)
        terminal.note(f"resuming after step {state['step']}")
    if config.tensorboard and trainer.world.is_first:
        folder.loggers.append(TensorBoard(folder.path / "tensorboard", state["step"]).log)
    terminal.note(plan.describe(config, trainer, run.batches.sequences))

    signals, stopped = terminal.Signals(), 0
    with terminal.Progress(config.steps, state["step"], "step") as bar:
        while not (state["finished"] or stopped):
            step = state["step"] + 1
            figures = take_step(config, trainer, run.batches, step)
            state |= {"step": step, "figures": figures, "is_best": False}
            if step % config.eval_every == 0 or step == config.steps:
                figures |= validate(trainer, run.validation)
                state["is_best"] = figures["val_loss"] < state["best"]
                state["best"] = min(figures["val_loss"], state["best"])
                state["stale"] = 0 if state["is_best"] else state["stale"] + 1
            state["finished"] = step == config.steps or state["stale"] == config.patience
            stopped = trainer.world.largest(signals.received or 0)
            folder.log(figures)
            bar.show(figures)
            if stopped or state["finished"] or state["is_best"] or step % config.save_every == 0:
                save(run, state)
            if config.sample_every and step % config.sample_every == 0:
                terminal.note(f"step {step}:\n{snapshot(run, figures).sample}")

    if not state["finished"]:
        terminal.note(f"stopped after step {step}: --resume goes on")
        sys.exit(128 + stopped)
    after = snapshot(run, state["figures"])
    if trainer.world.is_first:
        if config.lora_rank:
            save_adapter(trainer.eval_model, folder.path / "adapter", config.init)
        finish(folder.path, before, after, state["best"], config.task)
        folder.end(after=asdict(after))


def take_step(config: TrainConfig, trainer: Trainer, batches: Batches, step: int) -> dict[str, Any]:
    """Update the model once and return the step's figures.

    Raises FloatingPointError, before the update, where the loss or a gradient is not finite, and
    OutOfMemoryError where not even one sequence at a time fits.
    """
    started = time.perf_counter()
    lr = learning_rate(step, config.steps, config.warmup, config.lr, config.schedule)
    share = config.batch_size * config.grad_accum // trainer.world.size
    first = ((step - 1) * trainer.world.size + trainer.world.rank) * share
    loss = None
    while loss is None:
        cuts = range(first, first + share, trainer.micro_batch)
        parts = [batches.rows(i, min(trainer.micro_batch, first + share - i)) for i in cuts]
        counts = [int((y != -100).sum()) for _, y in parts]
        targets, tokens = trainer.world.sum(sum(counts), sum(x.numel() for x, _ in parts))
        try:
            # every target counts the same, in whichever micro-batch it is
            losses = [
                trainer.backward(x, y, count / targets, last=i == cuts[-1])
                for i, (x, y), count in zip(cuts, parts, counts, strict=True)
            ]
            (loss,) = trainer.world.sum(torch.stack(losses).sum().item())
        except RuntimeError as error:
            trainer.make_room(error)
    norm = trainer.gradient_norm()
    # float16's scaled gradients may overflow: the scale falls, the weights stay
    overflow = trainer.scaler.is_enabled() and not math.isfinite(norm)
    if not (math.isfinite(loss) and (math.isfinite(norm) or overflow)):
        raise FloatingPointError(
            f"step {step} (sequences {first} to {first + share - 1}): loss {loss}, gradient norm "
            f"{norm}: stopped before the update; the last checkpoint is kept. Try a lower --lr"
        )
    trainer.step(lr, apply=not overflow)
    speed = tokens / (time.perf_counter() - started)
    figures = {"step": step, "loss": loss, "lr": lr, "grad_norm": None if overflow else norm}
    return figures | {"tokens_per_second": speed} | trainer.meter(speed)


def save(run: Run, state: dict[str, Any]) -> None:
    """Commit a checkpoint: every process brings its share, the first one writes."""
    model, tensors = run.trainer.exported(), run.trainer.tensors()
    state["micro_batch"] = run.trainer.micro_batch
    if run.trainer.world.is_first:
        run.folder.sync_metrics()
        store.commit(run.folder.path, model, run.tokenizer, tensors, state, run.config.keep)


def snapshot(run: Run, figures: dict[str, float]) -> Snapshot:
    """How the model is now: every process takes part, the first one's writes a sample."""
    prompt = run.prompt if run.trainer.world.is_first else []
    return take_snapshot(run.trainer.exported(), run.tokenizer, prompt, run.config.seed, figures)


if __name__ == "__main__":
    main(CONFIG)
