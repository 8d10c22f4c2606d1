"""IR and IR-SE networks for aligned 112 x 112 faces, with the parameter names of face.evoLVe, TFace and relatives.

The definitions differ in details, which are options of one class: see `config/registry.py` for who uses which.
"""

import torch
from torch import nn

from backbones.iresnet import SqueezeExcitation

PLAIN, BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)
"""Output channels of the four stages."""


class Unit(nn.Module):
    """Residual unit: (B, in_channels, H, W) -> (B, out_channels, H / stride, W / stride).

    With as many output as input channels the shortcut is the input, subsampled; else a strided 1x1 projection.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, bottleneck: bool, middle_bn: bool, se: bool):
        super().__init__()
        self.stride = stride
        self.shortcut_layer = None
        if in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut_layer = nn.Sequential(projection, nn.BatchNorm2d(out_channels))
        width = out_channels // 4 if bottleneck else out_channels
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        layers: list[nn.Module] = [nn.BatchNorm2d(in_channels)]
        for i, kernel in enumerate(kernels):
            is_last = i == len(kernels) - 1
            channels = (width if i else in_channels, out_channels if is_last else width)
            step = stride if is_last else 1
            layers.append(nn.Conv2d(*channels, kernel, step, padding=kernel // 2, bias=False))
            layers += [nn.BatchNorm2d(channels[1])] if middle_bn or is_last else []
            layers += [] if is_last else [nn.PReLU(width)]
        self.res_layer = nn.Sequential(*layers)
        if se:  # definitions with a normalisation in the middle name this module, the others number it
            name = "se_block" if middle_bn else str(len(layers))
            self.res_layer.add_module(name, SqueezeExcitation(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride] if self.shortcut_layer is None else self.shortcut_layer(x)
        return self.res_layer(x) + shortcut


class IR(nn.Module):
    """Face network: images (B, 3, 112, 112) in [-1, 1] -> features (B, embedding_size), not normalised.

    `blocks` is the number of units of the four stages, each of which halves the resolution. `bottleneck` units have
    three convolutions and four times the channels. `middle_bn` normalises between convolution and PReLU. `use_se` adds
    squeeze-and-excitation, `affine` gives the last normalisation a scale and a shift. `dropout` is applied to the last
    feature map.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        embedding_size: int = 512,
        bottleneck: bool = False,
        middle_bn: bool = True,
        use_se: bool = False,
        affine: bool = False,
        dropout: float = 0.4,
    ):
        super().__init__()
        widths, units = (BOTTLENECK if bottleneck else PLAIN), []
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        self.output_layer = nn.Sequential(  # before the body, as in published state dicts
            nn.BatchNorm2d(widths[3]),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(widths[3] * 7 * 7, embedding_size),
            nn.BatchNorm1d(embedding_size, affine=affine),
        )
        channels = 64
        for width, count in zip(widths, blocks, strict=True):
            for i in range(count):
                units.append(Unit(channels, width, 1 if i else 2, bottleneck, middle_bn, use_se))
                channels = width
        self.body = nn.Sequential(*units)

        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output_layer(self.body(self.input_layer(x)))
