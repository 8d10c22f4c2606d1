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


def margin_loss(header: nn.Module, *given: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of what a header, dense or sharded, is given: embeddings (b, D) and labels (b,) last."""
    return header(*given) if isinstance(header, ShardedHeader) else F.cross_entropy(header(*given), given[-1])


@functools.cache
def sharded(kind: type[nn.Module]) -> type["ShardedHeader"]:
    """The header class `kind` of utils.losses, sharded over the default process group; built with the same settings."""
    return type(f"Sharded{kind.__name__}", (ShardedHeader, kind), {"dense": kind})


class ShardedHeader(nn.Module):
    """What comes before a header's class in those that `sharded` makes: each of its methods sees all ranks.

    Random margins are drawn for the whole batch on every rank: with the default generator in the same state on all of
    them, they do not depend on how many there are. Otherwise a sample's is the one that its owner has drawn.
    """

    dense: type[nn.Module]

    def __init__(self, in_features: int, out_features: int, *settings, **named):
        """The kernel, and the state of the CPU's generator, are those after building the dense header."""
        own = columns_of(dist.get_rank(), out_features)
        with torch.random.fork_rng(devices=[]):
            super().__init__(in_features, len(own) + 1, *settings, **named)
        self.classes, self.own = out_features, own
        with torch.no_grad():
            self.kernel[:, -1] = 0
            for rows in self.kernel[:, :-1].split(16):  # PyTorch draws in sixteens: in parts it is the same as at once
                rows.copy_(self.dense(len(rows), out_features, *settings, **named).kernel[:, own.start : own.stop])

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        """Embeddings (b, D), AdaDistill's teacher's too, and labels (b,) int64 -> mean loss of all B, on every rank.

        It is infinite where a label is not in range(C).
        """
        *embeddings, label = given
        label = _gathered(label) - self.own.start
        label = torch.where((label >= 0) & (label < len(self.own)), label, len(self.own))
        logits = super().forward(*map(_Gathered.apply, embeddings), label)
        return _CrossEntropy.apply(logits, label.unsqueeze(1))

    def target_logit(self, target: torch.Tensor) -> torch.Tensor:
        """The cosines (B, 1) of the targets here -> what the header makes of all; the slope is that of those here."""
        return super().target_logit(target + (_reduced(target.detach()) - target.detach()))

    def adjusted(self, logits: torch.Tensor, column: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of the logits (B, W + 1) here, with all targets' cosines; no gradient of a negative reaches a target."""
        return super().adjusted(logits, column, _reduced(target))

    def update(self, student: torch.Tensor, teacher: torch.Tensor, label: torch.Tensor) -> None:
        """Moves the centres here by the samples (B, D) of their classes, rank 0's first; `alpha` is the mean of all."""
        own = label < len(self.own)
        total = student.new_zeros(())
        if own.any():
            super().update(student[own], teacher[own], label[own])
            total = self.alpha * own.sum()
        self.alpha = _reduced(total) / len(label)

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
            shapes = {name: value.shape for name, value in mine.items()}
            shapes["kernel"] = torch.Size((len(self.kernel), self.classes))
            if {name: value.shape for name, value in state.items()} != shapes:
                raise RuntimeError(f"a header's state dict that is not {shapes}")
        self.scatter(state and state["kernel"], mine.pop("kernel"))
        for name, value in mine.items():
            if state is not None:
                value.copy_(state[name])
            dist.broadcast(value, 0)

    @torch.no_grad()
    def gather(self, columns: torch.Tensor) -> torch.Tensor | None:
        """The kernel, its gradient or its momentum (D, W + 1) of all ranks: (D, C) on the CPU of rank 0, else None."""
        if dist.get_rank():
            if self.own:
                dist.send(columns[:, :-1].contiguous(), 0)
            return None
        whole = torch.empty(len(columns), self.classes, dtype=columns.dtype)
        whole[:, : len(self.own)] = columns[:, :-1]
        for rank, theirs in self._others():
            part = columns.new_empty(len(columns), len(theirs))
            dist.recv(part, rank)
            whole[:, theirs.start : theirs.stop] = part
        return whole

    @torch.no_grad()
    def scatter(self, whole: torch.Tensor | None, columns: torch.Tensor) -> None:
        """The opposite: fills `columns` (D, W + 1) of each rank from rank 0's `whole` (D, C)."""
        columns[:, -1] = 0
        if dist.get_rank():
            if self.own:
                part = columns.new_empty(len(columns), len(self.own))
                dist.recv(part, 0)
                columns[:, :-1] = part
            return
        columns[:, :-1] = whole[:, : len(self.own)]
        for rank, theirs in self._others():
            dist.send(whole[:, theirs.start : theirs.stop].to(columns).contiguous(), rank)

    def _others(self) -> list[tuple[int, range]]:
        """The ranks but 0 that hold classes, and which."""
        parts = [(rank, columns_of(rank, self.classes)) for rank in range(1, dist.get_world_size())]
        return [(rank, columns) for rank, columns in parts if columns]


def columns_of(rank: int, classes: int) -> range:
    """The classes that a rank holds."""
    most = -(-classes // dist.get_world_size())
    return range(min(rank * most, classes), min((rank + 1) * most, classes))


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy over the classes of all ranks; nothing of the size of the logits is kept but themselves."""

    @staticmethod
    def forward(ctx, logits, column):
        """Logits (B, W + 1), whose last column counts for nothing; `column` (B, 1) is a sample's class here, or it."""
        here = column < logits.shape[1] - 1
        summed = logits[:, :-1].logsumexp(1, keepdim=True)  # -inf on a rank without classes
        target = logits.gather(1, column).masked_fill_(~here, -torch.inf)
        highest, target = _reduced(torch.stack((summed, target)), dist.ReduceOp.MAX)
        summed = _reduced((summed - highest).exp_()).log_().add_(highest)
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


class _Gathered(torch.autograd.Function):
    """Rows (b, ...) of every rank -> (B, ...); backwards, the gradient of the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx, rows):
        return _gathered(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        ranks = dist.get_world_size()
        return _reduced(grad).chunk(ranks)[dist.get_rank()] * ranks


def _gathered(rows: torch.Tensor) -> torch.Tensor:
    whole = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(whole, rows.contiguous())
    return whole


def _reduced(tensor: torch.Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> torch.Tensor:
    """The sum over the ranks, or what `operation` says; the same bits on each."""
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(tensor, operation)
    return tensor
