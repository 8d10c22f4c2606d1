"""Lists the images of a data folder in the order of the stages' index, and inspects each once."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.data import image_formats, images, recordio
from utils.data.index import EXTENSIONS, GROUPS_OF_RECORDS, scan
from utils.data.listing import described, entries
from utils.prepare.likeness import BYTES, fingerprint
from utils.prepare.work import in_processes

# List -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contents:
    """Holds the N images of a data folder, ordered and named as the stages do."""

    folder: Path
    groups: tuple[str, ...]  # sorted; empty if there are none
    asked_for: tuple[str, ...]  # the groups that the user named; empty if they were detected
    identities: tuple[str, ...]  # "<group>/<identity>", or "<identity>" if there are no groups
    paths: tuple[str, ...]  # "<identity as above>/<image>"
    identity: np.ndarray  # (N,) int64: position in `identities`
    group: np.ndarray  # (N,) int64: position in `groups`, 0 if there are none
    stamps: np.ndarray  # (N, 2) int64: as in the index
    records: recordio.Records | None  # all of train.rec, other groups included; None if the images are files
    hidden: str  # a line that counts hidden entries, "" if there are none

    @property
    def in_records(self) -> bool:
        return self.records is not None

    @property
    def source(self) -> "Source":
        return Source(str(self.folder), self.in_records)

    def items(self, rows: Iterable[int]) -> "Iterator[str | tuple[int, int]]":
        """Returns the arguments for `Source.read` and `Source.decode` for these rows: paths, or (offset, length)."""
        if self.in_records:
            return (tuple(self.stamps[row].tolist()) for row in rows)
        return (self.paths[row] for row in rows)

    def rows_of(self, group: int) -> np.ndarray:
        """Returns the rows (K,) int64 of a group, given by its position in `groups`."""
        return np.flatnonzero(self.group == group)


def list_images(folder: Path, groups: tuple[str, ...] | None, nested: bool = False) -> Contents:
    """Lists the images of a folder; if `groups` is None they are detected. Raises InputError as `scan` does.

    With `nested` images in subfolders of identities are listed too, as in a stage with the setting nested_images.
    Unlike in a stage, an identity may occur in two groups: `shared_names` lists them.
    """
    asked_for = groups or ()
    records = recordio.read_index(folder) if (folder / recordio.RECORDS).is_file() else None
    groups = tuple(sorted(_find_groups(folder, records) if groups is None else groups))
    apart = [scan(folder, (group,), records, nested) for group in groups]
    indexes = apart or [scan(folder, groups, records, nested)]
    identities = sum((index.identities for index in indexes), ())
    begins = np.cumsum([0, *(len(index.identities) for index in indexes)])
    identity = np.concatenate([index.identity + begin for index, begin in zip(indexes, begins, strict=False)])
    of_identity = np.zeros(len(identities), np.int64)
    if groups:
        of_identity[:] = [groups.index(name.split("/")[0]) for name in identities]
    return Contents(
        folder,
        groups,
        asked_for,
        identities,
        sum((index.paths for index in indexes), ()),
        identity,
        of_identity[identity],
        np.concatenate([index.stamps for index in indexes]),
        records,
        described([path for index in indexes for path in index.hidden], folder),
    )


def _find_groups(folder: Path, records: recordio.Records | None) -> tuple[str, ...]:
    """Detects the groups of a folder or its records; returns () if the images are <folder>/<identity>/<image>."""
    if records:
        found = np.unique(records.group)
        known = found.min() >= 0 and found.max() < len(GROUPS_OF_RECORDS)
        return tuple(GROUPS_OF_RECORDS[number] for number in found) if known else ()
    if not folder.is_dir():
        return ()
    outer = _folders(folder)
    plain = sum(map(_holds_image, outer))
    nested = tuple(path.name for path in outer if any(map(_holds_image, _folders(path))))
    return nested if len(nested) >= plain else ()  # by majority, so that a few misplaced images do not matter


def _folders(path: Path) -> list[Path]:
    return [path / entry.name for entry in entries(path) if entry.is_dir()]


def _holds_image(path: Path) -> bool:
    return any(entry.name.lower().endswith(EXTENSIONS) for entry in entries(path))


@dataclass(frozen=True)
class Stray:
    """Counts the files of one kind that the stages ignore."""

    kind: str  # the ending, or "<ending> elsewhere"
    count: int
    example: str


def passed_over(folder: Path, groups: tuple[str, ...], paths: Iterable[str]) -> list[str]:
    """Lists the images below these groups, or below the folder if there are none, that are not among `paths`.

    These are files of other formats, or outside of the folders of identities.
    """
    roots = [f"{name}/" for name in groups] or [""]
    found = {f"{root}{path}" for root in roots for path in images.find(folder / root)[0]}
    return sorted(found.difference(paths))


def strays(contents: Contents) -> list[Stray]:
    """Counts by kind the files that the stages ignore, see `passed_over`."""
    if contents.in_records:
        return []
    kinds: dict[str, list[str]] = {}
    for path in passed_over(contents.folder, contents.asked_for, contents.paths):
        ending = os.path.splitext(path)[1].lower()
        kinds.setdefault(f"{ending} elsewhere" if ending in EXTENSIONS else ending, []).append(path)
    return [Stray(kind, len(paths), paths[0]) for kind, paths in kinds.items()]


def shared_names(contents: Contents) -> list[str]:
    """Lists the names of identities that occur in more than one group; stages refuse them."""
    if not contents.groups:
        return []
    names = Counter(name.split("/")[1] for name in contents.identities)
    return sorted(name for name, count in names.items() if count > 1)


# Inspect --------------------------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """Describes one image; of an unusable image all fields but the reason are empty or 0."""

    reason: str  # why it cannot be used, or ""
    form: str  # "JPEG", "PNG grey 16-bit", ...
    width: int
    height: int
    size: int  # bytes
    fingerprint: bytes


@dataclass(frozen=True)
class Seen:
    """Describes the N images of a folder."""

    reasons: dict[int, str]  # row: why it cannot be used
    forms: tuple[str, ...]
    form: np.ndarray  # (N,) uint8: position in `forms`
    sides: np.ndarray  # (N, 2) int32: width and height in pixels
    size: np.ndarray  # (N,) int64: bytes
    fingerprint: np.ndarray  # (N, 32) uint8

    @property
    def usable(self) -> np.ndarray:
        """Returns a mask (N,) bool."""
        usable = np.ones(len(self.form), bool)
        usable[[*self.reasons]] = False
        return usable


def look_at_all(contents: Contents, processes: int = 0) -> Seen:
    """Decodes every image once and describes it."""
    count = len(contents.paths)
    reasons, forms, fingerprints = {}, {}, bytearray()
    form, sides, size = np.empty(count, np.uint8), np.empty((count, 2), np.int32), np.empty(count, np.int64)
    looks = in_processes(partial(_look, contents.source), contents.items(range(count)), count, "look at", processes)
    for row, look in enumerate(looks):
        if look.reason:
            reasons[row] = look.reason
        form[row] = forms.setdefault(look.form, len(forms))
        sides[row] = look.width, look.height
        size[row] = look.size
        fingerprints += look.fingerprint
    return Seen(reasons, tuple(forms), form, sides, size, np.frombuffer(fingerprints, np.uint8).reshape(-1, BYTES))


def pixel_digests(contents: Contents, rows: np.ndarray, processes: int = 0) -> dict[int, bytes]:
    """Returns {row: `digest_of` its pixels} for usable images."""
    items = contents.items(rows.tolist())
    found = in_processes(partial(_digest, contents.source), items, len(rows), "compare pixels", processes)
    return dict(zip(rows.tolist(), found, strict=True))


def decoded(contents: Contents, row: int) -> np.ndarray:
    """Decodes the image of a usable row: BGR (H, W, 3) uint8."""
    return contents.source.decode(next(contents.items([row])))


def digest_of(image: np.ndarray) -> bytes:
    """Returns the SHA-256 of size and pixels of an image (H, W, 3)."""
    return hashlib.sha256(np.array(image.shape, np.int64).tobytes() + image.tobytes()).digest()


@dataclass(frozen=True)
class Source:
    """Reads the images of a folder or of its train.rec; can be pickled."""

    folder: str
    in_records: bool

    def read(self, item: str | tuple[int, int]) -> bytes:
        """Reads the encoded image at a path, or in the record at (offset, length). Raises OSError and ValueError."""
        if self.in_records:
            return recordio.image_of(images.read_bytes(f"{self.folder}/{recordio.RECORDS}", *item))
        return images.read_bytes(f"{self.folder}/{item}")

    def decode(self, item: str | tuple[int, int]) -> np.ndarray:
        """Decodes an image as the stages do, but of any size: BGR (H, W, 3) uint8. Raises OSError and ValueError."""
        return images.decode(self.read(item), upright=False)


def _look(source: Source, item: str | tuple[int, int]) -> Look:
    """Describes an image."""
    try:
        content = source.read(item)
        image = images.decode(content, upright=False)
        height, width = image.shape[:2]
        return Look("", form_of(content), width, height, len(content), fingerprint(image))
    except (OSError, ValueError, MemoryError, cv2.error) as error:
        return Look(images.reason_of(error), "", 0, 0, 0, bytes(BYTES))


def _digest(source: Source, item: str | tuple[int, int]) -> bytes:
    """Returns `digest_of` the pixels of an image."""
    try:
        return digest_of(source.decode(item))
    except (OSError, ValueError):  # the image has changed since `look_at_all`; this digest equals no other
        return repr(item).encode()


def form_of(content: bytes) -> str:
    """Names the format of a readable image, with its peculiarities: "PNG grey 16-bit", "WebP animated", "JPEG CMYK"."""
    if content.startswith(image_formats.PNG):
        depth, colour = content[24], content[25]
        grey, deep = " grey" * (colour in (0, 4)), f" {depth}-bit" * (depth > 8)
        animated = " animated" * (0 < content.find(b"acTL") < content.find(b"IDAT"))
        return f"PNG{grey}{deep}{animated}"
    if content.startswith(image_formats.WEBP):
        return "WebP" + " animated" * (content[12:16] == b"VP8X" and content[20] & 2 > 0)
    return "JPEG" + {1: " grey", 4: " CMYK"}.get(image_formats.components_of_jpeg(content), "")
