"""Batch normalisation with the statistics of all ranks' samples."""

import itertools

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.distributed import collectives
from utils.distributed.world import world_size


def share_statistics(network: nn.Module) -> None:
    """Replaces the batch normalisations inside a network by synchronised ones, which share parameters and buffers.

    On CUDA these are nn.SyncBatchNorm, which refuses to run on a CPU; there they are CpuSyncBatchNorm.
    """
    if next(network.parameters()).device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return
    for parent in [*network.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, CpuSyncBatchNorm(child))


class CpuSyncBatchNorm(_BatchNorm):
    """Normalises (b, C, ...), with the same b on each rank, by the mean and variance over all ranks' samples.

    It takes the settings, parameters and buffers of the module that it replaces.
    """

    def __init__(self, replaced: _BatchNorm):
        super().__init__(replaced.num_features, replaced.eps, replaced.momentum, replaced.affine)
        for name, value in itertools.chain(replaced.named_parameters(), replaced.named_buffers()):
            setattr(self, name, value)
        self.training = replaced.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        reduced, dtype = [0, *range(2, x.ndim)], x.dtype
        x = x.to(self.running_mean.dtype)  # PyTorch's too computes statistics of bf16 in fp32
        mean = _Mean.apply(x.mean(reduced, keepdim=True))
        centred = x - mean
        variance = _Mean.apply(centred.square().mean(reduced, keepdim=True))
        with torch.no_grad():
            count = x.numel() // x.shape[1] * world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(variance.flatten() * (count / (count - 1)), self.momentum)
        normalised = centred * (variance + self.eps).rsqrt()
        if self.affine:
            shape = [-1, *[1] * (x.ndim - 2)]
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(dtype)

    def _check_input_dim(self, x: torch.Tensor) -> None:
        """Accepts any number of dimensions, for which nn.BatchNorm1d and nn.BatchNorm2d differ."""


class _Mean(torch.autograd.Function):
    """Means over the ranks. Gradients are averaged too, because each rank's loss is the mean over its own samples."""

    @staticmethod
    def forward(ctx, values):
        return collectives.averaged(values)

    @staticmethod
    def backward(ctx, grad):
        return collectives.averaged(grad)
