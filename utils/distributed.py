"""The processes of one training under torchrun, and what they tell each other; without torchrun there is one.

Each is a rank of torch.distributed's default group, with NCCL on GPUs and gloo on CPUs. Rank 0 prints and writes. Every
function here that exchanges something must be called by all ranks, in the same order; alone it changes nothing.
"""

import dataclasses
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import InputError
from utils.meeting import Ended, Lookout, Meeting, limited
from utils.world import is_first, is_launched, rank, world_size

if TYPE_CHECKING:
    from config.config import Config

BY_MACHINE = ("data", "pairs", "cache", "num_threads", "num_workers", "device_cache_gb")
"""Settings that may differ from machine to machine; of `data` and `pairs` the content is compared."""

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for another in a step; one that has died is noticed at once, by torchrun."""

LONG = timedelta(days=7)
"""The same where one rank works for all: it may decode millions of images."""

ALL_ALONG = timedelta(days=36_500)
"""The same for those on the lookout, who wait from the first step to the last."""

_meeting: Meeting | None = None
_control: dist.ProcessGroup | None = None  # for what the CPUs tell each other, in no GPU's way
_lookout: Lookout | None = None


# From meeting to leaving ----------------------------------------------------------------------------------------------


def meet() -> None:
    """Finds the place where the processes that torchrun has started meet; from here on one of them speaks for all.

    Raises InputError where it is taken or not given.
    """
    global _meeting
    if not is_launched() or _meeting is not None:
        return
    _meeting = Meeting()
    if _meeting.rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        sys.stderr = _NoTerminal(sys.stderr)


class _NoTerminal:
    """A stream for messages only: progress bars are silent where there is no terminal."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return False


def join(cfg: "Config", device: torch.device, on_loss: Callable[[Exception], None]) -> None:
    """Makes the processes that have met the default group, on `device`'s kind; `on_loss` is that of `Lookout`.

    Raises InputError where they have not the same settings or devices, or where one does not come.
    """
    global _control, _lookout
    if _meeting is None:
        return
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device.type == "cuda":
        if not dist.is_nccl_available():
            raise InputError("device = 'cuda' under torchrun needs NCCL, which this PyTorch lacks: set device to cpu.")
        if local >= torch.cuda.device_count():
            raise InputError(
                f"Process {local} of this machine has no GPU, of which it has {torch.cuda.device_count()}: "
                "set torchrun's --nproc_per_node to as many, or device to cpu."
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        _meeting.complete()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        place = {"store": _meeting.store, "rank": _meeting.rank, "world_size": _meeting.world_size}
        with limited(on_loss):
            dist.init_process_group(backend, timeout=PATIENCE, **place)
            _control = dist.new_group(backend="gloo", timeout=LONG)
            _lookout = Lookout(dist.new_group(backend="gloo", timeout=ALL_ALONG), on_loss)
    settings = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in BY_MACHINE}
    require_same({**settings, "kind of device": device.type}, "Start all with the same settings.")


def require_whole_batch(cfg: "Config") -> None:
    """Raises InputError where the batch of all cannot be divided, or leaves a process one image to normalise by."""
    ranks, size = world_size(), cfg.batch_size
    if cfg.global_batch and (size % ranks or size < 2 * ranks):
        raise InputError(
            f"batch_size = {size} cannot be divided among {ranks} processes with global_batch: set it to a multiple of "
            f"{ranks}, {2 * ranks} or more."
        )


def leave() -> None:
    """Waits for the others, so that none sees an end before its own, and leaves the group."""
    global _meeting, _control, _lookout
    if dist.is_initialized():
        wait_for_all()
        _lookout.leave()
        dist.destroy_process_group()
    _meeting = _control = _lookout = None


def number() -> int | None:
    """The rank of this process, also before it has joined; None where it has met nobody."""
    return _meeting.rank if _meeting else None


def speaks() -> bool:
    """Whether this process is the first of all to say how the run ends; True once, for one.

    Where it has met nobody, the first of its machine does.
    """
    return _meeting.speaks() if _meeting else os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def is_lost(error: Exception) -> bool:
    """Whether an error says that another rank has gone, as gloo, NCCL or the store say it."""
    words = ("by peer", "Broken pipe", "Connection refused", "likely closed", "remote process exited")
    return isinstance(error, Ended) or (world_size() > 1 and any(word in str(error) for word in words))


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


def reduced(tensor: torch.Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> torch.Tensor:
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
        return self.losses(**batch) if batch else {"nothing": sum(0 * one.sum() for one in self.parameters())}
