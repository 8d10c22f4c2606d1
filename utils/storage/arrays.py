"""Arrays (N, ...) on disk that are filled block by block, go on where they were interrupted, and are checked when read.

Beside `<name>.npy` lies `<name>.json`: what the array was made from, and the SHA-256 of every block of rows. While it
is filled the two are called `<name>.npy.partial` and `<name>.json.partial`. Blocks that were finished before a kill are
kept where their SHA-256 still holds, so that it does not matter what of them had reached the disk.
"""

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.errors import Damaged, InputError
from utils.storage.files import not_written
from utils.storage.locks import locked
from utils.storage.seals import read_sealed_json, write_sealed_json
from utils.threads import map_ahead

NOTED_EVERY = 5.0  # seconds: a kill loses the blocks of no more than this


class Filling:
    """Context in which an array is filled; it takes its place when the context ends without an exception.

    Blocks of `block_rows` rows (the last one shorter) are written to `array` and then reported by `finish`; `missing`
    are those that an earlier attempt with the same `made_from` has not finished. An array that has been damaged is
    filled again where it is damaged. `conditions` are what decides the last bits beside `made_from`: if they have
    changed since the earlier attempt, that is said and both are kept in the sidecar.

    Only one process may fill an array at a time: see `utils.storage.locks.locked`. Raises InputError where there is
    no room.
    """

    array: np.ndarray  # (N, ...), mapped
    missing: list[int]  # numbers of blocks

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
        self._about = {"made from": made_from, "shape": [*shape], "dtype": self._dtype.name, "block rows": block_rows}
        self._conditions = conditions or {}
        self.count = -(-shape[0] // block_rows)

    def __enter__(self) -> "Filling":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            earlier = self._earlier()
            if earlier and not self._partial.exists() and self.path.exists():
                os.replace(self.path, self._partial)  # it was damaged, or a kill came before its sidecar
            try:
                self.array = _mapped(self._partial, "r+", self._shape, self._dtype)
                _take_room(self._partial)
            except Damaged:
                earlier, self.array = {}, self._new()
        except OSError as error:
            raise not_written(self.path, error) from error
        notes = {block: note for block, note in enumerate(earlier.get("blocks", [])) if note}
        good = _check(self.path, self.array, self._about["block rows"], notes)
        self._blocks = {block: note for block, note in notes.items() if block in good}
        self.missing = [block for block in range(self.count) if block not in good]
        before = earlier["conditions"] if good else []
        if before and before[-1] != self._conditions:
            print(f"{self.path} goes on under {self._conditions}, before {before[-1]}: last bits may differ.")
        self._all_conditions = [*(one for one in before if one != self._conditions), self._conditions]
        self._noted_at = time.monotonic()
        return self

    def rows(self, block: int) -> range:
        return _rows(block, self._about["block rows"], self._shape[0])

    def write(self, block: int, values: np.ndarray) -> str:
        """Writes the rows of a block, of the array's type; gives their SHA-256. May be called in any thread.

        Raises NotWritten, on a system that finds out late that there is no room.
        Through the file where that can be: fetching the pages of a map one by one can take as long as decoding images.
        """
        rows = self.rows(block)
        if hasattr(os, "pwrite"):
            left, at = memoryview(np.ascontiguousarray(values)).cast("B"), self.array.offset
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
        """The SHA-256 of a block as it has been written; may be called in any thread."""
        return _digest(self.array, self.rows(block))

    def finish(self, block: int, digest: str, **more) -> None:
        """Keeps a block that has been written, with its digest and whatever else is to be remembered of it."""
        self._blocks[block] = {"sha256": digest, **more}
        if time.monotonic() - self._noted_at > NOTED_EVERY:
            self._note(self._notes)

    def __exit__(self, kind, *_) -> None:
        if kind is not None:
            with contextlib.suppress(InputError):  # what ended the block is what the user must hear of
                self._note(self._notes)
            return
        self._note(self._notes)
        try:
            self.array.flush()
            with open(self._partial, "rb+") as file:
                os.fsync(file.fileno())
            sidecar(self.path).unlink(missing_ok=True)  # it is not that of the array that comes now
            os.replace(self._partial, self.path)
            os.replace(self._notes, sidecar(self.path))  # a kill before this leaves both for `__enter__` to go on from
        except OSError as error:
            raise not_written(self.path, error) from error

    def discard(self) -> None:
        """Deletes what has been filled so far, after the context has ended by an exception."""
        self._partial.unlink(missing_ok=True)
        self._notes.unlink(missing_ok=True)

    def _earlier(self) -> dict:
        """The notes of an earlier attempt at this array, or its sidecar; empty where there are none."""
        for path in (self._notes, sidecar(self.path)):
            with contextlib.suppress(InputError):
                found = read_sealed_json(path)
                if all(found.get(name) == value for name, value in self._about.items()):
                    return found
        return {}

    def _new(self) -> np.ndarray:
        self._partial.unlink(missing_ok=True)  # another process may have it mapped
        try:
            array = np.lib.format.open_memmap(self._partial, "w+", self._dtype, self._shape)
            _take_room(self._partial)
        except OSError:
            self._partial.unlink(missing_ok=True)
            raise
        return array

    def _note(self, path: Path) -> None:
        blocks = [self._blocks.get(block) for block in range(self.count)]
        write_sealed_json(path, {**self._about, "conditions": self._all_conditions, "blocks": blocks})
        self._noted_at = time.monotonic()


def write(path: Path, values: np.ndarray, made_from: dict, block_rows: int = 1 << 20) -> None:
    """Writes an array that is there already; waits for another process that writes it."""
    with locked(path, wait=True), Filling(path, values.shape, values.dtype, made_from, block_rows) as filling:
        filling.array[:] = values
        for block in range(filling.count):
            filling.finish(block, filling.digest(block))


def about(path: Path) -> dict | None:
    """The sidecar of an array: "made from", and what was kept with each of its "blocks". Reads no row.

    None where the array or its sidecar is not there. Raises Damaged where the sidecar is.
    """
    return read_sealed_json(sidecar(path)) if path.exists() and sidecar(path).exists() else None


def read(path: Path, shape: tuple[int, ...], dtype: type, checked: bool = True) -> np.ndarray:
    """The mapped array, read-only.

    Raises Damaged where it is not of this shape and type or, if it is to be `checked`, not what was written.
    """
    notes = read_sealed_json(sidecar(path))
    array = _mapped(path, "r", shape, np.dtype(dtype))
    if checked:
        size, blocks = notes["block rows"], dict(enumerate(notes["blocks"]))
        if bad := sorted(blocks.keys() - _check(path, array, size, blocks)):
            raise Damaged(f"{path} is damaged (from row {bad[0] * size} on its SHA-256 is another)")
    return array


def outdated(path: Path, shape: tuple[int, ...], dtype: type, made_from: dict, checked: bool = True) -> str | None:
    """Why an array has to be made: a sentence, or an empty one where it simply is not there.

    None where it is there, made from exactly this, and whole as `read` sees it.
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
    """The mapped array, after `fill` has made it where it is `outdated`; one process fills, others wait for it."""
    if outdated(path, shape, dtype, made_from, checked) is not None:
        with locked(path, wait=True):
            reason = outdated(path, shape, dtype, made_from, checked)
            if reason is not None:
                if reason:
                    print(reason)
                fill()
    return read(path, shape, dtype, checked=False)


def sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _rows(block: int, block_rows: int, count: int) -> range:
    return range(block * block_rows, min((block + 1) * block_rows, count))


def _mapped(path: Path, mode: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Raises Damaged where the file is not there or does not hold exactly such an array."""
    try:
        if path.stat().st_size <= math.prod(shape) * dtype.itemsize:
            raise Damaged(f"{path} is damaged (it ends too early)")
        array = np.lib.format.open_memmap(path, mode)
    except FileNotFoundError as error:
        raise Damaged(f"There is no file {path}") from error
    except (Damaged, OSError, MemoryError):
        raise
    except Exception as error:  # NumPy parses the header as Python: a damaged one can raise nearly anything
        raise Damaged(f"{path} is damaged (its header is none of an array)") from error
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise Damaged(f"{path} is damaged (it holds {array.dtype} of {array.shape}, expected {dtype} of {shape})")
    return array


def _take_room(path: Path) -> None:
    """Takes a file's place on the disk at once: writing into a map that finds no place is fatal."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _check(path: Path, array: np.ndarray, block_rows: int, notes: dict[int, dict]) -> set[int]:
    """The noted blocks whose SHA-256 holds."""

    def holds(block: int) -> bool:
        return _digest(array, _rows(block, block_rows, len(array))) == notes[block]["sha256"]

    good = set()
    bar = tqdm(desc=f"check {path}", total=len(notes), unit=" blocks", leave=False, disable=None, delay=1)
    with bar, ThreadPoolExecutor() as pool:
        for block, held in zip(notes, map_ahead(pool, holds, notes, 64), strict=True):
            if held:
                good.add(block)
            bar.update()
    return good


def _digest(array: np.ndarray, rows: range, values: np.ndarray | None = None) -> str:
    """Of rows of an array, whose `values` need not be read where they are at hand."""
    digest = hashlib.sha256()
    if rows.start == 0:  # the first block answers for the header too
        with open(array.filename, "rb") as file:
            digest.update(file.read(array.offset))
    digest.update(array[rows.start : rows.stop] if values is None else np.ascontiguousarray(values))
    return digest.hexdigest()
