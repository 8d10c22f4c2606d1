"""Margin headers whose classes are spread over processes: none of them holds more than its columns of `kernel`.

Rank r of N holds the classes from r * ceil(C / N) on, as many at most; the last ranks may hold fewer, or none. What a
rank computes is a header of utils.losses over its own classes and one more, the last column, elsewhere: there every
sample of the global batch whose class another rank holds has its target. That column is zero, hence the cosines in it
are, and the sum over the ranks of the targets' cosines is those of their owners. It stays zero: no gradient reaches it.

Shapes: b samples of a rank, the same number on each; B = N * b of all, rank 0's first; C classes, W + 1 columns here.

Gradients are meant for DistributedDataParallel, which averages those of the backbone over the ranks: a rank's
embeddings get N times the gradient of the loss, as they do from the mean over its own b samples with a dense header.
`kernel` gets the gradient of the loss itself, and is no business of DistributedDataParallel's: it differs by rank.
"""

import functools
from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from utils.distributed.collectives import gathered, own, reduced
from utils.distributed.world import is_first, rank, world_size


def margin_loss(header: nn.Module, *given: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of what a header, dense or sharded, is given: embeddings (b, D) and labels (b,) last."""
    return header(*given) if isinstance(header, ShardedHeader) else F.cross_entropy(header(*given), given[-1])


def spread(kind: type[nn.Module], sharding: bool) -> type[nn.Module]:
    """The header class `kind`, with `sharding` spread over the processes, if there are several."""
    return sharded(kind) if sharding and world_size() > 1 else kind


def dense_state_dict(header: nn.Module | None) -> dict[str, torch.Tensor]:
    """What a file holds of a header, dense or sharded, or of none: that of the dense one. All ranks call it.

    On other ranks than 0 it may be empty.
    """
    if isinstance(header, ShardedHeader):
        return header.dense_state_dict() or {}
    return header.state_dict() if header is not None else {}


@functools.cache
def sharded(kind: type[nn.Module]) -> type["ShardedHeader"]:
    """The header class `kind` of utils.losses, sharded over the default process group; built with the same settings."""
    return type(f"Sharded{kind.__name__}", (ShardedHeader, kind), {"dense": kind})


class ShardedHeader(nn.Module):
    """What comes before a header's class in those that `sharded` makes: each of its methods sees all ranks.

    Of what is computed here, all samples are those of all ranks already.
    """

    dense: type[nn.Module]

    def __init__(self, in_features: int, out_features: int, *settings, **named):
        """The kernel, and the state of the CPU's generator, are those after building the dense header."""
        columns = columns_of(rank(), out_features)
        here = slice(columns.start, columns.stop)
        with torch.random.fork_rng(devices=[]):
            super().__init__(in_features, len(columns) + 1, *settings, **named)
        self.classes, self.columns = out_features, columns
        with torch.no_grad():
            self.kernel[:, -1] = 0
            for rows in self.kernel[:, :-1].split(16):  # PyTorch draws in sixteens: in parts it is the same as at once
                rows.copy_(self.dense(len(rows), out_features, *settings, **named).kernel[:, here])

    def of_all(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def own(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        """Embeddings (b, D), AdaDistill's teacher's too, and labels (b,) int64 -> mean loss of all B, on every rank.

        It is infinite where a label is not in range(C).
        """
        *embeddings, label = given
        label = gathered(label) - self.columns.start
        label = torch.where((label >= 0) & (label < len(self.columns)), label, len(self.columns))
        logits = super().forward(*map(Gathered.apply, embeddings), label)
        return _CrossEntropy.apply(logits, label.unsqueeze(1))

    def target_logit(self, target: torch.Tensor) -> torch.Tensor:
        """The cosines (B, 1) of the targets here -> what the header makes of all; the slope is that of those here."""
        return super().target_logit(target + (reduced(target.detach()) - target.detach()))

    def adjusted(self, logits: torch.Tensor, column: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of the logits (B, W + 1) here, with all targets' cosines; no gradient of a negative reaches a target."""
        return super().adjusted(logits, column, reduced(target))

    def update(self, student: torch.Tensor, teacher: torch.Tensor, label: torch.Tensor) -> None:
        """Moves the centres here by the samples (B, D) of their classes, rank 0's first; `alpha` is the mean of all."""
        mine = label < len(self.columns)
        total = student.new_zeros(())
        if mine.any():
            super().update(student[mine], teacher[mine], label[mine])
            total = self.alpha * mine.sum()
        self.alpha = reduced(total) / len(label)

    @torch.no_grad()
    def set_centres(self, kernel: torch.Tensor) -> None:
        """Takes those of the classes here."""
        self.kernel[:, :-1] = kernel[:, self.columns.start : self.columns.stop]

    # Files --------------------------------------------------------------------------------------------------------

    def dense_state_dict(self) -> dict[str, torch.Tensor] | None:
        """On rank 0 the state dict of the dense header, `kernel` (D, C) on the CPU; None on the others. All call it."""
        kernel = self.gather(self.kernel)
        if kernel is None:
            return None
        state = self.state_dict()
        state["kernel"] = kernel
        return state

    def load_dense_state_dict(self, state: Mapping[str, torch.Tensor] | None) -> None:
        """Takes on rank 0 what `dense_state_dict` gives there, for any number of ranks; all call it.

        Raises RuntimeError on rank 0 if it is of another header.
        """
        mine = self.state_dict()
        if state is not None:
            self.require_fit(state)
        self.scatter(state and state["kernel"], mine.pop("kernel"))
        for name, value in mine.items():
            if state is not None:
                value.copy_(state[name])
            dist.broadcast(value, 0)

    def require_fit(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raises RuntimeError where the state dict is not that of the dense header."""
        shapes = {name: value.shape for name, value in self.state_dict().items()}
        shapes["kernel"] = torch.Size((len(self.kernel), self.classes))
        if {name: value.shape for name, value in state.items()} != shapes:
            raise RuntimeError(f"a header's state dict that is not {shapes}")

    @torch.no_grad()
    def gather(self, columns: torch.Tensor) -> torch.Tensor | None:
        """The kernel, its gradient or its momentum (D, W + 1) of all ranks: (D, C) on the CPU of rank 0, else None."""
        if not is_first():
            if self.columns:
                dist.send(columns[:, :-1].contiguous(), 0)
            return None
        whole = torch.empty(len(columns), self.classes, dtype=columns.dtype)
        whole[:, : len(self.columns)] = columns[:, :-1]
        for other, theirs in self._others():
            part = columns.new_empty(len(columns), len(theirs))
            dist.recv(part, other)
            whole[:, theirs.start : theirs.stop] = part
        return whole

    @torch.no_grad()
    def scatter(self, whole: torch.Tensor | None, columns: torch.Tensor) -> None:
        """The opposite: fills `columns` (D, W + 1) of each rank from rank 0's `whole` (D, C)."""
        columns[:, -1] = 0
        if not is_first():
            if self.columns:
                part = columns.new_empty(len(columns), len(self.columns))
                dist.recv(part, 0)
                columns[:, :-1] = part
            return
        columns[:, :-1] = whole[:, : len(self.columns)]
        for other, theirs in self._others():
            dist.send(whole[:, theirs.start : theirs.stop].to(columns).contiguous(), other)

    def _others(self) -> list[tuple[int, range]]:
        """The ranks but 0 that hold classes, and which."""
        parts = [(other, columns_of(other, self.classes)) for other in range(1, world_size())]
        return [(other, columns) for other, columns in parts if columns]


def columns_of(holder: int, classes: int) -> range:
    """The classes that a rank holds."""
    most = -(-classes // world_size())
    return range(min(holder * most, classes), min((holder + 1) * most, classes))


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy over the classes of all ranks; nothing of the size of the logits is kept but themselves."""

    @staticmethod
    def forward(ctx, logits, column):
        """Logits (B, W + 1), whose last column counts for nothing; `column` (B, 1) is a sample's class here, or it."""
        here = column < logits.shape[1] - 1
        summed = logits[:, :-1].logsumexp(1, keepdim=True)  # -inf on a rank without classes
        target = logits.gather(1, column).masked_fill_(~here, -torch.inf)
        highest, target = reduced(torch.stack((summed, target)), dist.ReduceOp.MAX)
        summed = reduced((summed - highest).exp_()).log_().add_(highest)
        ctx.save_for_backward(logits, column, here, summed)
        return (summed - target).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logits, column, here, summed = ctx.saved_tensors
        share = (logits - summed).exp_()
        share[:, -1] = 0
        share.scatter_add_(1, column, -here.to(share.dtype))
        return share.mul_(grad / len(logits)), None


class Gathered(torch.autograd.Function):
    """Rows (b, ...) of every rank -> (B, ...); backwards, the gradient of the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx, rows):
        return gathered(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return own(reduced(grad)) * world_size()
