"""Builds networks and adaptors by name."""

from torch import nn

from backbones.adaptors import DualLayerAdaptor, SingleLayerAdaptor
from config.config import Config
from config.errors import InputError
from config.registry import NETWORKS, build, named


def build_backbone(name: str, embedding_size: int = 512, **options) -> nn.Module:
    """Builds a face network: images (B, 3, 112, 112) in [-1, 1] -> features (B, embedding_size), not normalised.

    Options of the iresnets are `dropout` (default: that of the published training, 0.4 for iresnet50, else 0) and
    `use_se` (squeeze-and-excitation). Raises InputError for an unknown name.
    """
    return build(named("network", NETWORKS, name), embedding_size=embedding_size, **options)


def build_adaptor(name: str, cfg: Config, inputs: int | None = None) -> nn.Module:
    """Builds the adaptor SL, DuL or DLDPO for the concatenated embeddings of all teachers: (B, inputs) -> (B, D).

    `inputs` is the sum of the teachers' embedding sizes; None: every teacher has `embedding_size` dimensions, as D.
    Raises InputError in the standalone setting, which has one teacher and needs no adaptor.
    """
    if cfg.setting == "standalone":
        raise InputError("A standalone teacher needs no adaptor: set is_standalone to False, or ada_source to teacher.")
    inputs = len(cfg.teachers) * cfg.embedding_size if inputs is None else inputs
    if name == "SL":
        return SingleLayerAdaptor(inputs, cfg.embedding_size)
    return DualLayerAdaptor(inputs, cfg.middle_layer_size, cfg.embedding_size, 0.2 if name == "DLDPO" else 0.0)
