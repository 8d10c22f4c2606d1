"""Training data as aligned columns, one row per image, and the one reader that turns them into batches.

Loss functions name the columns that they read by their parameters:

    image      (B, 3, 112, 112) float in [-1, 1], flipped at random while training
    label      (B,) int64
    embedding  (B, T * D) the unit-length embeddings of T teachers, concatenated
    target     (B, D) the unit-length multi-teacher embedding
"""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config.config import Config
from utils.embeddings import check_weights, read_embeddings
from utils.errors import InputError
from utils.split import read_quarter, require_split
from utils.store import ImageStore, Index
from utils.threads import map_ahead

AHEAD = 2  # batches gathered ahead of the consumer by each worker
ORDER, FLIPS, STEP = 1, 2, 3  # what random numbers are drawn for, the first word of their seed

EXTRACT = "extract_all.py"
ADAPT = {"SL": "fc_EArc.py", "DuL": "dual_layer_EAF-Fusion.py", "DLDPO": "dual_layer_EAF-Fusion.py"}

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
    probability one half. `pairs` are the verification sets that choose the best epoch (see eval.verification): they
    are sources of the run. `store` spares reading the index again.

    Labels count the identities of the set in order of group and name. Raises InputError for whatever is not there or
    does not belong to this data folder, before an image is decoded where that can be known.
    """

    def __init__(
        self,
        cfg: Config,
        teacher: str = "",
        inputs: tuple[str, ...] = (),
        target: str = "",
        flip: bool = False,
        pairs: dict | None = None,
        store: ImageStore | None = None,
    ):
        self.cfg, self.flip = cfg, flip
        if teacher and cfg.is_teacher_baseline:
            require_split(cfg)
        if inputs:
            self._require([cfg.teacher_embeddings(name, view) for name in inputs for view in cfg.target_views], EXTRACT)
        if target:
            self._require([cfg.adaptor_embeddings(target, view) for view in cfg.target_views], ADAPT[target])
        self.store = store or ImageStore(cfg, checked=not inputs)  # who reads embeddings reads no image
        index = self.store.index
        chosen = _of_teacher(cfg, teacher, index) if teacher else np.ones(len(index.identities), bool)
        self.rows = np.flatnonzero(chosen[index.identity] & self.store.usable)
        present, labels = np.unique(index.identity[self.rows], return_inverse=True)
        self.identities = tuple(index.identities[i] for i in present)
        label = np.full(len(index.paths), -1, np.int64)
        label[self.rows] = labels
        self.columns = {"image": Column((self.store.images,)), "label": Column((label,))}
        identities = hashlib.sha256("\n".join(self.identities).encode(errors="surrogateescape")).hexdigest()
        self.sources = {"images": self.store.digest, "identities": identities}
        self.sources |= {f"pairs {name}": one.digest for name, one in (pairs or {}).items()}
        self.origins: dict[Path, dict] = {}  # what made each array of embeddings
        if inputs:
            self._add_inputs(inputs)
        if target:
            self._add_target(target)

    @property
    def num_classes(self) -> int:
        return len(self.identities)

    def __len__(self) -> int:
        return len(self.rows)

    def _require(self, paths: list[Path], script: str) -> None:
        missing = [str(path) for path in paths if not path.exists()]
        if missing:
            raise InputError(f"Missing: {', '.join(missing)}. Run first: {self.cfg.command(script)}")

    def _read(self, path: Path, run: Path, script: str) -> np.ndarray:
        """Embeddings of all images by the weights of a run folder."""
        shape = (len(self.store.index.paths), self.cfg.embedding_size)
        array, self.origins[path] = read_embeddings(path, shape, self.store.digest, self.cfg.command(script))
        check_weights(path, self.origins[path].get("weights"), run, self.cfg.weights, self.cfg.command(script))
        return array

    def _add_inputs(self, teachers: tuple[str, ...]) -> None:
        arrays = {False: [], True: []}
        for name in teachers:
            for flipped in self.cfg.target_views:
                path = self.cfg.teacher_embeddings(name, flipped)
                arrays[flipped].append(self._read(path, self.cfg.teacher_dir(name), EXTRACT))
            # The adaptor is trained on the images as they are: the flipped view is no source of it.
            self.sources[f"embedding {name}"] = self.origins[self.cfg.teacher_embeddings(name)]
        self.columns["embedding"] = Column(tuple(arrays[False]), tuple(arrays[True]))

    def _add_target(self, adaptor: str) -> None:
        """The targets by an adaptor; its teachers must still be those that the adaptor was trained on."""
        views = []
        again = f"{self.cfg.command(EXTRACT)} and {self.cfg.command(ADAPT[adaptor])}"
        for flipped in self.cfg.target_views:
            path = self.cfg.adaptor_embeddings(adaptor, flipped)
            views.append(self._read(path, self.cfg.adaptor_dir(adaptor), ADAPT[adaptor]))
            inputs = self.origins[path].get("inputs", {})
            if tuple(inputs) != self.cfg.teachers:
                raise InputError(
                    f"{path} was made from the teachers {', '.join(inputs)}, in this order: set ethnicities so."
                )
            for name, made_from in inputs.items():
                check_weights(path, made_from.get("weights"), self.cfg.teacher_dir(name), self.cfg.weights, again)
            self.sources[f"target{' flipped' if flipped else ''}"] = self.origins[path]
        self.columns["target"] = Column((views[0],), tuple(views[1:]))

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """The batches of one epoch from step `first`: all rows in a random order, without the incomplete last batch.

        Order and flips depend on (seed, epoch, step) only, so that a run can go on in the middle of an epoch.
        """
        seed, size = self.cfg.seed, self.cfg.batch_size
        order = self.rows[np.random.default_rng((ORDER, seed, epoch)).permutation(len(self.rows))]
        for step in range(first, len(self.rows) // size):
            rows = order[step * size : (step + 1) * size]
            flips = np.random.default_rng((FLIPS, seed, epoch, step)).random(size) < 0.5 if self.flip else None
            yield rows, flips


def cut(rows: range, batch_size: int) -> list[range]:
    """Consecutive rows in batches, the last one shorter where it does not divide."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def stream(
    columns: dict[str, Column], batches: Iterable[Batch], device: torch.device, workers: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields each batch as {column: tensor on the device}, gathered ahead of the consumer in so many threads."""

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

    if not workers:
        yield from map(finish, map(gather, batches))
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from map(finish, map_ahead(pool, gather, batches, AHEAD * workers))


def to_network(images: torch.Tensor, flips: np.ndarray | None = None) -> torch.Tensor:
    """RGB uint8 (B, H, W, 3) -> float (B, 3, H, W), (x / 255 - 0.5) / 0.5, mirrored where `flips` says so."""
    images = images.permute(0, 3, 1, 2)  # a view: channels last stays the layout in memory
    if flips is not None:
        mask = torch.from_numpy(flips).to(images.device, non_blocking=True).view(-1, 1, 1, 1)
        images = torch.where(mask, images.flip(-1), images)
    return images.float().div_(127.5).sub_(1)


def _of_teacher(cfg: Config, teacher: str, index: Index) -> np.ndarray:
    """(I,) bool: the identities that a teacher is trained on."""
    chosen = set(read_quarter(cfg, teacher, index) if cfg.is_teacher_baseline else index.identities_of(teacher))
    return np.array([name in chosen for name in index.identities])
