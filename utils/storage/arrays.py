"""Arrays (N, ...) on disk that are filled block by block, resumed after an interruption, and verified when read.

The sidecar `<name>.json` beside `<name>.npy` holds the array's provenance (`made_from`) and the SHA-256 of every block
of rows. While the array is being filled, the two files are called `<name>.npy.partial` and `<name>.json.partial`. After
a kill, only blocks whose SHA-256 still matches are kept, so it does not matter which pages had reached the disk.
"""

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from utils.errors import Damaged, InputError
from utils.storage.files import not_written
from utils.storage.locks import locked
from utils.storage.seals import read_sealed_json, write_sealed_json
from utils.threads import map_ahead

NOTED_EVERY = 5.0  # seconds between writes of the sidecar: a kill loses the blocks of at most this time


class Filling:
    """Context manager that fills an array and renames it to `path` if the context ends without an exception.

    The caller writes each block of `block_rows` rows (the last block may be shorter) and then calls `finish`. `missing`
    lists the blocks to fill: an earlier attempt with the same `made_from` is resumed, and corrupted blocks are filled
    again. `conditions` (versions, device) can change the last bits of the values. If they differ from the earlier
    attempt's, a line is printed and the sidecar keeps both.

    Only one process may fill an array at a time: hold `utils.storage.locks.locked`. Raises InputError if the disk is
    full.
    """

    array: np.memmap  # (N, ...)
    missing: list[int]  # indices of the blocks to fill

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: type,
        made_from: dict,
        block_rows: int,
        conditions: dict[str, str] | None = None,
    ):
        self.path, self._partial, self._notes = path, _partial(path), _partial(sidecar(path))
        self._shape, self._dtype = shape, np.dtype(dtype)
        self._about: dict[str, Any] = {"made from": made_from, "shape": [*shape]}
        self._about |= {"dtype": self._dtype.name, "block rows": block_rows}
        self._conditions = conditions or {}
        self.count = -(-shape[0] // block_rows)

    def __enter__(self) -> "Filling":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            earlier = self._earlier_notes()
            if earlier and not self._partial.exists() and self.path.exists():
                os.replace(self.path, self._partial)  # corrupted, or killed before the sidecar was renamed
            try:
                self.array = _memory_map(self._partial, "r+", self._shape, self._dtype)
                _take_room(self._partial)
            except Damaged:
                earlier, self.array = {}, self._new_array()
        except OSError as error:
            raise not_written(self.path, error) from error
        notes = {block: note for block, note in enumerate(earlier.get("blocks", [])) if note}
        valid = _valid_blocks(self.path, self.array, self._about["block rows"], notes)
        self._blocks = {block: note for block, note in notes.items() if block in valid}
        self.missing = [block for block in range(self.count) if block not in valid]
        earlier_conditions = earlier["conditions"] if valid else []
        if earlier_conditions and earlier_conditions[-1] != self._conditions:
            before = earlier_conditions[-1]
            print(f"{self.path} is resumed under {self._conditions}, before {before}: last bits may differ.")
        self._all_conditions = [*(one for one in earlier_conditions if one != self._conditions), self._conditions]
        self._noted_at = time.monotonic()
        return self

    def rows(self, block: int) -> range:
        """Returns the range of rows of a block."""
        return _rows(block, self._about["block rows"], self._shape[0])

    def write(self, block: int, values: np.ndarray) -> str:
        """Writes the rows of a block, in the array's dtype, and returns their SHA-256. Thread-safe for distinct blocks.

        Raises NotWritten if the disk is full, on systems where the space could not be reserved beforehand.
        """
        # pwrite where it exists: faulting in the pages of a memory map one by one can take as long as decoding images.
        rows = self.rows(block)
        if hasattr(os, "pwrite"):
            left, at = np.ascontiguousarray(values).data.cast("B"), self.array.offset
            at += rows.start * (left.nbytes // len(rows))
            try:
                with open(self._partial, "rb+", buffering=0) as file:
                    while left:
                        written = os.pwrite(file.fileno(), left, at)
                        left, at = left[written:], at + written
            except OSError as error:
                raise not_written(self.path, error) from error
        else:
            self.array[rows.start : rows.stop] = values
        return _digest(self.array, rows, values)

    def digest(self, block: int) -> str:
        """Returns the SHA-256 of a block of `array` as it is now. Thread-safe."""
        return _digest(self.array, self.rows(block))

    def finish(self, block: int, digest: str, **more) -> None:
        """Records a written block as finished: its SHA-256, and any further values to keep in the sidecar."""
        self._blocks[block] = {"sha256": digest, **more}
        if time.monotonic() - self._noted_at > NOTED_EVERY:
            self._write_notes(self._notes)

    def __exit__(self, kind, *_) -> None:
        if kind is not None:
            with contextlib.suppress(InputError):  # the exception that ended the context matters more
                self._write_notes(self._notes)
            return
        self._write_notes(self._notes)
        try:
            self.array.flush()
            with open(self._partial, "rb+") as file:
                os.fsync(file.fileno())
            sidecar(self.path).unlink(missing_ok=True)  # it describes the old array
            os.replace(self._partial, self.path)
            os.replace(self._notes, sidecar(self.path))  # after a kill before this line, `__enter__` resumes
        except OSError as error:
            raise not_written(self.path, error) from error

    def discard(self) -> None:
        """Deletes the partial files, after the context has ended with an exception."""
        self._partial.unlink(missing_ok=True)
        self._notes.unlink(missing_ok=True)

    def _earlier_notes(self) -> dict:
        """Returns the sidecar of an earlier attempt, partial or finished, if it describes this same array; else {}."""
        for path in (self._notes, sidecar(self.path)):
            with contextlib.suppress(InputError):
                found = read_sealed_json(path)
                if all(found.get(name) == value for name, value in self._about.items()):
                    return found
        return {}

    def _new_array(self) -> np.memmap:
        self._partial.unlink(missing_ok=True)  # a new inode: another process may have the old file mapped
        try:
            array = np.lib.format.open_memmap(self._partial, "w+", self._dtype, self._shape)
            _take_room(self._partial)
        except OSError:
            self._partial.unlink(missing_ok=True)
            raise
        return array

    def _write_notes(self, path: Path) -> None:
        blocks = [self._blocks.get(block) for block in range(self.count)]
        write_sealed_json(path, {**self._about, "conditions": self._all_conditions, "blocks": blocks})
        self._noted_at = time.monotonic()


def write(path: Path, values: np.ndarray, made_from: dict, block_rows: int = 1 << 20) -> None:
    """Writes an array (N, ...) from memory. Waits if another process is writing it."""
    with locked(path, wait=True), Filling(path, values.shape, values.dtype, made_from, block_rows) as filling:
        filling.array[:] = values
        for block in range(filling.count):
            filling.finish(block, filling.digest(block))


def about(path: Path) -> dict | None:
    """Returns the sidecar of an array without reading any row: "made from", "shape", "blocks" and more.

    Returns None if the array or its sidecar does not exist. Raises Damaged if the sidecar is corrupted.
    """
    return read_sealed_json(sidecar(path)) if path.exists() and sidecar(path).exists() else None


def read(path: Path, shape: tuple[int, ...], dtype: type, checked: bool = True) -> np.ndarray:
    """Memory-maps an array read-only.

    Raises InputError if there is no sidecar. Raises Damaged if there is no array, its shape or dtype differs or, with
    `checked`, the SHA-256 of a block does not match.
    """
    notes = read_sealed_json(sidecar(path))
    array = _memory_map(path, "r", shape, np.dtype(dtype))
    if checked:
        size, blocks = notes["block rows"], dict(enumerate(notes["blocks"]))
        if corrupted := sorted(blocks.keys() - _valid_blocks(path, array, size, blocks)):
            raise Damaged(f"{path} is damaged (its SHA-256 does not match from row {corrupted[0] * size} on)")
    return array


def outdated(path: Path, shape: tuple[int, ...], dtype: type, made_from: dict, checked: bool = True) -> str | None:
    """Returns the reason why an array must be made: a sentence, or an empty string if there is no array yet.

    Returns None if the array exists with the same `made_from` and passes `read`.
    """
    try:
        found = about(path)
        if found is None:
            return ""
        if found["made from"] != made_from:
            return f"{path} was made from something else than there is now."
        read(path, shape, dtype, checked)
    except Damaged as error:
        return f"{error}: what is damaged is made again."
    return None


def provide(
    path: Path, shape: tuple[int, ...], dtype: type, made_from: dict, fill: Callable[[], None], checked: bool = True
) -> np.ndarray:
    """Memory-maps an array read-only; calls `fill` first if it is `outdated`. One process fills, the others wait."""
    if outdated(path, shape, dtype, made_from, checked) is not None:
        with locked(path, wait=True):
            reason = outdated(path, shape, dtype, made_from, checked)
            if reason is not None:
                if reason:
                    print(reason)
                fill()
    return read(path, shape, dtype, checked=False)


def sidecar(path: Path) -> Path:
    """Returns the path of the JSON file beside an array."""
    return path.with_suffix(".json")


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _rows(block: int, block_rows: int, count: int) -> range:
    return range(block * block_rows, min((block + 1) * block_rows, count))


def _memory_map(path: Path, mode: str, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """Memory-maps an array. Raises Damaged if there is no file or it holds no array of this shape and dtype."""
    try:
        if path.stat().st_size <= math.prod(shape) * dtype.itemsize:
            raise Damaged(f"{path} is damaged (it ends too early)")
        array = np.lib.format.open_memmap(path, mode)
    except FileNotFoundError as error:
        raise Damaged(f"There is no file {path}") from error
    except (Damaged, OSError, MemoryError):
        raise
    except Exception as error:  # NumPy evaluates the header as Python: a corrupted one can raise nearly anything
        raise Damaged(f"{path} is damaged (it has no valid .npy header)") from error
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise Damaged(f"{path} is damaged (it holds {array.dtype} of {array.shape}, expected {dtype} of {shape})")
    return array


def _take_room(path: Path) -> None:
    """Reserves a file's space on the disk: on a full disk, writing to a memory map would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _valid_blocks(path: Path, array: np.memmap, block_rows: int, notes: dict[int, dict]) -> set[int]:
    """Returns the indices of the recorded blocks whose SHA-256 matches."""

    def matches(block: int) -> bool:
        return _digest(array, _rows(block, block_rows, len(array))) == notes[block]["sha256"]

    valid = set()
    bar = tqdm(desc=f"check {path}", total=len(notes), unit=" blocks", leave=False, disable=None, delay=1)
    with bar, ThreadPoolExecutor() as pool:
        for block, matched in zip(notes, map_ahead(pool, matches, notes, 64), strict=True):
            if matched:
                valid.add(block)
            bar.update()
    return valid


def _digest(array: np.memmap, rows: range, values: np.ndarray | None = None) -> str:
    """Returns the SHA-256 of rows of an array; hashes `values`, if given, instead of reading the rows again."""
    digest = hashlib.sha256()
    if rows.start == 0:  # the first block covers the .npy header too
        with open(array.filename, "rb") as file:
            digest.update(file.read(array.offset))
    digest.update(np.ascontiguousarray(array[rows.start : rows.stop] if values is None else values).data)
    return digest.hexdigest()
