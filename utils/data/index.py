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
from typing import NamedTuple

import numpy as np

from config.config import Config
from utils.data import recordio
from utils.data.images import NOT_READ
from utils.data.listing import described, entries
from utils.errors import InputError
from utils.storage.files import replaced
from utils.storage.seals import check_seal, seal

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
NAMED = 3  # names of identities shown in a message
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
    hidden: tuple[str, ...] = ()  # hidden and system entries that were passed over, relative to the data folder
    passed: tuple[str, ...] = ()  # images that were passed over: in subfolders, outside of identities, other formats
    empty: tuple[str, ...] = ()  # folders of identities without an image

    def notes(self, data: Path) -> list[str]:
        """Returns a line that counts hidden entries, and one that counts images passed over; none if there are none."""
        depth = self.identities[0].count("/")
        return [*filter(None, (described(self.hidden, data), _passed_over(data, self.passed, self.empty, depth)))]

    @property
    def in_records(self) -> bool:
        """Tells whether the images are records of train.rec, not files."""
        return self.folders[0] == recordio.RECORDS

    def identities_of(self, group: str) -> list[str]:
        """Returns the identities of a group, as "<group>/<identity>"."""
        return [name for name in self.identities if name.startswith(f"{group}/")]


def scan(
    data: Path, ethnicities: Iterable[str], records: recordio.Records | None = None, nested: bool = False
) -> Index:
    """Lists <data>/<ethnicity>/<identity>/<image>, or without ethnicities <data>/<identity>/<image>; opens no image.

    Hidden and system entries are passed over (see `utils.data.listing`), and so are images in subfolders of an
    identity, unless `nested`. If the folder holds train.rec, its records are listed instead (see
    `utils.data.recordio`); pass `records` if they have been read already. Raises InputError if a folder is missing, a
    group is empty, or two groups have an identity of the same name.
    """
    if not data.is_dir():
        raise InputError(f"There is no folder {data}: set data to the folder of the images.")
    groups = sorted(ethnicities)
    try:
        if records is None and (data / recordio.RECORDS).is_file():
            records = recordio.read_index(data)
        return _scan(data, groups, nested) if records is None else _scan_records(data, groups, records)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}).") from error


def _scan(data: Path, groups: list[str], nested: bool) -> Index:
    missing = [name for name in groups if not (data / name).is_dir()]
    if missing:
        raise InputError(
            f"{data} has no folder for {', '.join(missing)}: set data; ethnicities to its groups, "
            f'or to "" if it has none.{_other_records(data)}'
        )

    roots = groups or ["."]
    changed = [_changed(data / root) for root in roots]  # before listing, so that a change meanwhile is noticed
    hidden: list[str] = []
    shown = {root: sorted(entries(data / root, hidden), key=lambda entry: entry.name) for root in roots}
    at = {root: f"{root}/".removeprefix("./") for root in roots}
    folders = [at[root] + entry.name for root in roots for entry in shown[root] if entry.is_dir()]
    with ThreadPoolExecutor() as pool:
        listed = list(pool.map(lambda folder: _images(data, folder, nested), folders))
    below = [folder for one in listed for folder in one.folders[1:]]
    changed += [when for _, when in [one.folders[0] for one in listed] + below]
    passed = [at[root] + entry.name for root in roots for entry in shown[root] if _is_image(entry.name, entry.is_dir())]
    passed += [path for one in listed for path in one.passed]
    files = [(folder, one.images) for folder, one in zip(folders, listed, strict=True) if one.images]
    _refuse_empty(data, groups, [folder for folder, _ in files], passed)
    paths = tuple(path for _, images in files for path, _, _ in images)
    stamps = np.array([stamp for _, images in files for _, *stamp in images], np.int64)
    return Index(
        tuple(folder for folder, _ in files),
        paths,
        np.repeat(np.arange(len(files)), [len(images) for _, images in files]),
        stamps,
        (*roots, *folders, *(folder for folder, _ in below)),
        np.array(changed, np.int64),
        hashlib.sha256(_packed(paths) + stamps.astype("<i8").tobytes()).hexdigest(),
        tuple(os.path.relpath(path, data) for path in hidden + [path for one in listed for path in one.hidden]),
        tuple(passed),
        tuple(folder for folder, one in zip(folders, listed, strict=True) if not one.images),
    )


def _refuse_empty(data: Path, groups: list[str], found: list[str], passed: list[str]) -> None:
    """Raises InputError if a group, or the folder without groups, has no image, or two groups share an identity.

    `found` are the folders of identities with images, `passed` the images that were passed over.
    """
    advice = f" {_passed_over(data, tuple(passed), (), 1 if groups else 0)}".rstrip() + _other_records(data)
    if not found:
        where = ", ".join(str(data / root) for root in groups or ["."])
        raise InputError(
            f"{where} holds no image in <identity>/<image>.jpg, .png or .webp: set data; ethnicities to the groups "
            f'that it holds, or to "" if it holds identities.{advice}'
        )
    if empty := sorted(set(groups) - {folder.split("/")[0] for folder in found}):
        raise InputError(
            f"{data / empty[0]} holds no image: expected {empty[0]}/<identity>/<image>.jpg or .png.{advice}"
        )
    seen: dict[str, str] = {}
    for folder in found:
        group, _, name = folder.rpartition("/")
        if name in seen:
            raise InputError(
                f"Identity {name} is in both {seen[name]} and {group}: give the two different names, or remove one."
            )
        seen[name] = group


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


class _Listed(NamedTuple):
    """Holds what was found in the folder of an identity; all paths are relative to the data folder."""

    folders: list[tuple[str, int]]  # the folder itself, then its subfolders: path and ctime in ns
    images: list[tuple[str, int, int]]  # path, size in bytes and mtime in ns, sorted by path
    passed: list[str]  # images that are passed over
    hidden: list[str]  # hidden entries


def _images(data: Path, folder: str, nested: bool) -> _Listed:
    """Lists the folder of an identity; of its subfolders the images are taken if `nested`, otherwise passed over."""
    listed = _Listed([], [], [], [])
    left: list[tuple[str, tuple[tuple[int, int], ...]]] = [(folder, ())]
    while left:
        path, above = left.pop()
        stat = os.stat(data / path)
        if (stat.st_dev, stat.st_ino) in above:  # a link to a folder that holds it
            continue
        listed.folders.append((path, stat.st_ctime_ns))
        above = (*above, (stat.st_dev, stat.st_ino))
        for entry in sorted(entries(data / path, listed.hidden), key=lambda entry: entry.name, reverse=True):
            inside = f"{path}/{entry.name}"
            if entry.name.lower().endswith(EXTENSIONS):
                if nested or path == folder:
                    listed.images.append((inside, *_stamp_of(entry)))
                else:
                    listed.passed.append(inside)
            elif entry.is_dir():
                left.append((inside, above))
            elif entry.name.lower().endswith(NOT_READ):
                listed.passed.append(inside)
    listed.images.sort()
    listed.passed.sort()
    return listed


def _stamp_of(entry: os.DirEntry) -> tuple[int, int]:
    try:
        stat = entry.stat()
    except FileNotFoundError:  # a broken link: kept, to be reported among the bad images
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def _is_image(name: str, is_folder: bool) -> bool:
    return not is_folder and name.lower().endswith((*EXTENSIONS, *NOT_READ))


def _other_records(data: Path) -> str:
    """Returns a sentence that names records of another name than train.rec in a folder, "" if there are none."""
    found = sorted(entry.name for entry in entries(data) if entry.name.lower().endswith(".rec") and entry.is_file())
    if not found:
        return ""
    return f" It holds {', '.join(found[:NAMED])}: name it {recordio.RECORDS}, and its index {recordio.INDEX}."


def _passed_over(data: Path, passed: tuple[str, ...], empty: tuple[str, ...], depth: int) -> str:
    """Returns a line that counts the images passed over by reason, and names identities without images; "" if none.

    `depth` is the number of slashes in the path of an identity.
    """
    kinds: dict[str, list[str]] = {}
    for path in passed:
        if not path.lower().endswith(EXTENSIONS):
            kind = f"in a format that is not read ({os.path.splitext(path)[1].lower()})"
        elif path.count("/") > depth + 1:
            kind = "in subfolders of identities (nested_images reads them)"
        else:
            kind = "outside of the folders of identities"
        kinds.setdefault(kind, []).append(path)
    parts = [f"{len(paths):,} {kind}, such as {paths[0]}" for kind, paths in kinds.items()]
    sentences = [f"{len(passed):,} images in {data} are passed over: {'; '.join(parts)}."] if passed else []
    if empty:
        shown = ", ".join(empty[:NAMED]) + ", ..." * (len(empty) > NAMED)
        sentences.append(f"{len(empty):,} identities in {data} have no image: {shown}.")
    return " ".join(sentences)


# The index is cached, since listing a million files takes a quarter of a minute ---------------------------------------

LOOKED_AT = 10_000  # evenly spaced files of a cached index whose size and mtime are compared
TEXTS = ("identities", "paths", "folders", "hidden", "passed", "empty")  # the fields of an index that hold names
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
    index = scan(data, cfg.ethnicities, nested=cfg.nested_images)
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
    texts = {name: _unpacked(fields[name]) for name in TEXTS}
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


def difference(before: Iterable[str], now: Iterable[str]) -> str:
    """Returns which identities were added and which are missing, up to NAMED of each, or "" if none are."""
    before, now = set(before), set(now)
    parts = [("added", sorted(now - before)), ("missing", sorted(before - now))]
    return "; ".join(
        f"{len(names):,} {what}: {', '.join(names[:NAMED])}{', ...' * (len(names) > NAMED)}"
        for what, names in parts
        if names
    )


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
    return tuple(os.fsdecode(array.tobytes()).split("\0")) if array.size else ()
