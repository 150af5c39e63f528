"""More than one process: who takes which rows, how a model is spread over them, and what they tell each other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..language.errors import FastWeightError

X = TypeVar("X")
_CPU = torch.device("cpu")
_SETTLE = 0.1  # seconds


@dataclass(frozen=True)
class Processes:
    """This process among those that train one model; by default it is the only one.

    ``rank`` counts from 0, and the process of rank 0, the ``first``, alone reads and writes the run's folder. What is told, added up
    or spread is a collective: every process calls it, in the same order.

    >>> Processes().total(1.5, 2.0)
    [1.5, 2.0]
    >>> Processes(rank=1, size=2).rows(torch.arange(6))
    tensor([3, 4, 5])
    """

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, x: Tensor) -> Tensor:
        """This process's share of the rows of a batch, as even as can be."""
        return x if self.size == 1 else x.tensor_split(self.size)[self.rank]

    def total(self, *numbers: float) -> list[float]:
        """Sums over all processes."""
        return list(numbers) if self.size == 1 else self._reduced(numbers, dist.ReduceOp.SUM)

    def largest(self, number: int) -> int:
        """The largest number that a process has."""
        return number if self.size == 1 else int(self._reduced((number,), dist.ReduceOp.MAX)[0])

    def _reduced(self, numbers: tuple[float, ...], how: Any) -> list[float]:
        held = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(held, how)
        return held.tolist()

    def told(self, make: Callable[[], X]) -> X:
        """What ``make`` returns on the first process, on every one; an error about what was given is raised on every one, too."""
        if self.size == 1:
            return make()
        said: list[Any] = [None]
        if self.first:
            try:
                said = [make()]
            except (FastWeightError, OSError) as error:
                said = [error]
        dist.broadcast_object_list(said, 0, device=self.device)
        if isinstance(said[0], Exception):
            raise said[0]
        return said[0]

    def spread(self, model: Any, shard: str) -> nn.Module:
        """What to call in the place of a model, so that gradients become their means over all processes.

        ``none``: every process has all of the model. ``full``: every process has a share of every parameter, which become
        ``DTensor``s, and a block is put together while it runs.
        """
        if self.size == 1:
            return model
        if shard == "none":
            return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        mesh = init_device_mesh(self.device.type, (self.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def shared(self, given: Tensor, like: Tensor) -> Tensor:
        """A tensor of the first process on all: in shares as ``like`` is in shares, and on its device, if it has its shape."""
        same = given.shape == like.shape
        if isinstance(like, DTensor) and same:
            return distribute_tensor(given.to(self.device), like.device_mesh, like.placements)
        if self.size > 1:
            given = given.to(self.device).contiguous()
            dist.broadcast(given, 0)
        return given.to(like.device) if same else given.cpu()


ALONE = Processes()


def whole(x: Tensor) -> Tensor:
    """A tensor that may be in shares, put together on every process."""
    return x.detach().full_tensor() if isinstance(x, DTensor) else x


def tells() -> bool:
    """Whether this process is the one that a person reads: the only one, or the first of those that ``torchrun`` started."""
    return _alone() or int(os.environ["RANK"]) == 0


def _alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


@contextmanager
def processes(device: str = "cpu") -> Iterator[Processes]:
    """The processes that ``torchrun`` started (RANK, WORLD_SIZE, ... in the environment), connected; or this one alone.

    They talk through nccl on ``cuda``, where each has the device LOCAL_RANK, and through gloo elsewhere. A process group that is
    already there is used, and left there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise FastWeightError("--device is cuda, and torch finds no CUDA device here; expected cpu, or an installation of torch with CUDA")
    if not dist.is_initialized() and _alone():
        yield Processes(device=torch.device(device))
        return
    place = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), place)
    finally:
        # A thread of gloo needs the interpreter's lock to let go of the last tensors; a process group whose last owner holds that lock
        # and waits for the thread would never end (torch 2.13). Sleeping gives the lock away.
        time.sleep(_SETTLE)
        if ours:
            dist.destroy_process_group()
