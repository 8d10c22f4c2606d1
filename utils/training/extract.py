"""Writes the embeddings of all images: a teacher's from the images, an adaptor's from the teachers' embeddings."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from config.config import Config
from utils.data.columns import Column
from utils.data.embeddings import accepted, in_precision, origin, say_if_collapsed
from utils.data.faces import Faces
from utils.distributed.collectives import on_first, require_same, wait_for_all
from utils.distributed.world import is_first
from utils.environment import computed_in, device_of, numerics
from utils.storage.arrays import Filling, outdated, read
from utils.storage.locks import locked
from utils.training.engine import infer
from utils.weights import load_weights, need_weights, size_of

BLOCK = 4096  # the fewest embeddings in a block, which has one SHA-256


@dataclass(frozen=True)
class Output:
    """An array of embeddings to write: its path, its provenance (see utils.data.embeddings) and how to compute it."""

    path: Path
    made_from: dict
    function: Callable[..., torch.Tensor]  # of a batch of columns: returns (B, D)


def embed_all(outputs: list[Output], network: nn.Module, columns: dict[str, Column], cfg: Config) -> None:
    """Writes the arrays (N, D) of `outputs`, of one size D, each from all rows of `columns`, in one pass over the rows.

    Skips arrays that exist, have the same `made_from` and a precision that is `accepted`, and resumes an interrupted
    pass. Adds the precision to `made_from`. Several ranks share the rows, and rank 0 writes. Raises InputError if
    another process is writing one of the arrays.
    """
    shape = (len(next(iter(columns.values())).arrays[0]), size_of(network, cfg))
    require_same({str(output.path): output.made_from for output in outputs}, "Give all processes the same data.")
    with contextlib.ExitStack() as locks:
        which = on_first(lambda: _stale(outputs, shape, cfg, locks))
        stale = [outputs[k] for k in which]
        if not stale:
            return

        def stacked(**batch: torch.Tensor) -> torch.Tensor:
            return torch.stack([output.function(**batch) for output in stale], 1)

        with contextlib.ExitStack() as opened:
            block_rows = cfg.infer_batch_size * -(-BLOCK // cfg.infer_batch_size)
            precision = computed_in(cfg.infer_precision, device_of(cfg))
            forms = [
                (one.path, shape, np.float32, in_precision(one.made_from, precision), block_rows, numerics(cfg))
                for one in stale
            ]
            writer = BlockWriter()
            parts = on_first(lambda: writer.open([opened.enter_context(Filling(*form)) for form in forms]))
            infer(stacked, network, columns, cfg, f"embed {stale[0].path.stem}", parts, writer.receive)
    wait_for_all()
    for output in stale:
        print(f"{output.path}: {shape[0]:,} embeddings.")
        if is_first():
            say_if_collapsed(output.path, read(output.path, shape, np.float32, checked=False))


def _stale(outputs: list[Output], shape: tuple[int, int], cfg: Config, locks: contextlib.ExitStack) -> list[int]:
    """Returns the indices of the arrays that must be written, and locks these until `locks` is closed."""
    precisions = dict.fromkeys((computed_in(cfg.infer_precision, device_of(cfg)), *accepted(cfg.infer_precision)))
    stale = []
    for k, output in enumerate(outputs):
        with contextlib.ExitStack() as lock:
            lock.enter_context(locked(output.path))
            origins = [in_precision(output.made_from, precision) for precision in precisions]
            reasons = [outdated(output.path, shape, np.float32, made_from) for made_from in origins]
            if None in reasons:
                print(f"{output.path} is up to date.")
                continue
            if reasons[0]:
                print(reasons[0])
            stale.append(k)
            locks.enter_context(lock.pop_all())
    return stale


class BlockWriter:
    """Writes several arrays that consist of blocks of the same rows; on ranks other than 0, writes nothing."""

    def __init__(self) -> None:
        self.fillings: list[Filling] = []
        self._block_ending_at: dict[int, int] = {}  # from the row after its last one

    def open(self, fillings: list[Filling]) -> list[range]:
        """Takes the arrays to write, and returns the rows of the blocks that are missing in any of them."""
        self.fillings = fillings
        blocks = sorted({block for filling in fillings for block in filling.missing})
        parts = [fillings[0].rows(block) for block in blocks]
        self._block_ending_at = {part.stop: block for part, block in zip(parts, blocks, strict=True)}
        return parts

    def receive(self, rows: range, result: np.ndarray) -> None:
        """Writes `result` (B, number of arrays, ...); a block is finished by the batch that ends with it."""
        if not self.fillings:
            return
        for filling, part in zip(self.fillings, result.swapaxes(0, 1), strict=True):
            filling.array[rows.start : rows.stop] = part
            if rows.stop in self._block_ending_at:
                block = self._block_ending_at[rows.stop]
                filling.finish(block, filling.digest(block))


def embed_targets(name: str, adaptor: nn.Module, faces: Faces, cfg: Config) -> None:
    """Writes the multi-teacher embeddings of all images, the targets of the students, by the trained adaptor `name`.

    `faces` holds the teachers' embeddings. Loads the weights in the adaptor's run folder into `adaptor`. Raises
    InputError if there are none.
    """
    weights = need_weights([cfg.adaptor_dir(name)], cfg.weights)[0]
    digest = load_weights(adaptor, weights)
    column = faces.columns["embedding"]

    def target(embedding):
        return F.normalize(adaptor(embedding))

    for flipped in cfg.target_views:
        inputs = {teacher: faces.origins[cfg.teacher_embeddings(teacher, flipped)] for teacher in cfg.teachers}
        made_from = origin(faces.store.digest, digest, flipped, inputs)
        output = Output(cfg.adaptor_embeddings(name, flipped), made_from, target)
        embed_all([output], adaptor, {"embedding": Column(column.mirrored if flipped else column.arrays)}, cfg)
