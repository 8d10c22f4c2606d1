"""The headers of AdaDistill's students: centres that follow the teacher, or those that it was trained with."""

import numpy as np
import torch
import torch.nn.functional as F

from config.config import Config
from utils.checkpoint import load_centres, need_weights
from utils.dataset import Faces
from utils.errors import InputError
from utils.losses import AdaDistill, ArcDistill, CosDistill

LOOKED_AT = 10_000  # targets that are compared with their centres


def build_distiller(cfg: Config, faces: Faces) -> AdaDistill:
    """The header that `ada_loss` names for the classes of `faces`; frozen centres become a source of the run.

    Raises InputError where the centres of the students' source are not there, or not those of these classes.
    """
    shape = (cfg.embedding_size, faces.num_classes)
    frozen = {"ArcDistill": ArcDistill, "CosDistill": CosDistill}.get(cfg.ada_loss)
    if frozen is None:
        margin = "arc" if cfg.ada_loss == "AdaArcDistill" else "cos"
        return AdaDistill(*shape, cfg.s, cfg.ada_margin, margin, cfg.ada_weighted)
    header = frozen(*shape, cfg.s, cfg.ada_margin)
    header.kernel.copy_(_centres_of_source(cfg, faces))
    return header


def _centres_of_source(cfg: Config, faces: Faces) -> torch.Tensor:
    (weights,) = need_weights([cfg.source_dir], cfg.weights)
    centres, identities, faces.sources["centres"] = load_centres(weights)
    where = f"The header beside {weights}"
    if tuple(centres.shape) != (cfg.embedding_size, faces.num_classes) or len(identities) not in (0, centres.shape[1]):
        raise InputError(
            f"{where} holds {centres.shape[1]:,} classes of {centres.shape[0]} dimensions; data holds "
            f"{faces.num_classes:,} identities, embedding_size is {cfg.embedding_size}: "
            f"{cfg.ada_loss} needs a source that was trained on these identities."
        )
    advice = f"set data to what the source was trained on, or ada_loss to Ada{cfg.ada_loss}."
    if identities and identities != faces.identities:
        k = next(k for k, names in enumerate(zip(identities, faces.identities, strict=True)) if names[0] != names[1])
        raise InputError(f"{where} has {identities[k]} as class {k}, data {faces.identities[k]}: {advice}")
    if not identities and not _belong(centres, faces):
        raise InputError(
            f"{where} does not say which identities its classes are, and its centres are not those of data's, which "
            f"are counted in order of name: {advice}"
        )
    return centres


def _belong(centres: torch.Tensor, faces: Faces) -> bool:
    """Whether targets are closer to the centres of their classes than to those of others, beyond chance."""
    rows = faces.rows[np.unique(np.linspace(0, len(faces) - 1, LOOKED_AT).astype(int))]
    targets, labels = (faces.columns[name].gather(rows, None) for name in ("target", "label"))
    centres = F.normalize(centres.float(), dim=0)
    other = (labels + faces.num_classes // 2) % faces.num_classes
    closer = (targets * (centres[:, labels] - centres[:, other]).T).sum(1)
    return bool(closer.mean() > 4 * closer.std() / len(rows) ** 0.5)
