"""The start of a training: weights of the network and centres from a file, frozen layers, a student's projection."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from config.config import Config
from config.readers import reads, script_that_trains
from utils.data.faces import Faces
from utils.distributed import collectives
from utils.errors import InputError
from utils.losses.margin import Header
from utils.storage.files import sha256
from utils.weights import load_weights


def read_by(cfg: Config, kind: str, name: str):
    """Returns a setting if the script that trains `kind` reads it, else None."""
    return getattr(cfg, name) if reads(script_that_trains(kind), name) else None


def build_projection(cfg: Config, faces: Faces) -> nn.Module:
    """Builds the layer that maps a student's embeddings to the space of its targets: (B, embedding_size) -> (B, D).

    It is the identity, unless the student learns from one teacher of another embedding size D: then it is a
    `Projection`, trained with the student. It does not become part of the student.
    """
    size = faces.columns["target"].width
    if size == cfg.embedding_size:
        return nn.Identity()
    print(f"The student's {cfg.embedding_size} dimensions are projected to the {size} of {cfg.source}.")
    return Projection(cfg.embedding_size, size)


class Projection(nn.Module):
    """A linear layer without bias whose outputs are scaled to unit length: (B, in_features) -> (B, out_features)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.fc = nn.Linear(in_features, out_features, bias=False)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.fc(embedding))


def start_sources(cfg: Config, kind: str) -> dict[str, str]:
    """Returns {"init_from": SHA-256 of the file that training `kind` starts from}, {} if its start is random.

    Raises InputError if there is no such file.
    """
    path = read_by(cfg, kind, "init_from")

    def digest() -> str:
        if path.endswith(".onnx"):
            raise InputError(f"{path} cannot be trained: set init_from to the .pth from which it was exported.")
        if not Path(path).is_file():
            raise InputError(f"There is no file {path}: set init_from to a file of weights.")
        return sha256(Path(path))

    return {} if path is None else {"init_from": collectives.on_first(digest)}


def start(backbone: nn.Module, header: nn.Module | None, faces: Faces, cfg: Config, kind: str) -> None:
    """Loads the file `init_from` into `backbone`; with `init_header` "means", also sets the centres of `header`.

    Leaves both unchanged if training `kind` has no `init_from`. Raises InputError if the file does not fit the network.
    """
    path = read_by(cfg, kind, "init_from")
    if path is None:
        return
    load_weights(backbone, Path(path))
    print(f"The network starts from {path}.")
    if read_by(cfg, kind, "init_header") == "means":
        if not isinstance(header, Header):
            raise InputError(f"init_header = 'means' has no centres to set: {kind} trains no header.")
        header.set_centres(class_means(backbone, faces, cfg))


def class_means(backbone: nn.Module, faces: Faces, cfg: Config) -> torch.Tensor:
    """Returns the mean embedding (unit length before the mean) of each identity of `faces`: (D, C) float32."""
    from utils.training.engine import infer  # that module imports this one

    label = faces.columns["label"].arrays[0]
    sums = torch.zeros(faces.num_classes, cfg.embedding_size, dtype=torch.float64)

    def add(rows: range, embeddings: np.ndarray) -> None:
        sums.index_add_(0, torch.from_numpy(label[rows.start : rows.stop]), torch.from_numpy(embeddings).double())

    starts = np.flatnonzero(np.diff(faces.rows, prepend=-2) != 1)
    parts = [range(int(part[0]), int(part[-1]) + 1) for part in np.split(faces.rows, starts[1:])]
    images = {"image": faces.columns["image"]}
    infer(lambda image: F.normalize(backbone(image)), backbone, images, cfg, "class means", parts, add)
    counts = np.bincount(label[faces.rows], minlength=faces.num_classes)
    return (sums / torch.from_numpy(counts)[:, None]).T.float()


def freeze(backbone: nn.Module, which: str | None) -> list[nn.Module]:
    """Excludes layers from training and returns them: they must stay in eval mode.

    `which` is "features": all layers but the last nn.Linear and normalisations of vectors (nn.BatchNorm1d), which make
    the embedding; or "bn": all batch normalisations; or empty: none. Raises InputError if the network has no such
    layers.
    """
    if not which:
        return []
    frozen: list[nn.Module]
    layers = [module for module in backbone.modules() if not [*module.children()]]
    if which == "bn":
        frozen = [layer for layer in layers if isinstance(layer, _BatchNorm)]
    else:
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        embedding = [*linear[-1:], *(layer for layer in layers if isinstance(layer, nn.BatchNorm1d))]
        frozen = [layer for layer in layers if linear and layer not in embedding]
    if not frozen:
        raise InputError(f"freeze = {which!r} finds no such layers in {type(backbone).__name__}: leave freeze empty.")
    for layer in frozen:
        layer.requires_grad_(False)
    return frozen
