"""The plan of a run: choose the settings left open, from the data and the model; describe the run.

This file does not know the loop, the files or the source of the data.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from nanogpt2 import ops
from nanogpt2.config import GPTConfig, TrainConfig
from nanogpt2.devices import memory_of
from nanogpt2.training.distributed import World
from nanogpt2.training.estimate import memory_estimate
from nanogpt2.training.trainer import Trainer

# on a GPU the batch grows to STEP_TOKENS, as long as the run keeps FEWEST_STEPS steps
STEP_TOKENS = 2**15
FEWEST_STEPS = 200
FEWEST_TOKENS = 8  # in a sequence; shorter examples are padded


def block_size(
    config: TrainConfig, model: GPTConfig, world: World, longest: tuple[int, int]
) -> int:
    """Choose the tokens in a sequence.

    longest: the longest sequences that the training and the validation data can fill. Raises
    ValueError when config.block_size exceeds the model's context or these. A short --validation
    text is an error; block_size is not shrunk to fit it.
    """
    train_longest, validation_longest = longest
    default = min(1024 if world.device_type == "cuda" else 256, model.block_size, train_longest)
    if config.validation is None and config.task == "lm":
        default = min(default, validation_longest)
    wanted = config.block_size or max(default, FEWEST_TOKENS)
    if wanted > model.block_size:
        raise ValueError(
            f"block_size must be <= {model.block_size}, the model's context, not {wanted}"
        )
    if wanted > min(longest) and config.task == "lm":
        train_is_shorter = train_longest < validation_longest
        data = config.data or config.mix
        source = data if train_is_shorter else config.validation or data
        raise ValueError(
            f"block_size must be <= {min(longest)}, all that {source!r} can fill, not {wanted}"
        )
    return wanted


def fill_in(
    config: TrainConfig, model: GPTConfig, world: World, block_size: int, sequences: int
) -> TrainConfig:
    """Replace every automatic value by one for this model, device and size of the data.

    sequences: their number in an epoch. Raises ValueError when the processes cannot divide a
    step's sequences evenly.
    """
    on_gpu = world.device_type == "cuda"
    batch_size = config.batch_size or -(-8 // world.size) * world.size
    if config.batch_size is None and config.steps is None and on_gpu:
        enough = int(config.epochs * sequences / FEWEST_STEPS)
        more = min(STEP_TOKENS // block_size, enough) // world.size * world.size
        batch_size = max(batch_size, more)
    in_a_step = batch_size * config.grad_accum
    if in_a_step % world.size:
        raise ValueError(
            f"batch_size x --grad_accum must be a multiple of the {world.size} processes, not "
            f"{batch_size} x {config.grad_accum}"
        )
    steps = config.steps or math.ceil(config.epochs * sequences / in_a_step)
    eval_every = config.eval_every or max(1, steps // 10)
    return replace(
        config,
        block_size=block_size,
        batch_size=batch_size,
        steps=steps,
        lr=_rate(config, model.n_embd) if config.lr is None else config.lr,
        lora_alpha=config.lora_alpha or 2.0 * config.lora_rank or None,
        warmup=min(100, steps // 20) if config.warmup is None else config.warmup,
        dtype=("bfloat16" if on_gpu else "float32") if config.dtype == "auto" else config.dtype,
        eval_every=eval_every,
        save_every=config.save_every or eval_every,
    )


def check_memory(config: TrainConfig, model: GPTConfig, world: World) -> None:
    """Raise ValueError where a step certainly needs more memory than the device has.

    On a CPU the estimate decides: a system that overcommits memory would kill the process without a
    message. Elsewhere, and where activations are recomputed, only the weights and the step's tokens
    count, because out of memory halves the micro-batch there.
    """
    by_estimate = world.device_type == "cpu" and not config.activation_checkpointing

    def needed(batch_size: int, grad_accum: int = config.grad_accum) -> int:
        # int64 inputs and targets, all of the step's
        tokens = 16 * batch_size * grad_accum * config.block_size // world.size
        if not by_estimate:
            return tokens + 4 * model.n_parameters
        return tokens + memory_estimate(
            model,
            batch_size,
            config.block_size,
            trainable=0 if config.lora_rank else None,
            dtype=config.dtype,
            grad_accum=grad_accum,
            labels=2 if config.task == "classify" else 0,
        )

    total = memory_of(world.device)
    most = bisect_right(range(1, config.batch_size + 1), total, key=needed)
    if most == 0 and needed(1, 1) <= total:
        raise ValueError(
            f"grad_accum {config.grad_accum}: the tokens of a step take {needed(1) / 1e9:,.1f} GB; "
            f"{world.device} has {total / 1e9:,.1f} GB"
        )
    if most == 0:
        raise ValueError(
            f"block_size {config.block_size}: one sequence takes {needed(1) / 1e9:,.1f} GB "
            f"with this model; {world.device} has {total / 1e9:,.1f} GB"
        )
    if most < config.batch_size:
        raise ValueError(
            f"batch_size must be <= {most:,} with --block_size {config.block_size} and "
            f"{total / 1e9:,.1f} GB of memory, not {config.batch_size} (--grad_accum makes a step "
            "larger)"
        )


def _rate(config: TrainConfig, width: int) -> float:
    """Choose the peak rate: lower for wider models, higher for new models and for LoRA."""
    if config.init == "scratch":
        return min(3e-3, 6e-4 * 768 / width)
    return (5e-4 if config.lora_rank else 1e-4) * 768 / width


def _threads(world: World) -> str:
    return f" with {torch.get_num_threads()} threads" if world.device_type == "cpu" else ""


def describe(
    config: TrainConfig,
    trainer: Trainer,
    sequences: int,
    held_out: int,
    figures: Mapping[str, Any] | None = None,
) -> str:
    """Describe the run: parameters, memory, steps; also its duration, given a step's `figures`.

    sequences: their number in an epoch. held_out: the sequences that validate.
    """
    every = sum(p.numel() for p in trainer.model.parameters())
    trained = sum(p.numel() for p in trainer.parameters.values())
    memory = memory_estimate(
        trainer.model.config,
        config.batch_size,
        config.block_size,
        trainable=trained,
        dtype=config.dtype,
        device=trainer.world.device_type,
        grad_accum=config.grad_accum,
        labels=len(getattr(trainer.model, "labels", ())),
    )
    in_a_step = config.batch_size * config.grad_accum
    lines = [
        f"{every:,} parameters, {'all' if trained == every else f'{trained:,}'} of them trained: "
        f"about {memory / 1e9:.2g} GB of memory",
        f"{config.steps:,} steps of {in_a_step} x {config.block_size} tokens: "
        f"{config.steps * in_a_step / sequences:.2g} epochs of {sequences:,} sequences",
        f"{config.optimizer}: learning rate {config.lr:.2g} after {config.warmup} steps of "
        f"warm-up, then {config.schedule}; seed {config.seed}",
        f"{config.dtype} on {trainer.world.device}{_threads(trainer.world)}; evaluated every "
        f"{config.eval_every} steps on {held_out:,} sequences, saved every {config.save_every}",
    ]
    kernels = trainer.model.kernels
    if said := ops.describe_kernels(config.kernels, kernels, trainer.world.device_type):
        lines.append(said)
    if figures is not None:
        speed = figures["tokens_per_second"]
        minutes = config.steps * in_a_step * config.block_size / speed / 60
        lines.append(
            f"about {minutes:,.1f} minutes at {speed:,.0f} tokens/s, without the evaluations"
        )
    return "\n".join(lines)
