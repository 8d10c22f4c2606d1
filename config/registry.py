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
    """A face network: its class, the options of its constructor, and the order of the channels that it takes.

    Images are RGB everywhere; `build_backbone` reverses them for a network whose published weights expect BGR.
    """

    module: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    channels: str = "RGB"


@dataclass(frozen=True)
class Loss:
    """A header: its class, the published mean and standard deviation of its margin, and options of its constructor.

    Where `std` is 0 the margin is the same for every sample, and the constructor takes no `std`.
    """

    module: str
    m: float
    std: float = 0.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_EVOLVE = {"middle_bn": False, "affine": True, "dropout": 0.5}  # face.evoLVe's definition

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
    # Networks of other projects, for their published weights (docs/other_models.md). All take values in [-1, 1].
    "mbf": Network("backbones.mbf:MBF"),
    "mbf_large": Network("backbones.mbf:MBF", {"blocks": (2, 8, 12, 4), "scale": 4}),
    "tface_ir_18": Network("backbones.ir:IR", {"blocks": (2, 2, 2, 2)}),
    "tface_ir_34": Network("backbones.ir:IR", {"blocks": (3, 4, 6, 3)}),
    "tface_ir_50": Network("backbones.ir:IR", {"blocks": (3, 4, 14, 3)}),
    "tface_ir_101": Network("backbones.ir:IR", {"blocks": (3, 13, 30, 3)}),
    "tface_ir_152": Network("backbones.ir:IR", {"blocks": (3, 8, 36, 3), "bottleneck": True}),
    "tface_ir_200": Network("backbones.ir:IR", {"blocks": (3, 24, 36, 3), "bottleneck": True}),
    "tface_ir_se_50": Network("backbones.ir:IR", {"blocks": (3, 4, 14, 3), "use_se": True}),
    "tface_ir_se_101": Network("backbones.ir:IR", {"blocks": (3, 13, 30, 3), "use_se": True}),
    "adaface_ir_18": Network("backbones.ir:IR", {"blocks": (2, 2, 2, 2)}, "BGR"),
    "adaface_ir_34": Network("backbones.ir:IR", {"blocks": (3, 4, 6, 3)}, "BGR"),
    "adaface_ir_50": Network("backbones.ir:IR", {"blocks": (3, 4, 14, 3)}, "BGR"),
    "adaface_ir_101": Network("backbones.ir:IR", {"blocks": (3, 13, 30, 3)}, "BGR"),
    "adaface_ir_200": Network("backbones.ir:IR", {"blocks": (3, 24, 36, 3), "bottleneck": True}, "BGR"),
    "adaface_ir_se_50": Network("backbones.ir:IR", {"blocks": (3, 4, 14, 3), "use_se": True}, "BGR"),
    "curricularface_ir_50": Network("backbones.ir:IR", {"blocks": (3, 4, 14, 3), "middle_bn": False}),
    "curricularface_ir_101": Network("backbones.ir:IR", {"blocks": (3, 13, 30, 3), "middle_bn": False}),
    "curricularface_ir_se_50": Network(
        "backbones.ir:IR", {"blocks": (3, 4, 14, 3), "middle_bn": False, "use_se": True}
    ),
    "evolve_ir_50": Network("backbones.ir:IR", {"blocks": (3, 4, 14, 3), **_EVOLVE}),
    "evolve_ir_101": Network("backbones.ir:IR", {"blocks": (3, 13, 30, 3), **_EVOLVE}),
    "evolve_ir_152": Network("backbones.ir:IR", {"blocks": (3, 8, 36, 3), **_EVOLVE}),
    "evolve_ir_se_50": Network("backbones.ir:IR", {"blocks": (3, 4, 14, 3), "use_se": True, **_EVOLVE}),
    "evolve_ir_se_101": Network("backbones.ir:IR", {"blocks": (3, 13, 30, 3), "use_se": True, **_EVOLVE}),
    "evolve_ir_se_152": Network("backbones.ir:IR", {"blocks": (3, 8, 36, 3), "use_se": True, **_EVOLVE}),
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
"""Losses that `--loss` can name. Margins are those of MST-KD (paper 4.2) and of ElasticFace's configuration."""

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

PRECISIONS = ("fp32", "tf32", "bf16")

CHOICES = {
    "network": NETWORKS,
    "student_network": NETWORKS,
    "ada_student_network": NETWORKS,
    "loss": LOSSES,
    "ada_loss": ADA_LOSSES,
    "ada_source": ("adaptor", "teacher"),
    "device": ("cpu", "cuda"),
    "precision": PRECISIONS,
    "infer_precision": PRECISIONS,
    "weights": ("best", "last"),
    "init_header": ("means",),
    "share_of": ("identities", "images"),
    "onnx_channels": ("RGB", "BGR"),
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
    """Imports the class of an entry. Raises InputError if there is none."""
    try:
        return resolve_name(entry.module)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"config/registry.py names {entry.module}, which cannot be imported: {error}.") from error
