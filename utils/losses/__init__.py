"""Headers turn embeddings and labels into the training loss; they are built by name or by class."""

from utils.losses.adadistill import AdaDistill, ArcDistill, CosDistill
from utils.losses.build import build_header
from utils.losses.margin import ArcFace, CosFace, CurricularFace, ElasticArcFace, ElasticCosFace

__all__ = [
    "AdaDistill",
    "ArcDistill",
    "ArcFace",
    "CosDistill",
    "CosFace",
    "CurricularFace",
    "ElasticArcFace",
    "ElasticCosFace",
    "build_header",
]
