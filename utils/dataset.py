"""Training data as aligned columns, one row per image, and the one reader that turns them into batches.

Loss functions name the columns that they read by their parameters:

    image      (B, 3, 112, 112) float in [-1, 1], flipped at random while training
    label      (B,) int64
    embedding  (B, T * D) the unit-length embeddings of T teachers, concatenated
    target     (B, D) the unit-length multi-teacher embedding
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config.config import Config
from utils.embeddings import read_embeddings
from utils.errors import InputError
from utils.split import read_quarter
from utils.store import ImageStore, Index

AHEAD = 2  # batches gathered ahead of the consumer

Batch = tuple[np.ndarray, np.ndarray | None]
"""Rows (B,) int64 and whether each is seen flipped (B,) bool, or None where none is."""


@dataclass(frozen=True)
class Column:
    """Arrays (N, ...) concatenated along their second dimension; `mirrored` holds those of the flipped images."""

    arrays: tuple[np.ndarray, ...]
    mirrored: tuple[np.ndarray, ...] = ()

    def gather(self, rows: np.ndarray, flips: np.ndarray | None) -> torch.Tensor:
        taken = _take(self.arrays, rows)
        if self.mirrored and flips is not None:
            taken[flips] = _take(self.mirrored, rows[flips])
        return torch.from_numpy(taken)


def _take(arrays: tuple[np.ndarray, ...], rows: np.ndarray) -> np.ndarray:
    if len(arrays) == 1:
        return np.take(arrays[0], rows, axis=0)
    return np.concatenate([np.take(array, rows, axis=0) for array in arrays], 1)


class Faces:
    """The training set of one stage.

    `teacher` limits it to that teacher's identities: one group, or one quarter of each group in the baseline setting.
    `inputs` adds the column `embedding` from these teachers, `target` the column of that name from one adaptor.
    With `cfg.flip_targets` these columns hold both views of every image. `flip` shows every image flipped with
    probability one half.

    Labels count the identities of the set in order of group and name. Raises InputError for whatever is not there or
    does not belong to this data folder.
    """

    def __init__(
        self, cfg: Config, teacher: str = "", inputs: tuple[str, ...] = (), target: str = "", flip: bool = False
    ):
        store = ImageStore(cfg)
        index = store.index
        chosen = _of_teacher(cfg, teacher, index) if teacher else np.ones(len(index.identities), bool)
        self.rows = np.flatnonzero(chosen[index.identity] & store.usable)
        present, labels = np.unique(index.identity[self.rows], return_inverse=True)
        self.identities = tuple(index.identities[i] for i in present)
        label = np.full(len(index.paths), -1, np.int64)
        label[self.rows] = labels
        self.flip = flip
        self.columns = {"image": Column((store.images,)), "label": Column((label,))}
        self.sources = {"images": store.id, "identities": _digest(self.identities)}
        self.origins: dict[Path, dict] = {}  # what made each array of embeddings
        self.store = store

        if inputs:
            runs = [cfg.teacher_dir(name) for name in inputs]
            paths = {
                flipped: [cfg.teacher_embeddings(name, flipped) for name in inputs] for flipped in cfg.target_views
            }
            self._add("embedding", paths, runs, "extract_all.py", cfg)
        if target:
            script = "fc_EArc.py" if target == "SL" else "dual_layer_EAF-Fusion.py"
            paths = {flipped: [cfg.adaptor_embeddings(target, flipped)] for flipped in cfg.target_views}
            self._add("target", paths, [cfg.adaptor_dir(target)], script, cfg)

    @property
    def num_classes(self) -> int:
        return len(self.identities)

    def __len__(self) -> int:
        return len(self.rows)

    def _add(self, name: str, paths: dict[bool, list[Path]], runs: list[Path], script: str, cfg: Config) -> None:
        """Adds a column of embeddings that the weights in `runs` made; the paths are those of both views."""
        missing = [path for view in paths.values() for path in view if not path.exists()]
        if missing:
            hint = " --flip_targets" if cfg.flip_targets else ""
            raise InputError(f"Missing: {', '.join(map(str, missing))}. Run python {script}{hint} first.")
        shape = (len(self.store.index.paths), cfg.embedding_size)
        arrays = {False: [], True: []}
        for flipped, view in paths.items():
            for path, run in zip(view, runs, strict=True):
                array, made_from = read_embeddings(path, shape, self.store.id, run, cfg.weights, script)
                arrays[flipped].append(array)
                self.origins[path] = made_from
                if not flipped:
                    self.sources[f"{name} {run.name}"] = _digest((json.dumps(made_from, sort_keys=True),))
        self.columns[name] = Column(tuple(arrays[False]), tuple(arrays[True]))

    def batches(self, cfg: Config, epoch: int, first: int) -> Iterator[Batch]:
        """The batches of one epoch from step `first`: all rows in a random order, without the incomplete last batch.

        Order and flips depend on (seed, epoch, step) only, so that a run can go on in the middle of an epoch.
        """
        order = self.rows[np.random.default_rng((cfg.seed, epoch, 0)).permutation(len(self.rows))]
        for step in range(first, len(self.rows) // cfg.batch_size):
            rows = order[step * cfg.batch_size : (step + 1) * cfg.batch_size]
            flips = np.random.default_rng((cfg.seed, epoch, 1, step)).random(len(rows)) < 0.5 if self.flip else None
            yield rows, flips


def in_order(count: int, batch_size: int) -> Iterator[Batch]:
    """All rows once, in their order, not flipped."""
    for start in range(0, count, batch_size):
        yield np.arange(start, min(start + batch_size, count)), None


def stream(columns: dict[str, Column], batches: Iterable[Batch], device: torch.device) -> Iterator[dict]:
    """Gathers the batches ahead of the consumer in one thread and yields each as {column: tensor on the device}."""

    def gather(batch: Batch):
        tensors = {name: column.gather(*batch) for name, column in columns.items()}
        if device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return tensors, batch[1]

    def finish(gathered) -> dict[str, torch.Tensor]:
        tensors, flips = gathered
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        if "image" in batch:
            batch["image"] = to_network(batch["image"], flips)
        return batch

    with ThreadPoolExecutor(1) as pool:
        pending: deque = deque()
        for batch in batches:
            pending.append(pool.submit(gather, batch))
            if len(pending) > AHEAD:
                yield finish(pending.popleft().result())
        while pending:
            yield finish(pending.popleft().result())


def to_network(images: torch.Tensor, flips: np.ndarray | None = None) -> torch.Tensor:
    """RGB uint8 (B, H, W, 3) -> float (B, 3, H, W), (x / 255 - 0.5) / 0.5, mirrored where `flips` says so."""
    images = images.permute(0, 3, 1, 2)  # a view: channels last stays the layout in memory
    if flips is not None:
        mask = torch.from_numpy(flips).to(images.device, non_blocking=True).view(-1, 1, 1, 1)
        images = torch.where(mask, images.flip(-1), images)
    return images.float().div_(127.5).sub_(1)


def _of_teacher(cfg: Config, teacher: str, index: Index) -> np.ndarray:
    """(I,) bool: the identities that a teacher is trained on."""
    if not cfg.is_teacher_baseline:
        return np.array([name.split("/")[0] == teacher for name in index.identities])
    chosen = set(read_quarter(cfg, teacher, index))
    return np.array([name in chosen for name in index.identities])


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
