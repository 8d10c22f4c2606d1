"""The processes of one training under torchrun, and what they tell each other; without torchrun there is one.

Each is a rank of torch.distributed's default group, with NCCL on GPUs and gloo on CPUs. Rank 0 prints and writes. Every
function here that exchanges something must be called by all ranks, in the same order; alone it changes nothing.
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

_control: dist.ProcessGroup | None = None  # for what the CPUs tell each other, in no GPU's way


def use_control(group: dist.ProcessGroup | None) -> None:
    """Sets the group by which the CPUs tell each other things; None when it is over."""
    global _control
    _control = group


# Agreement ------------------------------------------------------------------------------------------------------------


def wait_for_all() -> None:
    if world_size() > 1:
        dist.barrier(_control)


def on_first(function: Callable[[], Any]) -> Any:
    """What `function` gives on rank 0, on every rank; the others do not call it. An InputError is raised on all."""
    if world_size() == 1:
        return function()
    said: list[Any] = [None, None]
    if is_first():
        try:
            said[0] = function()
        except InputError as error:
            said[1] = error
    dist.broadcast_object_list(said, 0, _control)
    if said[1] is not None:
        raise said[1]
    return said[0]


def require_same(values: dict[str, Any], advice: str) -> None:
    """Raises InputError on all ranks where one has another value, and names it."""
    if world_size() == 1:
        return
    everybodys: list[dict[str, Any]] = [{}] * world_size()
    dist.all_gather_object(everybodys, values, _control)
    for other, theirs in enumerate(everybodys):
        for name in (*everybodys[0], *theirs):
            one, another = everybodys[0].get(name), theirs.get(name)
            if one != another:
                raise InputError(f"{name} is {one!r} on process 0 and {another!r} on process {other}. {advice}")


class Agreement:
    """Numbers that the ranks tell each other after each step, without waiting for each other."""

    def __init__(self) -> None:
        self._under_way: tuple[torch.Tensor, dist.Work] | None = None

    def after_step(self, *numbers: int) -> list[int]:
        """The largest of each over the ranks; where there are several, of the step before, and 0 in the first step."""
        if world_size() == 1:
            return [*numbers]
        mine = torch.tensor(numbers)
        before, self._under_way = self._under_way, (mine, dist.all_reduce(mine, dist.ReduceOp.MAX, _control, True))
        if before is None:
            return [0] * len(numbers)
        before[1].wait()
        return before[0].tolist()

    def now(self, number: int) -> int:
        """The largest over the ranks."""
        if world_size() == 1:
            return number
        if self._under_way:
            self._under_way[1].wait()
            self._under_way = None
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, _control)
        return int(largest)


# Tensors --------------------------------------------------------------------------------------------------------------


def gathered(rows: torch.Tensor) -> torch.Tensor:
    """(b, ...) of every rank, as many on each -> (B, ...), rank 0's first."""
    if world_size() == 1:
        return rows
    whole = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(whole, rows.contiguous())
    return whole


def own(rows: torch.Tensor) -> torch.Tensor:
    """This rank's (b, ...) of (B, ...)."""
    if world_size() == 1:
        return rows
    return rows.chunk(world_size())[rank()]


def reduced(tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
    """The sum over the ranks, or what `operation` says; the same bits on each."""
    if world_size() == 1:
        return tensor
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(tensor, operation)
    return tensor


def averaged(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over the ranks."""
    return reduced(tensor) / world_size() if world_size() > 1 else tensor


def from_first(tensor: torch.Tensor) -> torch.Tensor:
    """Takes rank 0's values, in place."""
    if world_size() > 1:
        whole = tensor.detach().contiguous()  # a copy where it is not contiguous
        dist.broadcast(whole, 0)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(whole)
    return tensor


# Gradients ------------------------------------------------------------------------------------------------------------


def averaging(losses: Callable[..., dict[str, torch.Tensor]], modules: list[nn.Module]) -> Callable:
    """Losses of a rank's batch whose gradients, in all parameters of `modules`, are averaged over the ranks."""
    if world_size() == 1:
        return losses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions have another word for broadcast_buffers
        together = DistributedDataParallel(
            _Together(losses, modules),
            device_ids=None,  # with them it would move batches, which are where they must be
            broadcast_buffers=False,
            gradient_as_bucket_view=True,  # or each gradient is there twice
        )
    # After its first backward pass it puts gradients together in another way, and sums them in another order: with this
    # one before all steps, those of a run that goes on are summed as if it had not been stopped.
    together()["nothing"].backward()
    return together


class _Together(nn.Module):
    """Losses, and the modules that they use, as the one module that DistributedDataParallel wants.

    Without a batch it gives a zero that depends on all parameters.
    """

    def __init__(self, losses: Callable[..., dict[str, torch.Tensor]], modules: list[nn.Module]):
        super().__init__()
        self.used, self.losses = nn.ModuleList(modules), losses

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return (
            self.losses(**batch)
            if batch
            else {"nothing": sum((0 * one.sum() for one in self.parameters()), torch.zeros(()))}
        )
