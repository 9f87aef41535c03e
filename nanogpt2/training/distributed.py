"""One run on several devices: the processes and their collective operations.

`torchrun --nproc_per_node=N train.py ...` starts N processes, and `join` connects them. Without
torchrun `join` makes a world of one process, where every operation here does nothing. DDP gives
each process the whole model and a part of the sequences. FSDP2 also shards the weights, the
gradients and the optimizer's state, block by block, for models too large for one device.

A process that waits for another one raises RuntimeError when that one dies, and after a timeout
when that one hangs; `is_loss` recognizes the error. The processes end with torchrun.

This file does not know the data or the loop.
Sources: Li et al. 2020 (DDP); Zhao et al. 2023 (FSDP); torch.distributed.
"""

import atexit
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from nanogpt2.devices import choose_device

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_left: list[Any] = []  # groups that this process has left
_wrappers: WeakSet[DistributedDataParallel] = WeakSet()  # of models, each with its group


@dataclass(frozen=True)
class World:
    """The processes of a run: this process has number `rank` of `size` and computes on `device`."""

    device: str
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """True for the one process that writes files and prints."""
        return self.rank == 0

    @property
    def device_type(self) -> str:
        """The type of device: cpu, cuda or mps."""
        return self.device.partition(":")[0]

    def sum(self, *values: float) -> list[float]:
        """Add up each value over all processes, in float64. Every process must call this."""
        if self.size == 1:
            return list(values)
        # MPS lacks float64, but always runs a single process
        return self.total(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def total(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in float64 if there are several. All must call it."""
        if self.size == 1:
            return tensor
        total = tensor.to(torch.float64, copy=True)
        dist.all_reduce(total)
        return total

    def largest(self, value: int) -> int:
        """Return the largest value of all processes. Every process must call this."""
        if self.size == 1:
            return value
        most = torch.tensor(value, device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def gather(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return all processes' tensors, of one shape, on the CPU. Every process must call this."""
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor, device=self.device) for _ in range(self.size)]
        dist.all_gather(found, tensor.to(self.device))
        return [each.cpu() for each in found]

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Let the first process run the body, and its downloads and caches, before the others."""
        if not self.is_first:
            dist.barrier()
        try:
            yield
        finally:
            # release the others after an error too: each then reports the error itself
            if self.is_first and self.size > 1:
                dist.barrier()

    def limit_waits(self, seconds: int) -> None:
        """Wait until all processes are ready; from then on wait `seconds` at most for any of them.

        Before, one process may load or encode for long: the limit is torch's, 10 to 30 minutes.
        """
        if self.size > 1:
            dist.barrier()
            # torch before 2.14 has it under a private name
            old_name = "_set_pg_timeout"
            limit = getattr(dist, "set_timeout", None) or getattr(distributed_c10d, old_name)
            limit(timedelta(seconds=seconds), dist.group.WORLD)

    def is_loss(self, error: BaseException) -> bool:
        """Return True for an error that says that another process died or did not answer."""
        # gloo raises a plain RuntimeError, which names its source file
        return self.size > 1 and (isinstance(error, dist.DistError) or "/gloo/" in str(error))

    def leave(self) -> None:
        """Leave the process group, so that the others do not wait for this process."""
        if dist.is_initialized():
            # keep a reference: if DDP held the last, its destructor would end the group under the
            # interpreter's lock, which the group's threads may need to finish. See _end_threads
            _left.append(dist.group.WORLD)
            dist.destroy_process_group()


def _end_threads() -> None:
    """End the threads of the groups that this process has left, while Python still runs.

    A thread that needs the interpreter's lock after that, to free a tensor, aborts the process.
    """
    if _left:
        gc.collect()
    if not _wrappers:
        # the last reference: its destructor waits for the threads, without the lock
        _left.clear()


atexit.register(_end_threads)


def join(device: str, fsdp: bool = False, threads: int | None = None) -> World:
    """Join the processes that torchrun started, each on its own device.

    threads: see choose_device. Raises ValueError for a missing device.
    """
    if not dist.is_torchelastic_launched():
        return World(choose_device(device, threads))
    if sys.platform == "linux":
        # a torchrun that was killed cannot end its processes: let the kernel send SIGTERM
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    kind = choose_device(device, threads)
    if kind == "cuda":
        kind = f"cuda:{dist.get_node_local_rank()}"
        if dist.get_node_local_rank() >= torch.cuda.device_count():
            raise ValueError(f"{kind!r} is not on this machine: too many processes for its GPUs")
        torch.cuda.set_device(kind)
        if not fsdp:
            # by default NCCL aborts the process at a timeout, with no chance to save. FSDP could
            # save nothing, and its gathers must overlap the computation
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
    return World(kind, dist.get_rank(), dist.get_world_size())


def wrap(model: nn.Module) -> DistributedDataParallel:
    """Wrap a model so that `backward` averages its gradients over the processes."""
    wrapper = DistributedDataParallel(model)
    _wrappers.add(wrapper)
    return wrapper


def shard(model: nn.Module, blocks: Sequence[nn.Module], world: World) -> None:
    """Shard a model's parameters, in place: each process keeps 1 / size of every tensor.

    A block's parameters are gathered only while the block computes.
    """
    mesh = dist.init_device_mesh(world.device_type, (world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor if it is sharded. Every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """Shard a whole tensor like `pattern`; if `pattern` is whole, return the tensor as it is."""
    if isinstance(pattern, DTensor) and tensor.shape == pattern.shape:
        return distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements)
    return tensor
