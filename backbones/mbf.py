"""The MobileFaceNet of insightface's arcface_torch (`mbf`, `mbf_large`), with its parameter names and shapes.

It is wider than `backbones.mobilefacenet`, and its second convolution is grouped instead of depthwise.
"""

import torch
from torch import nn


class Layers(nn.Module):
    """Layers one after another, in an attribute of their own, as in the published parameter names."""

    def __init__(self, *layers: nn.Module, residual: bool = False):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def convolution(in_channels, out_channels, kernel=1, stride=1, padding=0, groups=1, activation=True) -> Layers:
    """Returns a convolution and its normalisation, followed by a PReLU if `activation` is True."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
    return Layers(conv, nn.BatchNorm2d(out_channels), *([nn.PReLU(out_channels)] if activation else []))


def bottleneck(in_channels: int, out_channels: int, middle: int, stride: int, residual: bool = False) -> Layers:
    """Returns a 1x1 expansion to `middle` channels, a 3x3 depthwise convolution and a linear 1x1 projection."""
    depthwise = convolution(middle, middle, 3, stride, 1, groups=middle)
    projection = convolution(middle, out_channels, activation=False)
    return Layers(convolution(in_channels, middle), depthwise, projection, residual=residual)


def stage(channels: int, middle: int, depth: int) -> Layers:
    return Layers(*(bottleneck(channels, channels, middle, 1, residual=True) for _ in range(depth)))


class MBF(nn.Module):
    """Compact face network: images (B, 3, 112, 112) in [-1, 1] -> features (B, embedding_size), not normalised.

    `blocks` is the number of residual bottlenecks of the four stages; a first stage of one is a grouped convolution.
    `scale` multiplies the channels between the bottlenecks.
    """

    def __init__(self, embedding_size: int = 512, blocks: tuple[int, int, int, int] = (1, 4, 6, 2), scale: int = 2):
        super().__init__()
        narrow, wide = 64 * scale, 128 * scale
        is_single = blocks[0] == 1
        self.layers = nn.Sequential(
            convolution(3, narrow, 3, 2, 1),
            convolution(narrow, narrow, 3, 1, 1, groups=64) if is_single else stage(narrow, 128, blocks[0]),
            bottleneck(narrow, narrow, 128, 2),
            stage(narrow, 128, blocks[1]),
            bottleneck(narrow, wide, 256, 2),
            stage(wide, 256, blocks[2]),
            bottleneck(wide, wide, 512, 2),
            stage(wide, 256, blocks[3]),
        )
        self.conv_sep = convolution(wide, 512)
        self.features = Layers(
            convolution(512, 512, 7, groups=512, activation=False),
            nn.Flatten(),
            nn.Linear(512, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),
        )

        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(self.conv_sep(self.layers(x)))
