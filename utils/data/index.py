"""Index of a data folder: every image in a fixed order, with labels that do not depend on the file system."""

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
"""What the second label of a record means in the release of BUPT-BalancedFace."""


@dataclass(frozen=True)
class Index:
    """All images in a fixed order: sorted by group, identity and file name, or key of a record."""

    identities: tuple[str, ...]  # "<group>/<identity>", of data without groups "<identity>", sorted
    paths: tuple[str, ...]  # "<identity as above>/<image>", sorted within an identity
    identity: np.ndarray  # (N,) int64: which identity an image shows
    stamps: np.ndarray  # (N, 2) int64: size in bytes and nanosecond of its change; of a record offset and length
    folders: tuple[str, ...]  # all that were listed: groups and identities, also those without an image; or train.rec
    changed: np.ndarray  # (folders,) int64: when the list of their files last changed, in nanoseconds
    digest: str  # of names, sizes and times of change of all files

    @property
    def in_records(self) -> bool:
        return self.folders[0] == recordio.RECORDS

    def identities_of(self, group: str) -> list[str]:
        return [name for name in self.identities if name.startswith(f"{group}/")]


def scan(data: Path, ethnicities: Iterable[str], records: recordio.Records | None = None) -> Index:
    """Lists <data>/<ethnicity>/<identity>/<image>, or without ethnicities <data>/<identity>/<image>; opens no image.

    A folder that holds train.rec is that of a RecordIO data set (see `utils.data.recordio`), whose `records` may have
    been read before. Raises InputError for a missing folder, an empty group and a name that two groups give to an
    identity.
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
    changed = [_changed(data / root) for root in roots]  # before they are listed
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
    """The identities of records are named by their numbers, with zeros before them: names and numbers sort alike."""
    group = _groups_of(records, groups)
    order = np.lexsort((records.keys, records.identity, group))
    order = order[group[order] >= 0]
    group, number = group[order], records.identity[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (np.diff(group) != 0) | (np.diff(number) != 0)
    names = [f"{number[k]:08}" for k in np.flatnonzero(is_first)]
    if groups:
        _refuse_doubles(records.path, names)
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
    """(N,) which of `groups` an image is of, -1 where of none of them; all of the first where there are none."""
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


def _refuse_doubles(path: Path, names: list[str]) -> None:
    if double := next((name for name, count in Counter(names).items() if count > 1), None):
        raise InputError(f"{path} has identity {double} in two groups: give the two different numbers, or remove one.")


def _folders(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _images(path: Path) -> tuple[int, list[tuple[str, int, int]]]:
    """When the folder last changed, and name, size and time of change of every image in it, sorted by name."""
    found, changed = [], _changed(path)
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.lower().endswith(EXTENSIONS):
                try:
                    stat = entry.stat()
                    found.append((entry.name, stat.st_size, stat.st_mtime_ns))
                except FileNotFoundError:  # a link that leads nowhere: listed with the bad images
                    found.append((entry.name, -1, -1))
    return changed, sorted(found)


# The index is kept, since listing a million files takes a quarter of a minute -----------------------------------------

LOOKED_AT = 10_000  # files of a kept index whose size and time are compared, evenly spread over all
SETTLED = 2.0  # seconds: a folder that changed within this time before it was listed may change unnoticed after


def find_images(cfg: Config, suspects: Iterable[int] = ()) -> Index:
    """What `scan` finds in the data folder, read back from the cache where nothing has changed since.

    Any file that is added, removed or renamed changes its folder, and is noticed. A file that is written over in place
    is noticed where it is among the 10,000 that are looked at, or in one of the rows `suspects`; a data folder of no
    more than 10,000 files is looked at whole.
    """
    data, path = Path(cfg.data), cfg.cache_dir / "index.npz"
    if index := _kept_index(path, data, cfg.ethnicities, suspects):
        return index
    started = time.time_ns()
    index = scan(data, cfg.ethnicities)
    if index.changed.max() < started - SETTLED * 1e9:
        with contextlib.suppress(InputError):  # the cache may be a read-only one, which costs time and nothing else
            _keep_index(path, index)
    return index


def _keep_index(path: Path, index: Index) -> None:
    fields = {name: _as_array(value) for name, value in vars(index).items()} | {"endings": _as_array(EXTENSIONS)}
    with replaced(path) as partial:
        with open(partial, "wb") as file:
            np.savez(file, **fields)
        seal(partial)


def _kept_index(path: Path, data: Path, ethnicities: tuple[str, ...], suspects: Iterable[int]) -> Index | None:
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
        return None  # of another version
    texts = {name: _unpacked(fields[name]) for name in ("identities", "paths", "folders")}
    index = Index(**{**fields, **texts, "digest": str(fields["digest"])})
    if index.in_records or (data / recordio.RECORDS).is_file():
        return index if _same_records(index, data) else None
    spread = np.linspace(0, len(index.paths) - 1, LOOKED_AT).astype(int)
    looked_at = np.unique([*spread, *(row for row in suspects if row < len(index.paths))])
    try:
        same = index.folders[: len(ethnicities) or 1] == (tuple(sorted(ethnicities)) or (".",))
        same = same and index.changed.tolist() == [_changed(data / folder) for folder in index.folders]
        same = same and index.stamps[looked_at].tolist() == [_stamp(data / index.paths[row]) for row in looked_at]
    except OSError:
        return None
    return index if same else None


def _same_records(index: Index, data: Path) -> bool:
    """Whether the kept index is that of the files that there are."""
    files = [name for name in (recordio.RECORDS, recordio.INDEX) if (data / name).exists()]
    return files == [*index.folders] and index.changed.tolist() == [_changed(data / name) for name in files]


def _changed(folder: Path) -> int:
    """When the list of its files last changed, or it was given another time: tools that copy can set the first back."""
    return os.stat(folder).st_ctime_ns


def _stamp(path: Path) -> list[int]:
    try:
        stat = os.stat(path)
    except FileNotFoundError:  # as in `_images`
        return [-1, -1]
    return [stat.st_size, stat.st_mtime_ns]


def _as_array(value: object) -> np.ndarray:
    return np.frombuffer(_packed(value), np.uint8) if isinstance(value, tuple) else np.asarray(value)


def _packed(texts: Iterable[str]) -> bytes:
    """Any number of names as bytes; names of files need not be text."""
    return os.fsencode("\0".join(texts))


def _unpacked(array: np.ndarray) -> tuple[str, ...]:
    return tuple(os.fsdecode(array.tobytes()).split("\0"))
