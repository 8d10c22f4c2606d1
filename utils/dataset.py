"""Training data as aligned columns, one row per image, and the one reader that turns them into batches.

Loss functions name the columns that they read by their parameters:

    image      (B, 3, 112, 112) float in [-1, 1], flipped at random while training
    label      (B,) int64
    embedding  (B, T * D) the unit-length embeddings of T teachers, concatenated
    target     (B, D) the unit-length embedding that a student learns, by an adaptor or by one teacher
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from config.config import Config
from config.readers import EXTRACT, script_that_trains
from utils.embeddings import check_weights, read_embeddings
from utils.errors import InputError
from utils.files import sha256
from utils.index import Index, find_images
from utils.memory import free_memory
from utils.split import read_quarter, require_split
from utils.store import ImageStore
from utils.threads import map_ahead
from utils.world import rank, world_size

PART = 1 << 26  # bytes that pass through memory together on their way to the device
AHEAD = 2  # batches gathered ahead of the consumer by each worker
ORDER, FLIPS, STEP = 1, 2, 3  # what random numbers are drawn for, the first word of their seed


Batch = tuple[np.ndarray, np.ndarray | None]
"""Rows (B,) int64 and whether each is seen flipped (B,) bool, or None where none is."""


@dataclass(frozen=True)
class Column:
    """Arrays (N, ...) concatenated along their second dimension.

    The place of a row that is seen flipped is taken by that of `mirrored`, in a column of images (N, H, W, 3) by the
    mirror image.
    """

    arrays: tuple[np.ndarray, ...]
    mirrored: tuple[np.ndarray, ...] = ()

    @property
    def holds_images(self) -> bool:
        return self.arrays[0].ndim == 4

    @property
    def row_bytes(self) -> int:
        return sum(array.strides[0] for array in (*self.arrays, *self.mirrored))

    def gather(self, rows: np.ndarray, flips: np.ndarray | None) -> torch.Tensor:
        taken = _take(self.arrays, rows)
        if flips is not None and flips.any():
            if self.mirrored:
                taken[flips] = _take(self.mirrored, rows[flips])
            elif self.holds_images:
                taken[flips] = _mirror(taken[flips])
        return torch.from_numpy(taken)


def _take(arrays: tuple[np.ndarray, ...], rows: np.ndarray) -> np.ndarray:
    taken = [np.asarray(array).take(rows, axis=0) for array in arrays]  # np.memmap itself is slower
    return taken[0] if len(taken) == 1 else np.concatenate(taken, 1)


def _mirror(images: np.ndarray) -> np.ndarray:
    """Left and right swapped of (B, H, W, 3); all as one tall image, an order faster than NumPy or PyTorch."""
    return cv2.flip(images.reshape(-1, *images.shape[2:]), 1).reshape(images.shape)


class Faces:
    """The training set of one stage.

    `teacher` limits it to that teacher's identities: one group, or one quarter of each group in the baseline setting.
    `inputs` adds the column `embedding` from these teachers, `target` the column of that name from `cfg.source`.
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
        target: bool = False,
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
            self._require([cfg.source_embeddings(view) for view in cfg.target_views], self._source_script)
        if cfg.leave_out and store is None:
            left_out(cfg, find_images(cfg))  # a wrong list is refused before the images are decoded
        self.store = store or ImageStore(cfg, checked=not inputs)  # who reads embeddings reads no image
        index = self.store.index
        chosen = _of_teacher(cfg, teacher, index) if teacher else np.ones(len(index.identities), bool)
        self.rows = np.flatnonzero(chosen[index.identity] & self.store.usable & ~left_out(cfg, index))
        if cfg.leave_out and not len(self.rows):
            raise InputError(f"{cfg.leave_out} leaves out every image of {teacher or cfg.data}: shorten it.")
        present, labels = np.unique(index.identity[self.rows], return_inverse=True)
        self.identities = tuple(index.identities[i] for i in present)
        label = np.full(len(index.paths), -1, np.int64)
        label[self.rows] = labels
        self.columns = {"image": Column((self.store.images,)), "label": Column((label,))}
        identities = hashlib.sha256("\n".join(self.identities).encode(errors="surrogateescape")).hexdigest()
        self.sources = {"images": self.store.digest, "identities": identities}
        if cfg.leave_out:
            self.sources["left out"] = sha256(Path(cfg.leave_out))
        if teacher and cfg.is_teacher_baseline and (group := cfg.group_of(teacher)):
            self.sources["group that decides the best epoch"] = group
        self.sources |= {f"pairs {name}": one.digest for name, one in (pairs or {}).items()}
        self.origins: dict[Path, dict] = {}  # what made each array of embeddings
        if inputs:
            self._add_inputs(inputs)
        if target:
            self._add_target()

    @property
    def num_classes(self) -> int:
        return len(self.identities)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def _source_script(self) -> str:
        """The script that writes the targets."""
        return script_that_trains(self.cfg.source) if self.cfg.ada_source == "adaptor" else EXTRACT

    def _require(self, paths: list[Path], script: str) -> None:
        missing = [str(path) for path in paths if not path.exists()]
        if missing:
            raise InputError(f"Missing: {', '.join(missing)}. Run first: {self.cfg.command(script)}")

    def _read(self, path: Path, flipped: bool, run: Path, script: str) -> np.ndarray:
        """Embeddings of all images, or all flipped ones, by the weights of a run folder."""
        shape = (len(self.store.index.paths), self.cfg.embedding_size)
        array, self.origins[path] = read_embeddings(path, shape, self.store.digest, flipped, self.cfg.command(script))
        check_weights(path, self.origins[path].get("weights"), run, self.cfg.weights, self.cfg.command(script))
        return array

    def _add_inputs(self, teachers: tuple[str, ...]) -> None:
        arrays = {False: [], True: []}
        for name in teachers:
            for flipped in self.cfg.target_views:
                path = self.cfg.teacher_embeddings(name, flipped)
                arrays[flipped].append(self._read(path, flipped, self.cfg.teacher_dir(name), EXTRACT))
            # The adaptor is trained on the images as they are: the flipped view is no source of it.
            self.sources[f"embedding {name}"] = self.origins[self.cfg.teacher_embeddings(name)]
        self.columns["embedding"] = Column(tuple(arrays[False]), tuple(arrays[True]))

    def _add_target(self) -> None:
        """The targets by an adaptor or by one teacher."""
        views = []
        for flipped in self.cfg.target_views:
            path = self.cfg.source_embeddings(flipped)
            views.append(self._read(path, flipped, self.cfg.source_dir, self._source_script))
            if self.cfg.ada_source == "adaptor":
                self._check_teachers_of(path)
            self.sources[f"target{' flipped' if flipped else ''}"] = self.origins[path]
        self.columns["target"] = Column((views[0],), tuple(views[1:]))

    def _check_teachers_of(self, path: Path) -> None:
        """The teachers must still be those that the adaptor was trained on."""
        inputs = self.origins[path].get("inputs", {})
        if tuple(inputs) != self.cfg.teachers:
            raise InputError(
                f"{path} was made from the teachers {', '.join(inputs)}, in this order: set ethnicities so."
            )
        again = f"{self.cfg.command(EXTRACT)} and {self.cfg.command(self._source_script)}"
        for name, made_from in inputs.items():
            check_weights(path, made_from.get("weights"), self.cfg.teacher_dir(name), self.cfg.weights, again)

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """The batches of one epoch from step `first`: all rows in a random order, without the incomplete last batch.

        Order and flips depend on (seed, epoch, step) only, so that a run can go on in the middle of an epoch. Where
        there are several processes, each gets its part of every batch.
        """
        seed, size = self.cfg.seed, self.cfg.total_batch
        order = self.rows[np.random.default_rng((ORDER, seed, epoch)).permutation(len(self.rows))]
        each = size // world_size()
        part = slice(rank() * each, (rank() + 1) * each)
        for step in range(first, len(self.rows) // size):
            rows = order[step * size : (step + 1) * size]
            flips = np.random.default_rng((FLIPS, seed, epoch, step)).random(size) < 0.5 if self.flip else None
            yield rows[part], flips if flips is None else flips[part]


def cut(rows: range, batch_size: int) -> list[range]:
    """Consecutive rows in batches, the last one shorter where it does not divide."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


class Cached:
    """Those rows of a column that are read, in the memory of the device."""

    def __init__(self, column: Column, rows: np.ndarray, device: torch.device):
        self._rows, self._device = rows, device  # sorted
        self._values = _load(column.arrays, rows, device)
        self._mirrored = _load(column.mirrored, rows, device) if column.mirrored else None
        self._holds_images = column.holds_images

    def gather(self, rows: np.ndarray, flips: np.ndarray | None) -> torch.Tensor:
        index = _to(torch.from_numpy(np.searchsorted(self._rows, rows)), self._device)
        taken = self._values.index_select(0, index)
        if flips is None or not (self._holds_images or self._mirrored is not None):
            return taken
        mirrored = taken.flip(2) if self._mirrored is None else self._mirrored.index_select(0, index)
        mask = _to(torch.from_numpy(flips), self._device)
        return torch.where(mask.view(-1, *[1] * (taken.ndim - 1)), mirrored, taken)


def _load(arrays: tuple[np.ndarray, ...], rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """The rows of arrays that are concatenated along their second dimension; a part at a time passes through memory."""
    width = [sum(array.shape[1] for array in arrays), *arrays[0].shape[2:]] if arrays[0].ndim > 1 else []
    kind = torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
    loaded = torch.empty((len(rows), *width), dtype=kind, device=device)
    at_once = max(1, PART // sum(array.strides[0] for array in arrays))
    for part in cut(range(len(rows)), at_once):
        loaded[part.start : part.stop] = torch.from_numpy(_take(arrays, rows[part.start : part.stop]))
    return loaded


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, without making it wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def cache(columns: dict[str, Column], rows: np.ndarray, device: torch.device, gigabytes: float | None) -> dict:
    """The columns, those in the memory of the device that fit into so many gigabytes, the narrowest first.

    None stands for half of what is free on a GPU, and for nothing on a CPU: there the files that are read often stay in
    the page cache by themselves. If more is asked for than is free, what is free is used, and a line says so.
    """
    on_gpu = device.type == "cuda"
    free = _free_on_gpu(device) if on_gpu else free_memory()
    budget = gigabytes * 1e9 if gigabytes is not None else free / 2 if on_gpu else 0
    if budget > 0.9 * free:
        print(f"device_cache_gb = {gigabytes:g} is more than there is: {0.9 * free / 1e9:.1f} GB are used.")
        budget = 0.9 * free
    kept = dict(columns)
    for name, column in sorted(columns.items(), key=lambda item: item[1].row_bytes):
        size = column.row_bytes * len(rows)
        if size <= budget:
            kept[name] = Cached(column, rows, device)
            budget -= size
    return kept


def _free_on_gpu(device: torch.device) -> int:
    """Bytes that are free, those included that PyTorch holds and does not use."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def stream(
    columns: dict[str, Column | Cached], batches: Iterable[Batch], device: torch.device, workers: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields each batch as {column: tensor on the device}, gathered ahead of the consumer in so many threads."""
    cached = {name: column for name, column in columns.items() if isinstance(column, Cached)}

    def gather(batch: Batch):
        tensors = {name: column.gather(*batch) for name, column in columns.items() if name not in cached}
        if device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return tensors, batch

    def finish(gathered) -> dict[str, torch.Tensor]:
        tensors, (rows, flips) = gathered
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        batch |= {name: column.gather(rows, flips) for name, column in cached.items()}
        if "image" in batch:
            batch["image"] = to_network(batch["image"])
        return batch

    deliver = _delivered if device.type == "cuda" else map
    if not workers:
        yield from deliver(finish, map(gather, batches))
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from deliver(finish, map_ahead(pool, gather, batches, AHEAD * workers))


def _delivered(finish: Callable, gathered: Iterable) -> Iterator[dict[str, torch.Tensor]]:
    """`map` on a GPU: a batch is copied to it while it works on the one before."""
    copier, current = torch.cuda.Stream(), torch.cuda.current_stream()
    copier.wait_stream(current)  # columns may still be on their way

    def start(item) -> tuple[dict[str, torch.Tensor], torch.cuda.Event]:
        with torch.cuda.stream(copier):
            return finish(item), copier.record_event()

    before = None
    for item in gathered:
        started = start(item)
        if before:
            yield _arrived(*before, current)
        before = started
    if before:
        yield _arrived(*before, current)


def _arrived(batch: dict[str, torch.Tensor], copied: torch.cuda.Event, stream: torch.cuda.Stream) -> dict:
    stream.wait_event(copied)
    for tensor in batch.values():
        tensor.record_stream(stream)  # its memory is not given away before the stream is done with it
    return batch


def to_network(images: torch.Tensor) -> torch.Tensor:
    """RGB uint8 (B, H, W, 3) -> float (B, 3, H, W), (x / 255 - 0.5) / 0.5."""
    images = images.permute(0, 3, 1, 2)  # a view: channels last stays the layout in memory
    return images.float().mul_(1 / 127.5).sub_(1)  # on a CPU half the time of a single call with mixed types


def left_out(cfg: Config, index: Index) -> np.ndarray:
    """(N,) bool: images that `cfg.leave_out` names, by themselves or by their identity."""
    out = np.zeros(len(index.paths), bool)
    if not cfg.leave_out:
        return out
    try:
        text = Path(cfg.leave_out).read_bytes().decode(errors="surrogateescape")
    except OSError as error:
        raise InputError(f"{cfg.leave_out} cannot be read ({error.strerror}): set leave_out to a list.") from error
    known, named = {*index.identities, *index.paths}, set()
    for line in text.removeprefix("\ufeff").split("\n"):
        named.add(line if line in known else line.strip())  # a name may begin or end in blanks
    named.discard("")
    if unknown := sorted(named - known):
        raise InputError(
            f"{cfg.leave_out} names {unknown[0]!r}, which {cfg.data} does not hold ({len(unknown)} of {len(named)} "
            "lines): each line is <ethnicity>/<identity> or <ethnicity>/<identity>/<image>."
        )
    identities = np.array([name in named for name in index.identities])
    return identities[index.identity] | np.array([path in named for path in index.paths])


def _of_teacher(cfg: Config, teacher: str, index: Index) -> np.ndarray:
    """(I,) bool: the identities that a teacher is trained on."""
    if cfg.setting == "standalone":
        return np.ones(len(index.identities), bool)
    chosen = set(read_quarter(cfg, teacher, index) if cfg.is_teacher_baseline else index.identities_of(teacher))
    return np.array([name in chosen for name in index.identities])
