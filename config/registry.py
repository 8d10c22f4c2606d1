"""The networks, losses and methods that a setting can name, one entry each: where a new one is added.

A class is named as "module:Class" and imported when a script builds it: settings are read without PyTorch.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from config.errors import InputError


@dataclass(frozen=True)
class Network:
    """A face network: its class and the options of its constructor."""

    module: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """A header: its class, the published mean and standard deviation of its margin, and options of its constructor.

    Where `std` is 0 the margin is the same for every sample, and the constructor takes no `std`.
    """

    module: str
    m: float
    std: float = 0.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


NETWORKS = {
    "iresnet18": Network("backbones.iresnet:IResNet", {"blocks": (2, 2, 2, 2)}),
    "iresnet34": Network("backbones.iresnet:IResNet", {"blocks": (3, 4, 6, 3)}),
    "iresnet50": Network("backbones.iresnet:IResNet", {"blocks": (3, 4, 14, 3), "dropout": 0.4}),
    "iresnet100": Network("backbones.iresnet:IResNet", {"blocks": (3, 13, 30, 3)}),
    "mobilefacenet": Network("backbones.mobilefacenet:MobileFaceNet"),
    # For generated faces on a CPU. At least 16 channels: see tests/unit/backbones/test_backbones.py.
    "iresnet_tiny": Network(
        "backbones.iresnet:IResNet", {"blocks": (1, 1, 1, 1), "widths": (16, 16, 32, 64), "stem_stride": 2}
    ),
}

LOSSES = {
    "ElasticArcFace": Loss("utils.losses.margin:ElasticArcFace", 0.50, 0.05),
    "ElasticArcFace+": Loss("utils.losses.margin:ElasticArcFace", 0.50, 0.0175, {"plus": True}),
    "ElasticCosFace": Loss("utils.losses.margin:ElasticCosFace", 0.35, 0.05),
    "ElasticCosFace+": Loss("utils.losses.margin:ElasticCosFace", 0.35, 0.02, {"plus": True}),
    "ArcFace": Loss("utils.losses.margin:ArcFace", 0.50),
    "CosFace": Loss("utils.losses.margin:CosFace", 0.35),
    "CurricularFace": Loss("utils.losses.margin:CurricularFace", 0.50),
}
"""Losses of teachers. Their margins are those of MST-KD (paper 4.2) and of ElasticFace's configuration."""

ADA_LOSSES = {
    "AdaArcDistill": Loss("utils.losses.adadistill:AdaDistill", 0.45, 0.0, {"margin": "arc"}),
    "AdaCosDistill": Loss("utils.losses.adadistill:AdaDistill", 0.35, 0.0, {"margin": "cos"}),
    "ArcDistill": Loss("utils.losses.adadistill:ArcDistill", 0.45),
    "CosDistill": Loss("utils.losses.adadistill:CosDistill", 0.35),
}
"""AdaDistill's losses. Margins from its ablation; those of the two with frozen centres are not stated."""

ADAPTORS = {"SL": "fc_EArc.py", "DuL": "dual_layer_EAF-Fusion.py", "DLDPO": "dual_layer_EAF-Fusion.py"}
"""The adaptors, and the script that trains each."""

METHODS = {
    "a-KD": "KD_alone.py",
    "EAF-KD": "KD_CEL.py",
    "AdaArcDistill": "KD_AdaDistill.py",
    "AdaCosDistill": "KD_AdaDistill.py",
    "AdaArcDistill-alpha": "KD_AdaDistill.py",  # alpha is not weighted (Eq. 7)
    "AdaCosDistill-alpha": "KD_AdaDistill.py",
    "ArcDistill": "KD_AdaDistill.py",
    "CosDistill": "KD_AdaDistill.py",
}
"""The distillation methods, and the script that trains a student by each. The evaluation looks for these students."""

CHOICES = {
    "network": NETWORKS,
    "student_network": NETWORKS,
    "ada_student_network": NETWORKS,
    "loss": LOSSES,
    "ada_loss": ADA_LOSSES,
    "ada_source": ("adaptor", "teacher"),
    "device": ("cpu", "cuda"),
    "precision": ("fp32", "tf32", "bf16"),
    "weights": ("best", "last"),
    "init_header": ("means",),
    "share_of": ("identities", "images"),
}
"""The values that a setting can have."""


def named(kind: str, names: Mapping[str, Any], name: str) -> Any:
    """Returns the entry `name` of a table above. Raises InputError that lists the names if there is none."""
    if name not in names:
        raise InputError(f"There is no {kind} {name!r}: choose {', '.join(names)}, or add it to config/registry.py.")
    return names[name]


def build(entry: Network | Loss, *inputs: Any, **options: Any) -> Any:
    """Builds an instance of the entry's class. `options` take precedence over those of the entry."""
    return class_of(entry)(*inputs, **{**entry.options, **options})


def class_of(entry: Network | Loss) -> type:
    """Imports the class of an entry."""
    return resolve_name(entry.module)
