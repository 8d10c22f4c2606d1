"""Embeddings of all images, by a teacher from the images or by an adaptor from the teachers' embeddings."""

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
from utils.data.embeddings import origin
from utils.data.faces import Faces
from utils.distributed.collectives import on_first, require_same, wait_for_all
from utils.environment import numerics
from utils.storage.arrays import Filling, outdated
from utils.storage.locks import locked
from utils.training.engine import infer
from utils.weights import load_weights, need_weights, size_of

BLOCK = 4096  # embeddings that are checked together, at least


@dataclass(frozen=True)
class Output:
    """An array of embeddings to be: where, of what (`utils.data.embeddings.origin`), and the function of a batch."""

    path: Path
    made_from: dict
    function: Callable[..., torch.Tensor]


def embed_all(outputs: list[Output], network: nn.Module, columns: dict[str, Column], cfg: Config) -> None:
    """Writes the functions of all rows of `columns`, each (N, D), that are not there already and made from the same.

    All in one pass, which goes on where an earlier attempt at the same stopped. Of several processes each computes its
    share, and rank 0 writes. Raises InputError where another process writes one of them.
    """
    shape = (len(next(iter(columns.values())).arrays[0]), size_of(network, cfg))
    require_same({str(output.path): output.made_from for output in outputs}, "Give all processes the same data.")
    with contextlib.ExitStack() as locks:
        which = on_first(lambda: _stale(outputs, shape, locks))
        stale = [outputs[k] for k in which]
        if not stale:
            return

        def together(**batch: torch.Tensor) -> torch.Tensor:
            return torch.stack([output.function(**batch) for output in stale], 1)

        with contextlib.ExitStack() as filled:
            block_rows = cfg.infer_batch_size * -(-BLOCK // cfg.infer_batch_size)
            forms = [(output.path, shape, np.float32, output.made_from, block_rows, numerics(cfg)) for output in stale]
            sink = Sink()
            parts = on_first(lambda: sink.open([filled.enter_context(Filling(*form)) for form in forms]))
            infer(together, network, columns, cfg, f"embed {stale[0].path.stem}", parts, sink.receive)
    wait_for_all()
    for output in stale:
        print(f"{output.path}: {shape[0]:,} embeddings.")


def _stale(outputs: list[Output], shape: tuple[int, int], locks: contextlib.ExitStack) -> list[int]:
    """Which of the arrays are to be written; they are locked until `locks` are closed."""
    stale = []
    for k, output in enumerate(outputs):
        with contextlib.ExitStack() as lock:
            lock.enter_context(locked(output.path))
            reason = outdated(output.path, shape, np.float32, output.made_from)
            if reason is None:
                print(f"{output.path} is up to date.")
                continue
            if reason:
                print(reason)
            stale.append(k)
            locks.enter_context(lock.pop_all())
    return stale


class Sink:
    """Arrays in blocks of the same rows that are filled together; on other ranks than 0 there are none."""

    def __init__(self) -> None:
        self.fillings: list[Filling] = []
        self._block_of: dict[int, int] = {}  # by its end

    def open(self, fillings: list[Filling]) -> list[range]:
        """The rows of the blocks that are missing in any of the arrays."""
        self.fillings = fillings
        blocks = sorted({block for filling in fillings for block in filling.missing})
        parts = [fillings[0].rows(block) for block in blocks]
        self._block_of = {part.stop: block for part, block in zip(parts, blocks, strict=True)}
        return parts

    def receive(self, rows: range, result: np.ndarray) -> None:
        """Writes (B, as many as there are arrays, ...); a block is finished by the batch at its end."""
        if not self.fillings:
            return
        for filling, part in zip(self.fillings, result.swapaxes(0, 1), strict=True):
            filling.array[rows.start : rows.stop] = part
            if rows.stop in self._block_of:
                block = self._block_of[rows.stop]
                filling.finish(block, filling.digest(block))


def embed_targets(name: str, adaptor: nn.Module, faces: Faces, cfg: Config) -> None:
    """Writes the multi-teacher embeddings of all images by the trained adaptor `name`, the targets of the students.

    `faces` holds the teachers' embeddings. Loads the weights of the adaptor's run folder into `adaptor`.
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
