"""Train or fine-tune a GPT-2 on text: python train.py book.txt.

Top to bottom: the command line -> prepare -> the loop -> one step -> evaluate, save.
Supporting code (batches, optimizers, checkpoint files, several devices) lives in nanogpt2/.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nanogpt2 import terminal
from nanogpt2.config import IGNORE_INDEX, TrainConfig, parse, usage_error
from nanogpt2.training.run_folder import RunFolder

if __name__ == "__main__":
    # before the slow import of torch: --help and mistakes answer at once
    terminal.prepare()
    with terminal.checked_output():
        CONFIG = parse(TrainConfig, sys.argv[1:])
    with usage_error("--out"):
        CONFIG = RunFolder(Path(CONFIG.out)).check(CONFIG)

import torch
from torch import Tensor

from nanogpt2.data.loader import ORDER, Batches, MixedBatches
from nanogpt2.training import checkpoint as store
from nanogpt2.training import plan
from nanogpt2.training.adapter import save_adapter
from nanogpt2.training.optim import learning_rate
from nanogpt2.training.prepare import Run, joined, prepare
from nanogpt2.training.report import TensorBoard, finish
from nanogpt2.training.snapshot import Snapshot, take_snapshot
from nanogpt2.training.trainer import Trainer
from nanogpt2.training.validation import validate


def main(config: TrainConfig) -> None:
    """Prepare the run, then train. `prepare` refuses wrong use before anything is written."""
    with joined(config) as (folder, world):
        run = prepare(config, folder, world)
        if run is None:
            return
        if config.dry_run:
            # the second step's speed: the first one warms up
            for step in (1, 2):
                figures = take_step(run.config, run.trainer, run.batches, step)
            described = plan.describe(
                run.config, run.trainer, run.batches.sequences, run.validation.sequences, figures
            )
            terminal.write(described + "\n")
            return
        run.restore()
        train(run)


def train(run: Run) -> None:
    """Take every step after the checkpoint's, or all steps. Leave the model in the folder."""
    config, folder, trainer = run.config, run.folder, run.trainer
    state, before = begin(run)
    signals, stopped = terminal.Signals(), 0
    with terminal.Progress(config.steps, state["step"], "step") as bar, rescued(run, state):
        while not (state["finished"] or stopped):
            step = state["step"] + 1
            figures = take_step(config, trainer, run.batches, step)
            state |= {"step": step, "figures": figures, "is_best": False}
            if step % config.eval_every == 0 or step == config.steps:
                figures |= validate(trainer, run.validation)
                state["is_best"] = figures["val_loss"] < state["best"]
                state["best"] = min(state["best"], figures["val_loss"])
                state["stale"] = 0 if state["is_best"] else state["stale"] + 1
                state |= {"best_step": step} if state["is_best"] else {}
            state["finished"] = step == config.steps or state["stale"] == config.patience
            folder.log(figures)
            bar.show(figures)
            stopped = trainer.world.largest(signals.received or 0)
            if stopped or state["finished"] or state["is_best"] or step % config.save_every == 0:
                save(run, state)
            if config.sample_every and step % config.sample_every == 0:
                terminal.note(f"step {step}:\n{snapshot(run, figures).sample}")

    if isinstance(run.batches, MixedBatches):
        sequences = state["step"] * config.batch_size * config.grad_accum
        terminal.note(f"trained on a {run.batches.describe(sequences)}")
    if not state["finished"]:
        terminal.note(f"stopped after step {step}: --resume goes on")
        sys.exit(128 + stopped)
    after = snapshot(run, state["figures"])
    if trainer.world.is_first:
        if config.lora_rank:
            save_adapter(trainer.eval_model, folder.path / "adapter", config.init)
        finish(folder.path, before, after, state["best"], config.task)
        folder.end(after=asdict(after))


def begin(run: Run) -> tuple[dict[str, Any], Snapshot]:
    """Start the folder, or resume it. Return the loop's state and the model's first snapshot."""
    config, folder, trainer, state = run.config, run.folder, run.trainer, run.state
    if not state:
        if config.resume:
            terminal.note("no checkpoint yet: starting over")
        state = {"step": 0, "best": math.inf, "stale": 0, "finished": False}
        before = snapshot(run, validate(trainer, run.validation))
        folder.start(config, before=asdict(before))
    else:
        before = Snapshot.from_record(folder.record()["before"])
        folder.extend(config)
        folder.cut_metrics(state["step"])
        if trainer.world.is_first:
            store.settle(folder.path, state, config.keep)
        terminal.note(f"resuming after step {state['step']}")
    state |= {"settings": folder.settings(config), "chat": config.task == "chat", "order": ORDER}
    if config.tensorboard and trainer.world.is_first:
        folder.loggers.append(TensorBoard(folder.path / "tensorboard", state["step"]).log)
    sizes = run.batches.sequences, run.validation.sequences
    terminal.note(plan.describe(config, trainer, *sizes))
    return state, before


def take_step(config: TrainConfig, trainer: Trainer, batches: Batches, step: int) -> dict[str, Any]:
    """Update the model once and return the step's figures.

    Raises FloatingPointError, without an update, when the loss or a gradient is not finite. Raises
    OutOfMemoryError when a micro-batch of one sequence does not fit.

    The host waits for a GPU once, to read the loss and the norm of the gradients, when the update
    is queued: it finds out on the device that it must not be. Where the step is not
    `is_capturable`, the host reads once more, before the update. A moving average comes last.
    """
    started = time.perf_counter()
    lr = learning_rate(step, config.steps, config.warmup, config.lr, config.schedule)
    trainer.set_rate(lr)
    world = trainer.world
    sequences = config.batch_size * config.grad_accum // world.size  # of this process
    first = ((step - 1) * world.size + world.rank) * sequences
    losses = None
    while losses is None:
        starts = range(first, first + sequences, trainer.micro_batch)
        parts = [batches.rows(i, min(trainer.micro_batch, first + sequences - i)) for i in starts]
        own_targets = sum(count_targets(y) for _, y in parts)
        # summed over the processes
        targets, tokens = world.sum(own_targets, sum(x.numel() for x, _ in parts))
        try:
            losses = add_gradients(trainer, parts, targets)
        except RuntimeError as error:
            # out of memory: halve the micro-batch and try again
            trainer.halve_micro_batch(error)

    norms = trainer.clip_gradients()  # clips to config.grad_clip, returns the norm before
    trainer.update(losses.isfinite() & norms.isfinite())  # optimizer.step()
    loss, norm = torch.stack([losses, norms]).tolist()
    # float16's scaled gradients may overflow: this update was skipped, lower the scale
    overflow = trainer.scaler.is_enabled() and not math.isfinite(norm)
    if not (math.isfinite(loss) and (math.isfinite(norm) or overflow)):
        raise FloatingPointError(
            f"step {step} (sequences {first} to {first + sequences - 1}): loss {loss}, gradient "
            f"norm {norm}: stopped before the update; the last checkpoint is kept. Try a lower --lr"
        )
    trainer.finish_step(updated=not overflow)  # zero_grad(), loss scale, average of the weights

    speed = tokens / (time.perf_counter() - started)
    figures = {"step": step, "loss": loss, "lr": lr, "grad_norm": None if overflow else norm}
    return figures | {"tokens_per_second": speed} | trainer.meter(speed)


def add_gradients(trainer: Trainer, parts: list[tuple[Tensor, Tensor]], targets: float) -> Tensor:
    """Run forward and backward on this process's micro-batches; return the loss of the step.

    parts: (inputs, targets) of each micro-batch, int64 (B, T). targets: their number in the step,
    over all processes. The loss, (), is the mean over them. Nothing waits for a GPU.
    """
    model, losses, device = trainer.forward, [], trainer.world.device
    # every target counts the same, in whichever micro-batch
    weights = torch.tensor([count_targets(y) / targets for _, y in parts], device=device)
    # all at once: a copy to a GPU waits until it has done what is queued
    placed = [(x.to(device), y.to(device)) for x, y in parts]
    with trainer.keeping_casts():
        for number, ((x, y), weight) in enumerate(zip(placed, weights, strict=True), 1):
            # the processes exchange their gradients once a step, in the last backward pass
            with trainer.exchanging_gradients(number == len(parts)):
                with trainer.precision():
                    loss = model(x, y) * weight
                trainer.scaled(loss).backward()
            losses.append(loss.detach())
            # free the autograd graph before the next forward pass
            del loss
    return trainer.world.total(torch.stack(losses).sum())


def count_targets(y: Tensor) -> int:
    """Count the positions that have a target."""
    return int((y != IGNORE_INDEX).sum())


def save(run: Run, state: dict[str, Any]) -> None:
    """Commit a checkpoint. Every process brings its shards, the first one writes."""
    model, tensors = run.trainer.exported(), run.trainer.tensors()
    state["micro_batch"] = run.trainer.micro_batch
    if run.trainer.world.is_first:
        run.folder.sync_metrics()
        made = model, run.tokenizer, tensors, state
        store.commit(run.folder.path, *made, run.config.keep, run.folder.run_id)


@contextmanager
def rescued(run: Run, state: dict[str, Any]) -> Iterator[None]:
    """When another process stops inside, save the last complete step; raise the error again."""
    world = run.trainer.world
    try:
        yield
    except RuntimeError as error:
        saved = run.folder.checkpoints / f"step-{state['step']}"
        # a step is complete once it is logged; with FSDP the other process had a part of it
        is_complete = run.folder.logged == state["step"] and not run.config.fsdp
        if is_complete and world.is_first and world.is_loss(error) and not saved.exists():
            # alone: without the other processes' generators
            run.trainer.world = replace(world, size=1)
            save(run, state)
            terminal.note(f"saved {saved}")
        raise


def snapshot(run: Run, figures: dict[str, float]) -> Snapshot:
    """Record the model's figures and a sample, which the first process writes; all must call."""
    prompt = run.prompt if run.trainer.world.is_first else []
    return take_snapshot(run.trainer.exported(), run.tokenizer, prompt, run.config.seed, figures)


if __name__ == "__main__":
    terminal.loaded()
    main(CONFIG)
