"""Builds networks and adaptors by name."""

from typing import Any

from torch import nn

from backbones.adaptors import DualLayerAdaptor, SingleLayerAdaptor
from backbones.iresnet import IResNet
from backbones.mobilefacenet import MobileFaceNet
from config.config import Config
from config.errors import InputError

IRESNETS: dict[str, dict[str, Any]] = {
    "iresnet18": {"blocks": (2, 2, 2, 2)},
    "iresnet34": {"blocks": (3, 4, 6, 3)},
    "iresnet50": {"blocks": (3, 4, 14, 3), "dropout": 0.4},
    "iresnet100": {"blocks": (3, 13, 30, 3)},
    # For generated faces on a CPU. At least 16 channels: see tests/unit/backbones/test_backbones.py.
    "iresnet_tiny": {"blocks": (1, 1, 1, 1), "widths": (16, 16, 32, 64), "stem_stride": 2},
}


def build_backbone(name: str, embedding_size: int = 512, **options) -> nn.Module:
    """Builds a face network: images (B, 3, 112, 112) in [-1, 1] -> features (B, embedding_size), not normalised.

    Options of the iresnets are `dropout` (default: that of the published training, 0.4 for iresnet50, else 0) and
    `use_se` (squeeze-and-excitation). Raises InputError for an unknown name.
    """
    if name in IRESNETS:
        return IResNet(embedding_size=embedding_size, **{**IRESNETS[name], **options})
    if name == "mobilefacenet":
        return MobileFaceNet(embedding_size, **options)
    raise InputError(f"There is no network {name!r}: choose {', '.join((*IRESNETS, 'mobilefacenet'))}.")


def build_adaptor(name: str, cfg: Config) -> nn.Module:
    """Builds the adaptor SL, DuL or DLDPO for the embeddings of all T teachers: (B, T * D) -> (B, D).

    Raises InputError in the standalone setting, which has one teacher and needs no adaptor.
    """
    if cfg.setting == "standalone":
        raise InputError("A standalone teacher needs no adaptor: set is_standalone to False, or ada_source to teacher.")
    inputs = len(cfg.teachers) * cfg.embedding_size
    if name == "SL":
        return SingleLayerAdaptor(inputs, cfg.embedding_size)
    return DualLayerAdaptor(inputs, cfg.middle_layer_size, cfg.embedding_size, 0.2 if name == "DLDPO" else 0.0)
