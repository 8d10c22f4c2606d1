"""MobileFaceNet with a global depthwise convolution, with the published parameter names and shapes."""

import torch
from torch import nn


class ConvBlock(nn.Module):
    """Convolution - BN - PReLU, without the PReLU if `activation` is False."""

    def __init__(self, in_channels, out_channels, kernel=1, stride=1, padding=0, groups=1, activation=True):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.prelu = nn.PReLU(out_channels) if activation else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.prelu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, linear 1x1 projection; `residual` adds the input to the output."""

    def __init__(self, in_channels: int, out_channels: int, middle_channels: int, stride: int, residual: bool):
        super().__init__()
        self.conv = ConvBlock(in_channels, middle_channels)
        self.conv_dw = ConvBlock(middle_channels, middle_channels, 3, stride, 1, groups=middle_channels)
        self.project = ConvBlock(middle_channels, out_channels, activation=False)
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.project(self.conv_dw(self.conv(x)))
        return x + out if self.residual else out


class ResidualStage(nn.Module):
    """A sequence of `depth` residual bottlenecks that keeps the shape (B, channels, H, W)."""

    def __init__(self, channels: int, middle_channels: int, depth: int):
        super().__init__()
        self.model = nn.Sequential(
            *(Bottleneck(channels, channels, middle_channels, 1, residual=True) for _ in range(depth))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class GlobalDepthwise(nn.Module):
    """Global 7x7 depthwise convolution, linear layer and BN: (B, 512, 7, 7) -> features (B, embedding_size)."""

    def __init__(self, embedding_size: int):
        super().__init__()
        self.conv_6_dw = ConvBlock(512, 512, 7, groups=512, activation=False)
        self.linear = nn.Linear(512, embedding_size, bias=False)
        self.bn = nn.BatchNorm1d(embedding_size, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.linear(self.conv_6_dw(x).flatten(1)))


class MobileFaceNet(nn.Module):
    """Compact face network: images (B, 3, 112, 112) in [-1, 1] -> features (B, embedding_size), not normalised."""

    def __init__(self, embedding_size: int = 512):
        super().__init__()
        self.conv1 = ConvBlock(3, 64, 3, 2, 1)
        self.conv2_dw = ConvBlock(64, 64, 3, 1, 1, groups=64)
        self.conv_23 = Bottleneck(64, 64, 128, 2, residual=False)
        self.conv_3 = ResidualStage(64, 128, 4)
        self.conv_34 = Bottleneck(64, 128, 256, 2, residual=False)
        self.conv_4 = ResidualStage(128, 256, 6)
        self.conv_45 = Bottleneck(128, 128, 512, 2, residual=False)
        self.conv_5 = ResidualStage(128, 256, 2)
        self.conv_6_sep = ConvBlock(128, 512)
        self.output_layer = GlobalDepthwise(embedding_size)

        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2_dw(self.conv1(x))
        x = self.conv_3(self.conv_23(x))
        x = self.conv_4(self.conv_34(x))
        x = self.conv_5(self.conv_45(x))
        return self.output_layer(self.conv_6_sep(x))
