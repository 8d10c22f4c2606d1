"""Networks with the published parameter names, built by name, and strict loading of state dicts."""

from backbones.adaptors import DualLayerAdaptor, MultiTeacher, SingleLayerAdaptor
from backbones.build import build_adaptor, build_backbone
from backbones.state_dicts import load_weights

__all__ = [
    "DualLayerAdaptor",
    "MultiTeacher",
    "SingleLayerAdaptor",
    "build_adaptor",
    "build_backbone",
    "load_weights",
]
