"""Improved residual networks (IResNet) for aligned 112 x 112 faces, with the published parameter names and shapes."""

import torch
from torch import nn


class SqueezeExcitation(nn.Module):
    """Squeeze-and-excitation channel attention: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(pooled))))


class Block(nn.Module):
    """Residual block: (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride).

    Adds BN - 3x3 - BN - PReLU - 3x3 (stride) - BN to the input or to its strided 1x1 projection.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, use_se: bool):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.prelu = nn.PReLU(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.se_block = SqueezeExcitation(out_channels) if use_se else None
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv1(self.bn1(x))
        out = self.bn3(self.conv2(self.prelu(self.bn2(out))))
        if self.se_block is not None:
            out = self.se_block(out)
        return out + (x if self.downsample is None else self.downsample(x))


class IResNet(nn.Module):
    """Face network: images (B, 3, 112, 112) in [-1, 1] -> features (B, embedding_size), not normalised.

    `blocks` and `widths` are the number of blocks and of channels of the four stages; every stage halves the
    resolution. The published stem has `stem_stride` 1; 2 makes the network four times cheaper. `dropout` is applied to
    the flattened feature map before the last layer (0.4 in the published training of iresnet50, 0 otherwise).
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        embedding_size: int = 512,
        widths: tuple[int, int, int, int] = (64, 128, 256, 512),
        stem_stride: int = 1,
        dropout: float = 0.0,
        use_se: bool = False,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.prelu = nn.PReLU(widths[0])
        channels = (widths[0], *widths)
        for i in range(4):
            stage = [Block(channels[i], widths[i], 2, use_se)]
            stage += [Block(widths[i], widths[i], 1, use_se) for _ in range(blocks[i] - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.bn2 = nn.BatchNorm2d(widths[3])
        self.dropout = nn.Dropout(dropout)
        side = 7 if stem_stride == 1 else 4
        self.fc = nn.Linear(widths[3] * side * side, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size)
        # The scale of the features is fixed at one, as in ArcFace: only their direction is used.
        self.features.weight.requires_grad = False

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.dropout(self.bn2(x).flatten(1))
        return self.features(self.fc(x))
