"""One run on several devices: who takes part, and what they tell each other.

`torchrun --nproc_per_node=N train.py ...` starts N processes; `join` brings them together, and
without torchrun makes a world of one, in which everything here does nothing. DDP gives every
process the whole model and its share of the sequences; FSDP2 also shares out the weights, the
gradients and the optimizer's state, block by block, for models that do not fit one device.

This file does not know the data or the loop.
Sources: Li et al. 2020 (DDP); Zhao et al. 2023 (FSDP); torch.distributed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nanogpt2.devices import choose_device

_left: list[Any] = []  # groups that this process was in


@dataclass(frozen=True)
class World:
    """The processes of a run: this one is number `rank` of `size` and computes on `device`."""

    device: str
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """True for the one process that writes and speaks."""
        return self.rank == 0

    @property
    def device_type(self) -> str:
        """The kind of device: cpu, cuda or mps."""
        return self.device.partition(":")[0]

    def sum(self, *values: float) -> list[float]:
        """Add each value up over all processes, in float64; each must call this."""
        if self.size == 1:
            return list(values)
        # MPS has no float64, but no world of several either
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def largest(self, value: int) -> int:
        """The largest value in any process; each must call this."""
        if self.size == 1:
            return value
        most = torch.tensor(value, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def gather(self, tensor: Tensor) -> Sequence[Tensor]:
        """The tensors of all processes, which have one shape, on the CPU; each must call this."""
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor, device=self.device) for _ in range(self.size)]
        dist.all_gather(found, tensor.to(self.device))
        return [each.cpu() for each in found]

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The others wait outside until the first process is through: they find what it made."""
        if not self.is_first:
            dist.barrier()
        try:
            yield
        finally:
            # what the first one could not do, the others try themselves
            if self.is_first and self.size > 1:
                dist.barrier()

    def leave(self) -> None:
        """Say goodbye, so that the others are not kept waiting."""
        if dist.is_initialized():
            # DDP must not be the last to hold the group: ending it, it would keep the interpreter's
            # lock, which the group's threads may need before they end
            _left.append(dist.group.WORLD)
            dist.destroy_process_group()


def join(device: str) -> World:
    """Join the processes that torchrun started, each on a device of its own.

    Raises ValueError for a device that is not there.
    """
    if not dist.is_torchelastic_launched():
        return World(choose_device(device))
    kind = choose_device(device)
    if kind == "cuda":
        kind = f"cuda:{dist.get_node_local_rank()}"
        if dist.get_node_local_rank() >= torch.cuda.device_count():
            raise ValueError(f"{kind!r} is not on this machine: too many processes for its GPUs")
        torch.cuda.set_device(kind)
    dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
    return World(kind, dist.get_rank(), dist.get_world_size())


def shard(model: nn.Module, blocks: Sequence[nn.Module], world: World) -> None:
    """Share out a model's parameters, in place: each process keeps 1 / size of every tensor.

    A block's parameters are together only while it computes.
    """
    mesh = dist.init_device_mesh(world.device_type, (world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be shared out; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """Share a whole tensor out as `pattern` is; a pattern that is whole changes nothing."""
    if isinstance(pattern, DTensor) and tensor.shape == pattern.shape:
        return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements)
    return tensor
