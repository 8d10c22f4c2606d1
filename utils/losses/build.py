"""Builds headers by name."""

from config.config import Config
from config.registry import ADA_LOSSES, LOSSES, class_of, named
from utils.distributed.world import world_size
from utils.losses.margin import Header
from utils.losses.sharded import sharded


def build_header(name: str, num_classes: int, cfg: Config, kind: str, size: int | None = None, **options) -> Header:
    """Builds the header of one of LOSSES or ADA_LOSSES, with the margin that training `kind` uses (`cfg.margin`).

    `size` is the number of dimensions of the embeddings (None: `embedding_size`). With `header_sharding` and several
    ranks, each rank holds a shard of the classes. Raises InputError for an unknown name.
    """
    loss = named("loss", {**LOSSES, **ADA_LOSSES}, name)
    header = class_of(loss)
    if cfg.header_sharding and world_size() > 1:
        header = sharded(header)
    m, std = cfg.margin(kind, name if name in LOSSES else "")
    options = {**loss.options, **({"std": std} if loss.std else {}), **options}
    return header(size or cfg.embedding_size, num_classes, s=cfg.s, m=m, **options)
