"""Margin headers that are sharded over the classes: each rank holds only its own columns of `kernel`.

Rank r of N holds up to ceil(C / N) classes, from r * ceil(C / N) on; the last ranks may hold fewer, or none. Each rank
computes a header of utils.losses over its W classes and one extra column, the last. That column is the target of every
sample of the global batch whose class another rank holds. It is zero and gets no gradient, so it stays zero. Its
cosines are therefore zero too, and an all_reduce (sum) of the target cosines gives every rank the true ones.

Shapes: b samples per rank, the same number on each; B = N * b samples in the global batch, those of rank 0 first; C
classes in all; W + 1 columns on this rank.

Gradients are scaled for DistributedDataParallel, which averages the backbone's gradients over the ranks: a rank's
embeddings get N times the gradient of the loss, as with a dense header and the mean over the rank's own b samples.
`kernel` gets the gradient of the loss itself. It differs between ranks, so DistributedDataParallel must not wrap it.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from utils.distributed.collectives import gathered, own, reduced
from utils.distributed.world import is_first, rank, world_size


def dense_state_dict(header: nn.Module | None) -> dict[str, torch.Tensor]:
    """Returns the state dict of a dense or sharded header in its dense form; {} without a header.

    All ranks must call it. With a sharded header, ranks other than 0 get {}.
    """
    if isinstance(header, ShardedHeader):
        return header.dense_state_dict() or {}
    return header.state_dict() if header is not None else {}


@functools.cache
def sharded(kind: type[nn.Module]) -> type["ShardedHeader"]:
    """Returns a subclass of the header class `kind` that is sharded over the default process group.

    Its constructor takes the arguments of `kind`.
    """
    return type(f"Sharded{kind.__name__}", (ShardedHeader, kind), {"dense": kind})


class ShardedHeader(nn.Module):
    """Mixin that shards a header: `sharded` puts it before the dense class in the method resolution order.

    `loss` all-gathers the batch, so the dense class's methods see all B samples. `of_all` and `own` are therefore
    the identity here.
    """

    dense: type[nn.Module]

    def __init__(self, in_features: int, out_features: int, *settings, **named):
        """Draws the same kernel as the dense header and leaves the CPU's generator in the same state."""
        columns = columns_of(rank(), out_features)
        shard = slice(columns.start, columns.stop)
        with torch.random.fork_rng(devices=[]):
            super().__init__(in_features, len(columns) + 1, *settings, **named)
        self.classes, self.columns = out_features, columns
        with torch.no_grad():
            self.kernel[:, -1] = 0
            # PyTorch draws normals in groups of 16, so 16 rows at a time give the same numbers as a single draw.
            for rows in self.kernel[:, :-1].split(16):
                rows.copy_(self.dense(len(rows), out_features, *settings, **named).kernel[:, shard])

    def of_all(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def own(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def loss(self, *inputs: torch.Tensor, **options: Any) -> torch.Tensor:
        """Returns the mean cross-entropy of all B samples, the same on every rank.

        `inputs` are embeddings (b, D), for AdaDistill the student's and the teacher's, then labels (b,) int64. Named
        ones are passed to `forward`. The loss is infinite if a label is not in range(C).
        """
        *embeddings, label = inputs
        label = gathered(label) - self.columns.start
        label = torch.where((label >= 0) & (label < len(self.columns)), label, len(self.columns))
        logits = self(*map(Gathered.apply, embeddings), label, **options)
        return _CrossEntropy.apply(logits, label.unsqueeze(1))

    def target_logit(self, target: torch.Tensor) -> torch.Tensor:
        """Applies the margin to all target cosines (B, 1), given this rank's (0 for classes of other ranks).

        The gradient flows to the cosines of this rank only.
        """
        return super().target_logit(target + (reduced(target.detach()) - target.detach()))

    def adjusted(self, logits: torch.Tensor, column: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Adjusts this rank's logits (B, W + 1), given all target cosines; no gradient flows to the targets."""
        return super().adjusted(logits, column, reduced(target))

    def is_held(self, label: torch.Tensor) -> torch.Tensor:
        """Returns a mask (B,) bool of the samples whose class this rank holds."""
        return label < len(self.columns)

    def mean_of_all(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the mean of values (B,) of which each rank has those of its classes, and zeros for the others."""
        return reduced(values.sum()) / len(values)

    @torch.no_grad()
    def set_centres(self, kernel: torch.Tensor) -> None:
        """Copies this rank's columns of the class centres (D, C) into `kernel`."""
        self.kernel[:, :-1] = kernel[:, self.columns.start : self.columns.stop]

    # Files --------------------------------------------------------------------------------------------------------
    # Shards are sent from CPU to CPU, by gloo: NCCL would make a communicator for every pair of ranks.

    def dense_state_dict(self) -> dict[str, torch.Tensor] | None:
        """Returns the state dict of the dense header, `kernel` (D, C) on the CPU, on rank 0; None on the others.

        All ranks must call it.
        """
        kernel = self.gather(self.kernel)
        if kernel is None:
            return None
        state = self.state_dict()
        state["kernel"] = kernel
        return state

    def load_dense_state_dict(self, state: Mapping[str, torch.Tensor] | None) -> None:
        """Loads the state dict of a dense header, given on rank 0 and None elsewhere. All ranks must call it.

        The number of ranks may differ from when it was saved. Raises RuntimeError on rank 0 if it does not fit.
        """
        local_state = self.state_dict()
        if state is not None:
            self.require_fit(state)
        self.scatter(state and state["kernel"], local_state.pop("kernel"))
        for name, value in local_state.items():
            if state is not None:
                value.copy_(state[name])
            dist.broadcast(value, 0)

    def require_fit(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raises RuntimeError if names or shapes of a state dict differ from those of the dense header."""
        shapes = {name: value.shape for name, value in self.state_dict().items()}
        shapes["kernel"] = torch.Size((len(self.kernel), self.classes))
        if {name: value.shape for name, value in state.items()} != shapes:
            raise RuntimeError(f"the header's state dict does not have the shapes {shapes}")

    @torch.no_grad()
    def gather(self, columns: torch.Tensor) -> torch.Tensor | None:
        """Gathers the shards (D, W + 1) of the kernel, its gradient or its momentum to rank 0.

        Returns (D, C) on the CPU of rank 0, None on the other ranks.
        """
        if not is_first():
            if self.columns:
                dist.send(columns[:, :-1].cpu().contiguous(), 0)
            return None
        whole = torch.empty(len(columns), self.classes, dtype=columns.dtype)
        whole[:, : len(self.columns)] = columns[:, :-1]
        for other, shard in self._other_shards():
            part = torch.empty(len(columns), len(shard), dtype=columns.dtype)
            dist.recv(part, other)
            whole[:, shard.start : shard.stop] = part
        return whole

    @torch.no_grad()
    def scatter(self, whole: torch.Tensor | None, columns: torch.Tensor) -> None:
        """Scatters `whole` (D, C) of rank 0 to `columns` (D, W + 1) of each rank, in place: the inverse of `gather`."""
        columns[:, -1] = 0
        if not is_first():
            if self.columns:
                part = torch.empty(len(columns), len(self.columns), dtype=columns.dtype)
                dist.recv(part, 0)
                columns[:, :-1] = part
            return
        columns[:, :-1] = whole[:, : len(self.columns)]
        for other, shard in self._other_shards():
            dist.send(whole[:, shard.start : shard.stop].to("cpu", columns.dtype).contiguous(), other)

    def _other_shards(self) -> list[tuple[int, range]]:
        """Returns (rank, classes) of every rank other than 0 that holds classes."""
        parts = [(other, columns_of(other, self.classes)) for other in range(1, world_size())]
        return [(other, columns) for other, columns in parts if columns]


def columns_of(holder: int, classes: int) -> range:
    """Returns the range of classes that rank `holder` holds, of `classes` in all."""
    most = -(-classes // world_size())
    return range(min(holder * most, classes), min((holder + 1) * most, classes))


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy over the classes of all ranks; saves one (B, W + 1) tensor for backward, the logits."""

    @staticmethod
    def forward(ctx, logits, column):
        """Takes this rank's logits (B, W + 1) and targets `column` (B, 1), W if another rank holds the class.

        The logits of column W are ignored.
        """
        held = column < logits.shape[1] - 1
        log_sum = logits[:, :-1].logsumexp(1, keepdim=True)  # -inf on a rank without classes
        target = logits.gather(1, column).masked_fill_(~held, -torch.inf)
        highest, target = reduced(torch.stack((log_sum, target)), dist.ReduceOp.MAX)
        log_sum = reduced((log_sum - highest).exp_()).log_().add_(highest)
        ctx.save_for_backward(logits, column, held, log_sum)
        return (log_sum - target).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logits, column, held, log_sum = ctx.saved_tensors
        grad_logits = (logits - log_sum).exp_()
        grad_logits[:, -1] = 0
        grad_logits.scatter_add_(1, column, -held.to(grad_logits.dtype))
        return grad_logits.mul_(grad / len(logits)), None


class Gathered(torch.autograd.Function):
    """All-gathers along the batch dimension: (b, ...) -> (B, ...).

    The backward pass returns this rank's part of the gradient that is summed over the ranks, times the number of ranks
    (see the module's docstring).
    """

    @staticmethod
    def forward(ctx, rows):
        return gathered(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return own(reduced(grad)) * world_size()
