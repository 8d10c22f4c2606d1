"""Builds networks and adaptors by name."""

from typing import Any

import torch
from torch import nn

from backbones.adaptors import DualLayerAdaptor, SingleLayerAdaptor
from config.config import Config
from config.errors import InputError
from config.registry import NETWORKS, build, named


def build_backbone(name: str, embedding_size: int = 512, **options) -> nn.Module:
    """Builds a face network: images (B, 3, 112, 112) in [-1, 1] -> features (B, embedding_size), not normalised.

    Images are RGB; a network that takes BGR reverses them itself. Options of the iresnets are `dropout` (default: that
    of the published training, 0.4 for iresnet50, else 0) and `use_se` (squeeze-and-excitation). Raises InputError for
    an unknown name.
    """
    entry = named("network", NETWORKS, name)
    network = build(entry, embedding_size=embedding_size, **options)
    network.embedding_size = embedding_size
    if entry.channels == "BGR":
        network.register_forward_pre_hook(_reversed_channels)
    return network


def _reversed_channels(_, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    """Forward pre-hook that turns RGB images (B, 3, H, W) into BGR."""
    return inputs[0].flip(1)


def build_adaptor(name: str, cfg: Config, inputs: int | None = None) -> nn.Module:
    """Builds the adaptor SL, DuL or DLDPO for the concatenated embeddings of all teachers: (B, inputs) -> (B, D).

    `inputs` is the sum of the teachers' embedding sizes; None: every teacher has `embedding_size` dimensions, as D.
    Raises InputError in the standalone setting, which has one teacher and needs no adaptor.
    """
    if cfg.setting == "standalone":
        raise InputError("A standalone teacher needs no adaptor: set is_standalone to False, or ada_source to teacher.")
    inputs = len(cfg.teachers) * cfg.embedding_size if inputs is None else inputs
    size, dropout = cfg.embedding_size, 0.2 if name == "DLDPO" else 0.0
    adaptor: Any = (
        SingleLayerAdaptor(inputs, size)
        if name == "SL"
        else DualLayerAdaptor(inputs, cfg.middle_layer_size, size, dropout)
    )
    adaptor.embedding_size = size
    return adaptor
