"""Lists the images of a data folder in a fixed order, with labels that do not depend on the file system."""

import contextlib
import dataclasses
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config.config import Config
from utils.data import recordio
from utils.errors import InputError
from utils.storage.files import replaced
from utils.storage.seals import check_seal, seal

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
GROUPS_OF_RECORDS = ("Caucasian", "Indian", "Asian", "African")
"""The groups that the second label of a record counts, in the release of BUPT-BalancedFace."""


@dataclass(frozen=True)
class Index:
    """Holds all N images of a data folder, sorted by group, identity and file name, or key of a record."""

    identities: tuple[str, ...]  # "<group>/<identity>", or "<identity>" if there are no groups; sorted
    paths: tuple[str, ...]  # "<identity as above>/<image>", sorted within an identity
    identity: np.ndarray  # (N,) int64: position in `identities`
    stamps: np.ndarray  # (N, 2) int64: size in bytes and mtime in ns; for records offset and length in bytes
    folders: tuple[str, ...]  # every listed folder (groups, then identities, empty ones too); or train.rec, train.idx
    changed: np.ndarray  # (folders,) int64: their ctime in ns
    digest: str  # SHA-256 over the names, sizes and mtimes of all files

    @property
    def in_records(self) -> bool:
        """Tells whether the images are records of train.rec, not files."""
        return self.folders[0] == recordio.RECORDS

    def identities_of(self, group: str) -> list[str]:
        """Returns the identities of a group, as "<group>/<identity>"."""
        return [name for name in self.identities if name.startswith(f"{group}/")]


def scan(data: Path, ethnicities: Iterable[str], records: recordio.Records | None = None) -> Index:
    """Lists <data>/<ethnicity>/<identity>/<image>, or without ethnicities <data>/<identity>/<image>; opens no image.

    If the folder holds train.rec, its records are listed instead (see `utils.data.recordio`); pass `records` if they
    have been read already. Raises InputError if a folder is missing, a group is empty, or two groups have an identity
    of the same name.
    """
    if not data.is_dir():
        raise InputError(f"There is no folder {data}: set data to the folder of the images.")
    groups = sorted(ethnicities)
    try:
        if records is None and (data / recordio.RECORDS).is_file():
            records = recordio.read_index(data)
        return _scan(data, groups) if records is None else _scan_records(data, groups, records)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}).") from error


def _scan(data: Path, groups: list[str]) -> Index:
    missing = [name for name in groups if not (data / name).is_dir()]
    if missing:
        raise InputError(
            f"{data} has no folder for {', '.join(missing)}: set data; ethnicities to its groups, "
            'or to "" if it has none.'
        )

    roots = groups or ["."]
    changed = [_changed(data / root) for root in roots]  # before listing, so that a change meanwhile is noticed
    folders = [f"{root}/{name}".removeprefix("./") for root in roots for name in _folders(data / root)]
    with ThreadPoolExecutor() as pool:
        listed = list(pool.map(lambda folder: _images(data / folder), folders))
    changed += [when for when, _ in listed]
    files = [(folder, images) for folder, (_, images) in zip(folders, listed, strict=True) if images]

    if not files:
        where = ", ".join(str(data / root) for root in roots)
        raise InputError(
            f"{where} holds no image in <identity>/<image>.jpg, .png or .webp: set data; ethnicities to the groups "
            'that it holds, or to "" if it holds identities.'
        )
    if empty := sorted(set(groups) - {folder.split("/")[0] for folder, _ in files}):
        raise InputError(f"{data / empty[0]} holds no image: expected {empty[0]}/<identity>/<image>.jpg or .png.")
    seen: dict[str, str] = {}
    for folder, _ in files:
        group, _, name = folder.rpartition("/")
        if name in seen:
            raise InputError(
                f"Identity {name} is in both {seen[name]} and {group}: give the two different names, or remove one."
            )
        seen[name] = group
    paths = tuple(f"{folder}/{name}" for folder, images in files for name, _, _ in images)
    stamps = np.array([stamp for _, images in files for _, *stamp in images], np.int64)
    return Index(
        tuple(folder for folder, _ in files),
        paths,
        np.repeat(np.arange(len(files)), [len(images) for _, images in files]),
        stamps,
        (*roots, *folders),
        np.array(changed, np.int64),
        hashlib.sha256(_packed(paths) + stamps.astype("<i8").tobytes()).hexdigest(),
    )


def _scan_records(data: Path, groups: list[str], records: recordio.Records) -> Index:
    """Lists records; an identity is named by its label with leading zeros, so that names sort as numbers do."""
    group = _groups_of(records, groups)
    order = np.lexsort((records.keys, records.identity, group))
    order = order[group[order] >= 0]
    group, number = group[order], records.identity[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (np.diff(group) != 0) | (np.diff(number) != 0)
    names = [f"{number[k]:08}" for k in np.flatnonzero(is_first)]
    if groups:
        _refuse_repeated(records.path, names)
        names = [f"{groups[group[k]]}/{name}" for k, name in zip(np.flatnonzero(is_first), names, strict=True)]
    identity = np.cumsum(is_first) - 1
    paths = tuple(f"{names[i]}/{key}" for i, key in zip(identity.tolist(), records.keys[order].tolist(), strict=True))
    stamps = np.stack([records.offsets, records.lengths], 1)[order]
    files = [name for name in (recordio.RECORDS, recordio.INDEX) if (data / name).exists()]
    whole = np.array([_stamp(data / name) for name in files], "<i8")
    return Index(
        tuple(names),
        paths,
        identity,
        stamps,
        tuple(files),
        np.array([_changed(data / name) for name in files], np.int64),
        hashlib.sha256(_packed(paths) + stamps.astype("<i8").tobytes() + whole.tobytes()).hexdigest(),
    )


def _groups_of(records: recordio.Records, groups: list[str]) -> np.ndarray:
    """Returns (N,) int64: the position in `groups` of each image, -1 if its group is not in it; 0 without groups."""
    if not groups:
        return np.zeros(len(records.group), np.int64)
    advice = 'set ethnicities to "" for data without groups, or'
    if unknown := [name for name in groups if name not in GROUPS_OF_RECORDS]:
        raise InputError(
            f"{records.path} has the groups {', '.join(GROUPS_OF_RECORDS)}, not {unknown[0]}: {advice} so."
        )
    if (records.group < 0).any():
        raise InputError(f"{records.path} says no group of its images: {advice} data to a folder per ethnicity.")
    place = np.full(max(records.group.max() + 1, len(GROUPS_OF_RECORDS)), -1)
    place[[GROUPS_OF_RECORDS.index(name) for name in groups]] = range(len(groups))
    found = place[records.group]
    if empty := [name for k, name in enumerate(groups) if not (found == k).any()]:
        raise InputError(f"{records.path} holds no image of {', '.join(empty)}: set data or ethnicities.")
    return found


def _refuse_repeated(path: Path, names: list[str]) -> None:
    if repeated := next((name for name, count in Counter(names).items() if count > 1), None):
        raise InputError(
            f"{path} has identity {repeated} in two groups: give the two different numbers, or remove one."
        )


def _folders(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _images(path: Path) -> tuple[int, list[tuple[str, int, int]]]:
    """Returns a folder's ctime in ns, and name, size in bytes and mtime in ns of every image in it, sorted by name."""
    found, changed = [], _changed(path)
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.lower().endswith(EXTENSIONS):
                try:
                    stat = entry.stat()
                    found.append((entry.name, stat.st_size, stat.st_mtime_ns))
                except FileNotFoundError:  # a broken link: kept, to be reported among the bad images
                    found.append((entry.name, -1, -1))
    return changed, sorted(found)


# The index is cached, since listing a million files takes a quarter of a minute ---------------------------------------

LOOKED_AT = 10_000  # evenly spaced files of a cached index whose size and mtime are compared
SETTLED = 2.0  # seconds: a folder changed more recently may change again without a new ctime, so it is not cached


def find_images(cfg: Config, suspects: Iterable[int] = ()) -> Index:
    """Returns the index of the data folder: from the cache if nothing has changed, otherwise from `scan`.

    Adding, removing or renaming a file changes the ctime of its folder and is always noticed. A file overwritten in
    place is noticed if it is one of the rows `suspects` or of LOOKED_AT evenly spaced rows; a data folder with no more
    files than that is compared completely.
    """
    data, path = Path(cfg.data), cfg.cache_dir / "index.npz"
    if index := _read_cache(path, data, cfg.ethnicities, suspects):
        return index
    started = time.time_ns()
    index = scan(data, cfg.ethnicities)
    if index.changed.max() < started - SETTLED * 1e9:
        with contextlib.suppress(InputError):  # a read-only cache costs time only
            _write_cache(path, index)
    return index


def _write_cache(path: Path, index: Index) -> None:
    fields = {name: _as_array(value) for name, value in vars(index).items()} | {"endings": _as_array(EXTENSIONS)}
    with replaced(path) as partial:
        with open(partial, "wb") as file:
            np.savez(file, **fields)
        seal(partial)


def _read_cache(path: Path, data: Path, ethnicities: tuple[str, ...], suspects: Iterable[int]) -> Index | None:
    if not path.exists():
        return None
    with open(path, "rb") as file:
        reason, _ = check_seal(file)
        if reason:
            print(f"{path} is damaged ({reason}): {data} is listed again.")
            return None
        file.seek(0)
        with np.load(file, allow_pickle=False) as stored:
            fields = {name: stored[name] for name in stored.files}
    endings = fields.pop("endings", None)
    if fields.keys() != {field.name for field in dataclasses.fields(Index)} or _unpacked(endings) != EXTENSIONS:
        return None  # written by another version of this code
    texts = {name: _unpacked(fields[name]) for name in ("identities", "paths", "folders")}
    index = Index(**{**fields, **texts, "digest": str(fields["digest"])})
    if index.in_records or (data / recordio.RECORDS).is_file():
        return index if _same_records(index, data) else None
    spread = np.linspace(0, len(index.paths) - 1, LOOKED_AT).astype(int)
    compared = np.unique([*spread, *(row for row in suspects if row < len(index.paths))])
    try:
        same = index.folders[: len(ethnicities) or 1] == (tuple(sorted(ethnicities)) or (".",))
        same = same and index.changed.tolist() == [_changed(data / folder) for folder in index.folders]
        same = same and index.stamps[compared].tolist() == [_stamp(data / index.paths[row]) for row in compared]
    except OSError:
        return None
    return index if same else None


def _same_records(index: Index, data: Path) -> bool:
    """Tells whether train.rec and train.idx are unchanged since the cached index was made."""
    files = [name for name in (recordio.RECORDS, recordio.INDEX) if (data / name).exists()]
    return files == [*index.folders] and index.changed.tolist() == [_changed(data / name) for name in files]


def _changed(folder: Path) -> int:
    """Returns the ctime in ns. The mtime would not do: copying tools can set it back."""
    return os.stat(folder).st_ctime_ns


def _stamp(path: Path) -> list[int]:
    try:
        stat = os.stat(path)
    except FileNotFoundError:  # a broken link, as in `_images`
        return [-1, -1]
    return [stat.st_size, stat.st_mtime_ns]


def _as_array(value: object) -> np.ndarray:
    return np.frombuffer(_packed(value), np.uint8) if isinstance(value, tuple) else np.asarray(value)


def _packed(texts: Iterable[str]) -> bytes:
    """Joins names into bytes; a file name need not be valid text."""
    return os.fsencode("\0".join(texts))


def _unpacked(array: np.ndarray) -> tuple[str, ...]:
    return tuple(os.fsdecode(array.tobytes()).split("\0"))
