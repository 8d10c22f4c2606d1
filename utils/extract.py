"""Embeddings of all images, by a teacher from the images or by an adaptor from the teachers' embeddings."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from backbones import load_weights
from config.config import Config
from utils.arrays import Filling, outdated
from utils.checkpoint import need_weights, numerics
from utils.dataset import Column, Faces
from utils.embeddings import origin
from utils.engine import infer
from utils.files import locked

BLOCK = 4096  # embeddings that are checked together, at least


def embed_all(
    function: Callable[..., torch.Tensor],
    network: nn.Module,
    columns: dict[str, Column],
    path: Path,
    made_from: dict,
    cfg: Config,
) -> None:
    """Writes `function` of all rows, (N, D), to `path`, unless it is there already and was made from the same.

    Goes on where an earlier attempt at the same stopped. Raises InputError where another process writes it.
    """
    shape = (len(columns["image"].arrays[0]), cfg.embedding_size)
    with locked(path):
        reason = outdated(path, shape, np.float32, made_from)
        if reason is None:
            print(f"{path} is up to date.")
            return
        if reason:
            print(reason)
        block_rows = cfg.infer_batch_size * -(-BLOCK // cfg.infer_batch_size)
        with Filling(path, shape, np.float32, made_from, block_rows, numerics(cfg)) as filling:
            infer(function, network, columns, cfg, f"embed {path.stem}", filling)
    print(f"{path}: {shape[0]:,} embeddings.")


def embed_targets(name: str, adaptor: nn.Module, faces: Faces, cfg: Config) -> None:
    """Writes the multi-teacher embeddings of all images by the trained adaptor `name`, the targets of the students.

    `faces` holds the teachers' embeddings. Loads the weights of the adaptor's run folder into `adaptor`.
    """
    weights = need_weights([cfg.adaptor_dir(name)], cfg.weights)[0]
    digest = load_weights(adaptor, weights)
    column = faces.columns["embedding"]
    for flipped in cfg.target_views:
        inputs = {teacher: faces.origins[cfg.teacher_embeddings(teacher, flipped)] for teacher in cfg.teachers}
        columns = {**faces.columns, "embedding": Column(column.mirrored if flipped else column.arrays)}

        def target(embedding):
            return F.normalize(adaptor(embedding))

        made_from = origin(faces.store.digest, digest, flipped, inputs)
        embed_all(target, adaptor, columns, cfg.adaptor_embeddings(name, flipped), made_from, cfg)
