"""The Trainer: a model, its optimizers, and all state that a resumed run needs, bit for bit.

train.py takes the steps. A Trainer adds everything around the model: several devices, compilation,
low-rank adapters, a moving average of the weights, float16's loss scale.

    trainer.forward(x, y)     the loss, through every wrapper of the model
    trainer.set_rate(lr)      the learning rate of the step
    trainer.clip_gradients()  call before `update`
    trainer.update(is_fit)    the optimizers' step, unless the loss or the gradients are not finite
    trainer.finish_step()     call after `update`
    trainer.eval_model        the model to evaluate: the averaged one, if the run keeps an average
    trainer.exported()        the plain model that this run would leave behind
    trainer.tensors()         a checkpoint's tensors beside the exported model; `restore` takes them

On a GPU nothing from the forward pass to `update` waits for the device, and no number of the host
that changes from step to step is part of it, so a CUDA graph could hold it (`is_capturable`). This
does not hold for Muon, float16's loss scale, FSDP and several processes, whose exchange waits.

This file does not know the data, the files or the schedule.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from nanogpt2 import ops, terminal
from nanogpt2.classifier import GPTClassifier, Model
from nanogpt2.config import TrainConfig
from nanogpt2.cpu import training as cpu_training
from nanogpt2.memory import is_out_of_memory
from nanogpt2.model import GPT
from nanogpt2.training.distributed import World, full_tensor, shard, shared_like, wrap
from nanogpt2.training.estimate import device_rate, memory_used, model_flops
from nanogpt2.training.lora import add_lora, merged
from nanogpt2.training.optim import make_optimizers

# the state of a parameter in each optimizer; `step` is one number, the rest has its shape
SLOTS: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}
FIRST_SCALE = 65536.0  # float16's loss scale at the start, GradScaler's default
KEEPS_CASTS = ("cuda",)
CAPTURABLE = ("cuda",)
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Trainer:
    """A model and all state that changes while it trains."""

    def __init__(self, config: TrainConfig, model: Model, world: World) -> None:
        """Take the model over: adapters, sharding, recomputation change it in place."""
        self.config, self.world, self.model = config, world, model.train()
        self.micro_batch = config.batch_size  # sequences at a time
        self.rate = device_rate(world.device_type, config.dtype)
        if config.lora_rank:
            add_lora(model, config.lora_rank, config.lora_alpha)
        blocks = (model.transformer if isinstance(model, GPTClassifier) else model).h
        if config.fsdp:
            shard(model, list(blocks), world)
        self.average: AveragedModel | None = None
        if config.ema:
            # copy the model before anything wraps its parts
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        if config.activation_checkpointing:
            for block in blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.is_capturable = (
            world.device_type in CAPTURABLE
            and config.optimizer == "adamw"
            and config.dtype != "float16"
            and not config.fsdp
        )
        self.optimizers = make_optimizers(
            model, config.optimizer, config.lr, config.weight_decay, self.is_capturable
        )
        self.scaler = torch.amp.GradScaler(
            world.device_type, FIRST_SCALE, enabled=config.dtype == "float16"
        )
        self.parallel: nn.Module = model
        if world.size > 1 and not config.fsdp:
            self.parallel = wrap(model)
        # torch.compile chooses its own operations; "reference" runs model.py as written
        if world.device_type == "cpu" and not config.compile and model.kernels != "reference":
            cpu_training.install(model, add_lookups=world.size == 1 and not config.fsdp)
            if self.average is not None:
                cpu_training.install(self.eval_model)
        if world.size > 1:
            # each process draws its own dropout
            torch.manual_seed(config.seed + world.rank)
        self.forward: Callable[[Tensor, Tensor], Tensor] = self.parallel
        if config.compile:
            self.forward = torch.compile(self.parallel)

    @property
    def eval_model(self) -> Model:
        """The model to evaluate: the moving average, if any, else the model itself."""
        return self.model if self.average is None else cast(Model, self.average.module)

    def precision(self) -> torch.autocast:
        """Autocast to config.dtype: matrix products are narrow, weights and sums stay float32."""
        dtype = AUTOCAST.get(self.config.dtype)
        return torch.autocast(
            self.world.device_type, dtype or torch.bfloat16, enabled=dtype is not None
        )

    @contextmanager
    def keeping_casts(self) -> Iterator[None]:
        """Cast a weight once a step: inside, the narrow copies outlive a micro-batch.

        On a GPU, where each cast is a launch. They are dropped at the end, before the weights
        change. FSDP's copies would be as large as the whole model.
        """
        if self.world.device_type not in KEEPS_CASTS or self.config.fsdp:
            yield
            return
        # autocast drops its copies when the outermost context ends, even one that casts nothing
        with ops.keeping_casts(), torch.autocast(self.world.device_type, enabled=False):
            yield

    @contextmanager
    def exchanging_gradients(self, exchange: bool) -> Iterator[None]:
        """Run forward and backward inside; the processes add up their gradients if `exchange`."""
        if isinstance(self.parallel, FSDPModule):
            self.parallel.set_requires_gradient_sync(exchange)
        if isinstance(self.parallel, DistributedDataParallel) and not exchange:
            with self.parallel.no_sync():
                yield
        else:
            yield

    def scaled(self, loss: Tensor) -> Tensor:
        """Scale a loss for backward: by float16's loss scale and the number of processes.

        The exchange averages the gradients over the processes, but a step needs their sum.
        """
        return self.scaler.scale(loss * self.world.size)

    def set_rate(self, lr: float) -> None:
        """Let the next `update` take steps of this learning rate."""
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def clip_gradients(self) -> Tensor:
        """Clip the gradients to config.grad_clip; return their norm before, float32 ()."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        limit = self.config.grad_clip or math.inf
        return full_tensor(nn.utils.clip_grad_norm_(self.parameters.values(), limit))

    def update(self, is_fit: Tensor) -> None:
        """Step the optimizers; where `is_fit`, bool (), is False, change no weight and no state.

        Where the step `is_capturable`, the device decides; elsewhere the host waits and decides.
        """
        if self.is_capturable:
            for optimizer in cast(list[Any], self.optimizers):
                # the fused AdamW's argument for float16: at 1 it leaves everything as it is
                optimizer.found_inf = (~is_fit).float()
                optimizer.step()
                del optimizer.found_inf
        elif is_fit:
            for optimizer in self.optimizers:
                optimizer.step()

    def finish_step(self, updated: bool) -> None:
        """Drop the gradients; if `updated`, let the average follow. Adapt float16's loss scale.

        Raises FloatingPointError when float16's loss scale falls below 1.
        """
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise FloatingPointError("float16's loss scale fell below 1: try --dtype bfloat16")
        self.drop_gradients()
        if self.average is not None and updated:
            self.average.update_parameters(self.model)

    def halve_micro_batch(self, error: RuntimeError) -> None:
        """Halve the micro-batch after an out-of-memory `error`; raise any other error again.

        The caller repeats the step, with the same sequences. Raises OutOfMemoryError with advice
        when one sequence does not fit or several processes run, OSError when torch.compile fails.
        """
        if self.config.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            what, *_ = str(error).splitlines()
            raise OSError(f"--compile does not work here; leave it out: {what}") from None
        if not is_out_of_memory(error):
            raise error
        self.drop_gradients()
        if self.world.device_type == "cuda":
            torch.cuda.empty_cache()
        # several processes cannot halve: the others already wait in an exchange
        if self.micro_batch == 1 or self.world.size > 1:
            raise torch.OutOfMemoryError(
                f"out of memory with {self.micro_batch} x {self.config.block_size} tokens at a "
                "time: try a lower --batch_size or --block_size, --activation_checkpointing or "
                "--lora_rank 8"
            ) from None
        self.micro_batch //= 2
        terminal.note(
            f"out of memory: going on with {self.micro_batch} sequences at a time; "
            "a step's sequences and their order stay"
        )

    def drop_gradients(self) -> None:
        """Drop the gradients that `backward` added."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def exported(self) -> Model:
        """Return the plain model, adapters merged, shards gathered. Every process calls this."""
        if isinstance(self.model, FSDPModule):
            return self._gathered()
        return merged(self.eval_model) if self.config.lora_rank else self.eval_model

    def _gathered(self) -> Model:
        """Copy a sharded model to the CPU, whole."""
        plain = _blank(self.model)
        # an evaluation leaves the outermost tensors gathered: free them
        cast(FSDPModule, self.model).reshard()
        state = {name: full_tensor(p.detach()).cpu() for name, p in self.model.named_parameters()}
        plain.load_state_dict(state, assign=True)
        return plain.eval()

    def meter(self, tokens_per_second: float) -> dict[str, float]:
        """Return `mfu`, the share of the devices' matmul rate in use, and `memory`, in bytes."""
        flops = model_flops(self.model.config, 1, self.config.block_size) * tokens_per_second
        used = memory_used(self.world.device_type)
        return {"mfu": flops / (self.rate.flops * self.world.size), "memory": used}

    # ---- a checkpoint's tensors beside the exported model

    def tensors(self) -> dict[str, Tensor]:
        """Return the state of optimizers, generators and loss scale, and weights not exported.

        Names: optimizer.<parameter>.<slot>, rng.<device>.<process>, scaler.<field>, model.<name>,
        average.<name>. Every process must call this; only the first process's result is whole.
        """
        found = {name: full_tensor(tensor).cpu() for name, tensor in self._slots()}
        return found | self._generators() | self._others()

    def _others(self) -> dict[str, Tensor]:
        """Return the loss scale and the weights that are not exported."""
        found = {
            f"scaler.{key}": torch.tensor(value) for key, value in self.scaler.state_dict().items()
        }
        if self.config.lora_rank or self.average is not None:
            found |= {f"model.{n}": p.detach().cpu() for n, p in self.parameters.items()}
        if self.config.lora_rank and self.average is not None:
            state = self.average.module.state_dict()
            found |= {f"average.{n}": state[n].cpu() for n in self.parameters}
        return found

    def check(self, tensors: dict[str, Tensor], step: int) -> None:
        """Raise ValueError unless these are the tensors that this run has after `step` steps.

        The generators may be those of another number of processes.
        """
        expected = {name: (t.dtype, t.shape) for name, t in self._others().items()}
        scale = tensors.get("scaler.scale")
        # a step that overflows halves float16's scale and updates nothing
        if scale is None or scale.shape or scale != FIRST_SCALE * 0.5**step:
            names = {id(p): name for name, p in self.parameters.items()}
            for optimizer in self.optimizers:
                for p in (p for group in optimizer.param_groups for p in group["params"]):
                    for slot in SLOTS[type(optimizer)]:
                        shape = torch.Size() if slot == "step" else p.shape
                        expected[f"optimizer.{names[id(p)]}.{slot}"] = (p.dtype, shape)
        state = torch.get_rng_state()
        for name, tensor in _under("rng.", tensors).items():
            kind, _, rank = name.partition(".")
            if kind == "cpu":
                expected["rng." + name] = (state.dtype, state.shape)
            elif kind == "cuda" and f"rng.cpu.{rank}" in tensors:
                expected["rng." + name] = (state.dtype, tensor.shape)
        count = sum(name.startswith("rng.cpu.") for name in expected)
        expected |= {f"rng.cpu.{i}": (state.dtype, state.shape) for i in range(count or 1)}
        for name in sorted(expected.keys() | tensors.keys()):
            found = (tensors[name].dtype, tensors[name].shape) if name in tensors else None
            if found != expected.get(name):
                raise ValueError(
                    f"training.safetensors: {name} must be {_described(expected.get(name))}, "
                    f"not {_described(found)}"
                )
        for name in (f"rng.cpu.{number}" for number in range(count)):
            try:
                torch.Generator().set_state(tensors[name])
            except RuntimeError:
                raise ValueError(
                    f"training.safetensors: {name} is no state of a generator"
                ) from None

    def restore(self, tensors: dict[str, Tensor], micro_batch: int) -> None:
        """Restore the state that `tensors` returned; the exported weights are loaded already."""
        self.micro_batch = micro_batch
        pairs: list[tuple[str, nn.Module]] = [("model.", self.model)]
        if self.average is not None:
            # the loaded model is the average; at n_averaged 0 an update would replace the average
            pairs.append(("average.", self.average.module))
            self.average.n_averaged.fill_(1)
        for prefix, module in pairs:
            module.load_state_dict(_under(prefix, tensors), strict=False)
        names = {id(p): name for name, p in self.parameters.items()}
        for optimizer in self.optimizers:
            described = optimizer.state_dict()
            held = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            for index, name in enumerate(held):
                slots = _under(f"optimizer.{name}.", tensors)
                pattern = self.parameters[name]
                described["state"][index] = {k: shared_like(t, pattern) for k, t in slots.items()}
            optimizer.load_state_dict(described)
        scaler = _under("scaler.", tensors)
        if scaler:
            self.scaler.load_state_dict({key: value.item() for key, value in scaler.items()})
        states = _under("rng.", tensors)
        count = sum(name.startswith("cpu.") for name in states)
        if count != self.world.size:
            terminal.note(
                f"the checkpoint has the generators of {count} processes, this run has "
                f"{self.world.size}: any other starts afresh, so dropout draws other masks"
            )
        if f"cpu.{self.world.rank}" in states:
            torch.set_rng_state(states[f"cpu.{self.world.rank}"])
        if self.world.device_type == "cuda" and f"cuda.{self.world.rank}" in states:
            torch.cuda.set_rng_state(states[f"cuda.{self.world.rank}"])

    def _slots(self) -> Iterator[tuple[str, Tensor]]:
        names = {id(p): name for name, p in self.parameters.items()}
        for optimizer in self.optimizers:
            for parameter, slots in optimizer.state.items():
                for key, value in slots.items():
                    yield f"optimizer.{names[id(parameter)]}.{key}", value

    def _generators(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.world.device_type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state()
        return {
            f"rng.{kind}.{rank}": each
            for kind, state in states.items()
            for rank, each in enumerate(self.world.gather(state))
        }


def _described(tensor: tuple[torch.dtype, torch.Size] | None) -> str:
    """Describe a tensor for an error message."""
    if tensor is None:
        return "absent"
    return f"{str(tensor[0]).removeprefix('torch.')} {list(tensor[1])}"


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _blank(model: Model) -> Model:
    """Build the same architecture without weights."""
    with torch.device("meta"):
        plain = GPT(model.config)
        return GPTClassifier(plain, model.labels) if isinstance(model, GPTClassifier) else plain
