"""Training data as aligned columns, one row per image, and the reader that turns them into batches on the device.

The parameter names of a loss function are the columns that it reads:

    image      (B, 3, 112, 112) float in [-1, 1], flipped at random in training
    label      (B,) int64
    embedding  (B, D1 + D2 + ...) float32, the unit-length embeddings of the teachers, concatenated
    target     (B, D) float32, the unit-length embedding that a student learns, from an adaptor or one teacher
"""

import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch

from utils.memory import free_memory
from utils.threads import map_ahead

PART = 1 << 26  # bytes that are copied to the device at a time
BATCHES_AHEAD = 2  # batches that each worker gathers ahead of the consumer

Batch = tuple[np.ndarray, np.ndarray | None]
"""Rows (B,) int64, and flips (B,) bool: True where the flipped view is used; None if no row is flipped."""


class Joined:
    """Arrays (N1, ...), (N2, ...), ... one after another as one array, of which rows are read without a copy of all."""

    def __init__(self, arrays: tuple[np.ndarray, ...]):
        self._arrays = arrays
        self._starts = np.cumsum([0, *map(len, arrays)])
        self.shape = (int(self._starts[-1]), *arrays[0].shape[1:])
        self.dtype, self.ndim, self.strides = arrays[0].dtype, arrays[0].ndim, arrays[0].strides

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.take(np.arange(len(self))[rows])

    def take(self, rows: np.ndarray, axis: int = 0) -> np.ndarray:
        """Returns the rows (B, ...), in the order of `rows` (B,)."""
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for array, first in zip(self._arrays, self._starts, strict=False):
            own = (rows >= first) & (rows < first + len(array))
            values[own] = np.asarray(array).take(rows[own] - first, axis)
        return values


@dataclass(frozen=True)
class Column:
    """A column of training data: arrays (N, ...) concatenated along their second dimension.

    A flipped row is read from the arrays `mirrored` if they are given. Otherwise images (N, H, W, 3) are mirrored, and
    rows of other arrays do not change.
    """

    arrays: tuple[np.ndarray | Joined, ...]
    mirrored: tuple[np.ndarray, ...] = ()

    @property
    def holds_images(self) -> bool:
        """True if the rows are images (H, W, 3)."""
        return self.arrays[0].ndim == 4

    @property
    def width(self) -> int:
        """Number of dimensions of a row of arrays (N, ...) that are concatenated."""
        return sum(array.shape[1] for array in self.arrays)

    @property
    def row_bytes(self) -> int:
        """Bytes per row, both views included."""
        return sum(array.strides[0] for array in (*self.arrays, *self.mirrored))

    def gather(self, rows: np.ndarray, flips: np.ndarray | None) -> torch.Tensor:
        """Reads rows (B,) into a tensor (B, ...) on the CPU; `flips` (B,) bool selects the flipped view."""
        values = _gather_rows(self.arrays, rows)
        if flips is not None and flips.any():
            if self.mirrored:
                values[flips] = _gather_rows(self.mirrored, rows[flips])
            elif self.holds_images:
                values[flips] = _mirror(values[flips])
        return torch.from_numpy(values)


def _gather_rows(arrays: tuple[np.ndarray | Joined, ...], rows: np.ndarray) -> np.ndarray:
    """Copies rows of arrays, concatenated along the second dimension."""
    # Indexing an np.memmap is slower.
    values = [(one if isinstance(one, Joined) else np.asarray(one)).take(rows, axis=0) for one in arrays]
    return values[0] if len(values) == 1 else np.concatenate(values, 1)


def _mirror(images: np.ndarray) -> np.ndarray:
    """Swaps left and right of images (B, H, W, 3)."""
    # One OpenCV call on a tall image is an order of magnitude faster than NumPy or PyTorch.
    return cv2.flip(images.reshape(-1, *images.shape[2:]), 1).reshape(images.shape)


def cut(rows: range, batch_size: int) -> list[range]:
    """Splits consecutive rows into batches; the last one may be shorter."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


class Cached:
    """A copy of the given rows (sorted) of a column in the memory of the device."""

    def __init__(self, column: Column, rows: np.ndarray, device: torch.device):
        self._rows, self._device = rows, device
        self._values = _load_rows(column.arrays, rows, device)
        self._mirrored = _load_rows(column.mirrored, rows, device) if column.mirrored else None
        self._holds_images = column.holds_images

    def gather(self, rows: np.ndarray, flips: np.ndarray | None) -> torch.Tensor:
        """Reads rows (B,) into a tensor (B, ...) on the device; `flips` (B,) bool selects the flipped view."""
        index = _to_device(torch.from_numpy(np.searchsorted(self._rows, rows)), self._device)
        values = self._values.index_select(0, index)
        if flips is None or not (self._holds_images or self._mirrored is not None):
            return values
        mirrored = values.flip(2) if self._mirrored is None else self._mirrored.index_select(0, index)
        mask = _to_device(torch.from_numpy(flips), self._device)
        return torch.where(mask.view(-1, *[1] * (values.ndim - 1)), mirrored, values)


def _load_rows(arrays: tuple[np.ndarray | Joined, ...], rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies rows of arrays, concatenated along the second dimension, to the device, PART bytes at a time."""
    width = [sum(array.shape[1] for array in arrays), *arrays[0].shape[2:]] if arrays[0].ndim > 1 else []
    dtype = torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
    loaded = torch.empty((len(rows), *width), dtype=dtype, device=device)
    rows_per_part = max(1, PART // sum(array.strides[0] for array in arrays))
    for part in cut(range(len(rows)), rows_per_part):
        loaded[part.start : part.stop] = torch.from_numpy(_gather_rows(arrays, rows[part.start : part.stop]))
    return loaded


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor to the device; asynchronously to a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def cache(columns: dict[str, Column], rows: np.ndarray, device: torch.device, gigabytes: float | None) -> dict:
    """Copies the given rows of columns to the device while they fit into `gigabytes` (1e9 bytes), narrowest first.

    Returns all columns, copied or not. With None, the limit is half of the free memory on a GPU and 0 on a CPU, where
    the page cache already holds files that are read often. A limit above 90% of the free memory is lowered to that, and
    a line is printed.
    """
    on_gpu = device.type == "cuda"
    free = _free_on_gpu(device) if on_gpu else free_memory()
    budget = gigabytes * 1e9 if gigabytes is not None else free / 2 if on_gpu else 0
    if budget > 0.9 * free:
        print(f"device_cache_gb = {gigabytes:g} is more than is free: {0.9 * free / 1e9:.1f} GB are used.")
        budget = 0.9 * free
    result: dict[str, Column | Cached] = dict(columns)
    for name, column in sorted(columns.items(), key=lambda item: item[1].row_bytes):
        size = column.row_bytes * len(rows)
        if size <= budget:
            result[name] = Cached(column, rows, device)
            budget -= size
    return result


def _free_on_gpu(device: torch.device) -> int:
    """Returns the free GPU memory in bytes, without what PyTorch's allocator has reserved: the steps use it again."""
    return torch.cuda.mem_get_info(device)[0]


def stream(
    columns: Mapping[str, Column | Cached], batches: Iterable[Batch], device: torch.device, workers: int = 1
) -> Generator[dict[str, torch.Tensor], None, None]:
    """Yields each batch as {column: tensor on the device}; `workers` threads gather ahead, 0 gathers in this thread.

    Images are converted by `to_network`.
    """
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

    finish_all = _copy_ahead if device.type == "cuda" else map
    if not workers:
        yield from finish_all(finish, map(gather, batches))
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from finish_all(finish, map_ahead(pool, gather, batches, BATCHES_AHEAD * workers))


def _copy_ahead(finish: Callable, gathered: Iterable) -> Iterator[dict[str, torch.Tensor]]:
    """Applies `finish` to each item on a copy stream: a batch is copied while the GPU computes on the previous one."""
    copy_stream, current_stream = _copy_stream(torch.cuda.current_device()), torch.cuda.current_stream()
    copy_stream.wait_stream(current_stream)  # cached columns may still be in transfer

    def start(item) -> tuple[dict[str, torch.Tensor], torch.cuda.Event]:
        with torch.cuda.stream(copy_stream):
            return finish(item), copy_stream.record_event()

    previous = None
    for item in gathered:
        started = start(item)
        if previous:
            yield _wait_for_copy(*previous, current_stream)
        previous = started
    if previous:
        yield _wait_for_copy(*previous, current_stream)


@functools.cache
def _copy_stream(device: int) -> torch.cuda.Stream:
    """Returns the stream on which batches are copied to a device.

    It is kept: PyTorch has 32 streams, and after as many new ones this would be the stream of NCCL or of the capture.
    """
    return torch.cuda.Stream(device)


def _wait_for_copy(batch: dict[str, torch.Tensor], copied: torch.cuda.Event, stream: torch.cuda.Stream) -> dict:
    """Makes `stream` wait until a batch has been copied."""
    stream.wait_event(copied)
    for tensor in batch.values():
        tensor.record_stream(stream)  # the allocator must not reuse its memory before `stream` has used it
    return batch


def to_network(images: torch.Tensor) -> torch.Tensor:
    """Converts RGB uint8 images (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1]: (x / 255 - 0.5) / 0.5."""
    images = images.permute(0, 3, 1, 2)  # a view: the memory layout stays channels-last
    return images.float().mul_(1 / 127.5).sub_(1)  # on a CPU twice as fast as a single call with mixed dtypes
