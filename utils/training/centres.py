"""The headers of AdaDistill's students: centres that follow the teacher, or those that it was trained with."""

import numpy as np
import torch
import torch.nn.functional as F

from config.config import Config
from config.registry import ADA_LOSSES, class_of
from utils.data.faces import Faces
from utils.errors import InputError
from utils.losses import build_header
from utils.losses.adadistill import FrozenDistill
from utils.losses.margin import Header
from utils.weights import load_centres, need_weights

LOOKED_AT = 1000  # identities whose targets are compared with their centres


def build_distiller(cfg: Config, faces: Faces) -> tuple[Header, dict[str, str]]:
    """The header that `ada_loss` names for the classes of `faces`, and what it adds to the sources of the run.

    That is the SHA-256 of the header whose centres it has, if they are to stay. Raises InputError where the centres of
    the students' source are not there, or not those of these classes.
    """
    is_frozen = issubclass(class_of(ADA_LOSSES[cfg.ada_loss]), FrozenDistill)
    options = {} if is_frozen else {"weighted": cfg.ada_weighted}
    size = faces.columns["target"].width
    header = build_header(cfg.ada_loss, faces.num_classes, cfg, cfg.ada_method, size, **options)
    if not is_frozen:
        return header, {}
    centres, digest = _centres_of_source(cfg, faces)
    header.set_centres(centres)
    return header, {"centres": digest}


def _centres_of_source(cfg: Config, faces: Faces) -> tuple[torch.Tensor, str]:
    (weights,) = need_weights([cfg.source_dir], cfg.weights)
    centres, identities, digest = load_centres(weights)
    where = f"The header beside {weights}"
    size = faces.columns["target"].width
    if tuple(centres.shape) != (size, faces.num_classes) or len(identities) not in (0, centres.shape[1]):
        raise InputError(
            f"{where} holds {centres.shape[1]:,} classes of {centres.shape[0]} dimensions; data holds "
            f"{faces.num_classes:,} identities, the targets have {size} dimensions: "
            f"{cfg.ada_loss} needs a source that was trained on these identities."
        )
    advice = f"set data to what the source was trained on, or ada_loss to Ada{cfg.ada_loss}."
    if identities and identities != faces.identities:
        k = next(k for k, names in enumerate(zip(identities, faces.identities, strict=True)) if names[0] != names[1])
        raise InputError(f"{where} has {identities[k]} as class {k}, data {faces.identities[k]}: {advice}")
    if not identities and (astray := _astray(centres, faces)):
        raise InputError(
            f"{where} does not say which identities its classes are, and of data's, in order of name, {len(astray):,} "
            f"are closer to another class, first {astray[0]}: {advice}"
        )
    return centres, digest


def _astray(centres: torch.Tensor, faces: Faces) -> list[str]:
    """The identities whose targets are closer to one of three others' centres, if they are more than a tenth.

    Identities and others are a sample, evenly spread; an identity counts by the mean of its targets.
    """
    chosen = np.unique(np.linspace(0, faces.num_classes - 1, LOOKED_AT).astype(int))
    label = faces.columns["label"].arrays[0]
    rows = faces.rows[np.isin(label[faces.rows], chosen)]
    targets, labels = (faces.columns[name].gather(rows, None) for name in ("target", "label"))
    centres = F.normalize(centres.float(), dim=0)
    sums = torch.zeros(faces.num_classes, len(centres)).index_add_(0, labels, targets)[chosen]
    own, *others = (
        (sums * centres[:, (chosen + quarter * faces.num_classes // 4) % faces.num_classes].T).sum(1)
        for quarter in range(4)
    )
    astray = [faces.identities[k] for k in chosen[(own < torch.stack(others).amax(0)).numpy()]]
    return astray if len(astray) > 0.1 * len(chosen) else []
