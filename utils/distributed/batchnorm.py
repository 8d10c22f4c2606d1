"""Batch normalisation whose statistics are those of the samples of all processes."""

import torch
from torch import nn

from utils.distributed import collectives
from utils.distributed.world import world_size


def share_statistics(network: nn.Module) -> None:
    """Makes the batch normalisations inside a network share their statistics; parameters and names stay.

    On a GPU they are PyTorch's, which refuses to work on a CPU: there they are those below.
    """
    if next(network.parameters()).device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = _SharedBatchNorm


class _SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Of (b, C, ...) of each process, as many on each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        others, kind = [0, *range(2, x.ndim)], x.dtype
        x = x.to(self.running_mean.dtype)  # as PyTorch's does in lower precision
        mean = _Mean.apply(x.mean(others, keepdim=True))
        centred = x - mean
        variance = _Mean.apply(centred.square().mean(others, keepdim=True))
        with torch.no_grad():
            count = x.numel() // x.shape[1] * world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(variance.flatten() * (count / (count - 1)), self.momentum)
        scaled = centred * (variance + self.eps).rsqrt()
        if self.affine:
            shape = [-1, *[1] * (x.ndim - 2)]
            scaled = scaled * self.weight.view(shape) + self.bias.view(shape)
        return scaled.to(kind)

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Any number of dimensions will do."""


class _Mean(torch.autograd.Function):
    """The mean over the processes; backwards, that of the gradients, as each process's loss is of its own samples."""

    @staticmethod
    def forward(ctx, values):
        return collectives.averaged(values)

    @staticmethod
    def backward(ctx, grad):
        return collectives.averaged(grad)
