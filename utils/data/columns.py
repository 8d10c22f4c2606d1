"""Training data as aligned columns, one row per image, and the one reader that turns them into batches.

Loss functions name the columns that they read by their parameters:

    image      (B, 3, 112, 112) float in [-1, 1], flipped at random while training
    label      (B,) int64
    embedding  (B, T * D) the unit-length embeddings of T teachers, concatenated
    target     (B, D) the unit-length embedding that a student learns, by an adaptor or by one teacher
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from utils.memory import free_memory
from utils.threads import map_ahead

PART = 1 << 26  # bytes that pass through memory together on their way to the device
AHEAD = 2  # batches gathered ahead of the consumer by each worker


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
