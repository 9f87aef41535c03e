"""What a run is going to do: the settings that were left open, chosen from the data and the model.

This file does not know the loop, the files or where the data comes from.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nanogpt2 import ops
from nanogpt2.config import GPTConfig, TrainConfig
from nanogpt2.training.distributed import World
from nanogpt2.training.estimate import memory_estimate
from nanogpt2.training.trainer import Trainer

# on a GPU a step takes more sequences where the data has enough for so many steps
STEP_TOKENS = 2**15
FEWEST_STEPS = 200
FEWEST_TOKENS = 8  # in a sequence; shorter examples are padded


def block_size(config: TrainConfig, model: GPTConfig, world: World, rooms: tuple[int, int]) -> int:
    """Tokens in a sequence; rooms: those of the longest that can be trained and validated on.

    Raises ValueError where more are asked for than the model or a text has. A text of one's own to
    validate on is too short, rather than that the sequences become as short.
    """
    default = min(1024 if world.device_type == "cuda" else 256, model.block_size, rooms[0])
    if config.validation is None and config.task == "lm":
        default = min(default, rooms[1])
    wanted = config.block_size or max(default, FEWEST_TOKENS)
    if wanted > model.block_size:
        raise ValueError(
            f"block_size must be <= {model.block_size}, the model's context, not {wanted}"
        )
    if wanted > min(rooms) and config.task == "lm":
        source = config.data if rooms[0] < rooms[1] else config.validation or config.data
        raise ValueError(
            f"block_size must be <= {min(rooms)}, all that {source!r} can fill, not {wanted}"
        )
    return wanted


def fill_in(
    config: TrainConfig, model: GPTConfig, world: World, block_size: int, sequences: int
) -> TrainConfig:
    """Replace the automatic values by those that suit the model, the device and the data's size.

    sequences: those of an epoch. Raises ValueError where a step's cannot be shared out among the
    processes.
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


def _rate(config: TrainConfig, width: int) -> float:
    """The learning rate: lower for wider models, higher for new ones and for adapters."""
    if config.init == "scratch":
        return min(3e-3, 6e-4 * 768 / width)
    return (5e-4 if config.lora_rank else 1e-4) * 768 / width


def describe(
    config: TrainConfig,
    trainer: Trainer,
    sequences: int,
    figures: Mapping[str, Any] | None = None,
) -> str:
    """Say what is about to run, and how long it takes where a step's figures are known.

    sequences: those of an epoch.
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
