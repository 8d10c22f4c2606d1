"""Collectives of the ranks that torchrun has started, and DistributedDataParallel for functions of losses.

The default group uses NCCL on GPUs and gloo on CPUs. Rank 0 prints and writes files. All ranks must call the functions
below in the same order. In a single process the functions return their argument.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils.distributed.world import is_first, rank, world_size
from utils.errors import InputError

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in PyTorch 2.14
_cpu_group: dist.ProcessGroup | None = None  # gloo on any device: no GPU waits for what is exchanged here


def set_cpu_group(group: dist.ProcessGroup | None) -> None:
    """Sets the gloo group for objects and CPU tensors; None is the default group."""
    global _cpu_group
    _cpu_group = group


# Agreement ------------------------------------------------------------------------------------------------------------


def wait_for_all() -> None:
    """Waits until all ranks have called this function (barrier)."""
    if world_size() > 1:
        dist.barrier(_cpu_group)


def on_first(function: Callable[[], Any]) -> Any:
    """Calls `function` on rank 0 only and broadcasts its result, or raises its InputError on all ranks."""
    if world_size() == 1:
        return function()
    result: list[Any] = [None, None]
    if is_first():
        try:
            result[0] = function()
        except InputError as error:
            result[1] = error
    dist.broadcast_object_list(result, 0, _cpu_group)
    if result[1] is not None:
        raise result[1]
    return result[0]


def require_same(values: dict[str, Any], advice: str) -> None:
    """Raises InputError on all ranks if a named value differs between ranks. The message ends with `advice`."""
    if world_size() == 1:
        return
    values_by_rank: list[dict[str, Any]] = [{}] * world_size()
    dist.all_gather_object(values_by_rank, values, _cpu_group)
    first = values_by_rank[0]
    for other, found in enumerate(values_by_rank):
        for name in (*first, *found):
            if first.get(name) != found.get(name):
                raise InputError(
                    f"{name} is {first.get(name)!r} on process 0 and {found.get(name)!r} on process {other}. {advice}"
                )


class Agreement:
    """All-reduces small integers of the host after each step by their maximum, asynchronously."""

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def after_step(self, *numbers: int) -> list[int]:
        """Returns the maximum of each number over the ranks.

        With several ranks these are the maxima of the step before, and zeros in the first step: no rank waits for the
        others to end this step.
        """
        if world_size() == 1:
            return [*numbers]
        maxima = torch.tensor(numbers)
        work = dist.all_reduce(maxima, dist.ReduceOp.MAX, _cpu_group, async_op=True)
        before, self._pending = self._pending, (maxima, work)
        if before is None:
            return [0] * len(numbers)
        before[1].wait()
        return before[0].tolist()

    def now(self, number: int) -> int:
        """Returns the maximum over the ranks, and waits for them."""
        if world_size() == 1:
            return number
        if self._pending:
            self._pending[1].wait()
            self._pending = None
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, _cpu_group)
        return int(largest)


# Tensors --------------------------------------------------------------------------------------------------------------


def gathered(rows: torch.Tensor) -> torch.Tensor:
    """All-gathers along the batch dimension: (b, ...), with the same b on each rank, -> (B, ...), rank 0's first."""
    if world_size() == 1:
        return rows
    whole = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    _all_gather(whole, rows.contiguous())
    return whole


def own(rows: torch.Tensor) -> torch.Tensor:
    """Returns this rank's shard (b, ...) of (B, ...)."""
    if world_size() == 1:
        return rows
    return rows.chunk(world_size())[rank()]


def reduced(tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
    """Returns the all-reduced tensor, the sum by default. It has the same bits on each rank."""
    if world_size() == 1:
        return tensor
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(tensor, operation)
    return tensor


def averaged(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the mean over the ranks."""
    return reduced(tensor) / world_size() if world_size() > 1 else tensor


def from_first(tensor: torch.Tensor) -> torch.Tensor:
    """Broadcasts rank 0's values, in place, and returns the tensor."""
    if world_size() > 1:
        whole = tensor.detach().contiguous()  # a copy unless it is contiguous
        dist.broadcast(whole, 0)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(whole)
    return tensor


# Gradients ------------------------------------------------------------------------------------------------------------


def averaging(losses: Callable[..., dict[str, torch.Tensor]], modules: list[nn.Module]) -> Callable:
    """Returns `losses` under DistributedDataParallel, which averages the gradients of all parameters of `modules`."""
    if world_size() == 1:
        return losses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions rename broadcast_buffers
        parallel = DistributedDataParallel(
            _LossModule(losses, modules),
            device_ids=None,  # with device_ids it would move batches, which are on the device already
            broadcast_buffers=False,
            gradient_as_bucket_view=True,  # otherwise each gradient is stored twice
        )
    # DistributedDataParallel rebuilds its buckets after its first backward pass, and then sums in another order. With
    # this backward pass before all steps, a resumed run sums in the same order as one that was not stopped.
    parallel()["zero"].backward()
    return parallel


class _LossModule(nn.Module):
    """Wraps a function of losses and the modules that it uses into one module for DistributedDataParallel.

    Without a batch its output is a zero that depends on all parameters.
    """

    def __init__(self, losses: Callable[..., dict[str, torch.Tensor]], modules: list[nn.Module]):
        super().__init__()
        self.used, self.losses = nn.ModuleList(modules), losses

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        if batch:
            return self.losses(**batch)
        return {"zero": torch.stack([0 * value.sum() for value in self.parameters()]).sum()}
