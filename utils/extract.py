"""Embeddings of all images, by a teacher from the images or by an adaptor from the teachers' embeddings."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from backbones import load_weights
from config.config import Config
from utils.checkpoint import need_weights
from utils.dataset import Column, Faces
from utils.embeddings import is_current, new_embeddings, origin
from utils.engine import infer


def embed_all(
    function: Callable[..., torch.Tensor],
    network: nn.Module,
    columns: dict[str, Column],
    path: Path,
    made_from: dict,
    cfg: Config,
) -> None:
    """Writes `function` of all rows, (N, D), to `path`, unless it is there already and was made from the same."""
    shape = (len(columns["image"].arrays[0]), cfg.embedding_size)
    if is_current(path, shape, made_from):
        print(f"{path} is up to date.")
        return
    with new_embeddings(path, shape, made_from) as out:
        infer(function, network, columns, cfg, f"embed {path.stem}", out)
    print(f"{path}: {shape[0]:,} embeddings.")


def embed_targets(name: str, adaptor: nn.Module, faces: Faces, cfg: Config) -> None:
    """Writes the multi-teacher embeddings of all images by the trained adaptor `name`, the targets of the students.

    `faces` holds the teachers' embeddings. Loads the weights of the adaptor's run folder into `adaptor`.
    """
    weights = need_weights([cfg.adaptor_dir(name)], cfg.weights)[0]
    load_weights(adaptor, weights)
    column = faces.columns["embedding"]
    for flipped in cfg.target_views:
        inputs = {teacher: faces.origins[cfg.teacher_embeddings(teacher, flipped)] for teacher in cfg.teachers}
        columns = {**faces.columns, "embedding": Column(column.mirrored if flipped else column.arrays)}

        def target(embedding):
            return F.normalize(adaptor(embedding))

        made_from = origin(faces.store.digest, weights, flipped, inputs)
        embed_all(target, adaptor, columns, cfg.adaptor_embeddings(name, flipped), made_from, cfg)
