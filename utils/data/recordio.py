"""Reads and writes face data sets in MXNet's RecordIO format (train.rec, train.idx, property), without MXNet.

A record consists of one or more parts. A part is a magic number, a word with 3 bits for the kind of the part and 29
bits for its length in bytes, and that many bytes padded to a multiple of 4. Content that contains the magic number at a
multiple of 4 is split there; the magic number is dropped, and inserted again on reading. The content is "<IfQQ" (flag,
label, id, id2), then, if flag > 0, `flag` float32 labels that replace the single label, then the encoded image.

insightface's layout: the record of key 0 (header record) has two labels a and b, and no image. Keys 1 to a - 1 are
images. Keys a to b - 1 are identities: they have no image, and their labels are the first key of their images and the
key after the last. If key 0 is an image, all records are images, as in files of MXNet's im2rec. A label is the
identity, or a vector that begins with identity and group.

float32 cannot represent every integer above 2^24. Larger values of a are rounded, and the records decide where the
images end.
"""

import mmap
import re
import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO, TypeVar

import numpy as np

from utils.errors import InputError
from utils.storage.files import replaced
from utils.storage.mistaken import mistaken

RECORDS, INDEX, PROPERTY = "train.rec", "train.idx", "property"

PART = struct.Struct("<II")  # magic number, kind and length
MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
WHOLE, FIRST, MIDDLE, LAST = range(4)
LENGTH_BITS = 29
LONGEST = (1 << LENGTH_BITS) - 1  # bytes of a part; also the bit mask of its length

HEAD = struct.Struct("<IfQQ")  # flag, label, id, id2
HEAD_AND_LABELS = HEAD.size + 8  # bytes: the head and the first two labels of a vector

Ends = TypeVar("Ends", int, np.ndarray)
LABEL = np.float32  # the type of labels in a file
EXACT = 1 << 24  # LABEL represents every integer below this
DIGITS = 18  # any number of so many digits fits into int64
CHUNK = 1 << 16  # records whose first bytes are checked in one vectorised pass

FOUND = np.dtype(
    [
        ("length", np.int64),  # bytes of the record in the file: all parts with their words and padding
        ("image", np.int64),  # bytes of the encoded image
        ("id", np.int64),
        ("flag", np.int64),
        ("identity", np.float32),
        ("group", np.float32),  # -1 if the label has none
    ]
)
"""The fields that are read of a record."""


@dataclass(frozen=True)
class Records:
    """Holds position and labels of the N images of a data set, in ascending order of their keys."""

    path: Path  # of train.rec
    offsets: np.ndarray  # (N,) int64: begin of each record in the file, in bytes
    lengths: np.ndarray  # (N,) int64: length of each record in the file, in bytes, as `image_of` takes it
    keys: np.ndarray  # (N,) int64
    identity: np.ndarray  # (N,) int64: the first label
    group: np.ndarray  # (N,) int64: the second label, -1 if there is none


# Read -----------------------------------------------------------------------------------------------------------------


def read_index(folder: Path) -> Records:
    """Finds the images of <folder>/train.rec with train.idx or, without it, by reading the file record by record.

    Without train.idx the keys are the ids of the records if these are unique, as in insightface's layout, otherwise the
    records are numbered. Only the first bytes of each record are read and checked, not the images.

    Raises InputError if train.rec is missing, if a file is corrupted or the two do not fit each other, and if a label
    is not an integer from 0 to 2^24 - 1.
    """
    path = folder / RECORDS
    try:
        data = _mapped(path)
        listed = _read_keys(folder / INDEX) if (folder / INDEX).exists() else None
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read ({error.strerror or error}).") from error
    keys, offsets = listed or (None, _walk(path, data))
    found = _read_heads(path, data, offsets)
    if keys is None:
        keys = found["id"]
        if keys.min() < 0 or len(np.unique(keys)) < len(keys):
            keys = np.arange(len(found))
    rows = _images(path, keys, found)
    keys, offsets, found = keys[rows], offsets[rows], found[rows]
    _refuse_labels(path, keys, found["identity"], "identity")
    _refuse_labels(path, keys, np.where(found["flag"] > 1, found["group"], 0), "group")
    identity, group = (found[name].astype(np.int64) for name in ("identity", "group"))
    return Records(path, offsets, found["length"], keys, identity, group)


def image_of(record: bytes) -> bytes:
    """Returns the encoded image in a record, given as `Records.lengths` bytes of the file from `Records.offsets` on.

    Raises ValueError, with the reason, if the bytes are not exactly one valid record.
    """
    parts = [*_parts(record, 0)]
    if _padded(parts[-1].stop) != len(record):
        raise ValueError("is more than one record")
    content = MAGIC_BYTES.join(record[part] for part in parts)
    if len(content) < HEAD.size or len(content) < (begin := HEAD.size + 4 * HEAD.unpack_from(content)[0]):
        raise ValueError("is a record too short for its labels")
    return content[begin:]


def _parts(data: bytes | mmap.mmap, offset: int) -> Iterator[slice]:
    """Yields the slices of `data` with the content of the record at `offset`.

    Raises ValueError if there is no record, or a truncated one.
    """
    kind, possible = None, (WHOLE, FIRST)
    while kind not in (WHOLE, LAST):
        begin = offset + PART.size
        if begin > len(data):
            raise ValueError("is a truncated record")
        magic, word = PART.unpack_from(data, offset)
        kind, end = word >> LENGTH_BITS, begin + (word & LONGEST)
        if magic != MAGIC or kind not in possible:
            raise ValueError("is no record")
        if _padded(end) > len(data):
            raise ValueError("is a truncated record")
        yield slice(begin, end)
        offset, possible = _padded(end), (MIDDLE, LAST)


def _parts_at(path: Path, data: mmap.mmap, offset: int) -> list[slice]:
    try:
        return [*_parts(data, offset)]
    except ValueError as error:
        raise _damaged(path, offset, str(error)) from error


def _padded(end: Ends) -> Ends:
    return end + -end % 4


def _damaged(path: Path, offset: int, reason: str) -> InputError:
    return InputError(f"{path}: what lies at byte {offset:,} {reason}: get the file again, with its {INDEX}.")


def _refuse(path: Path, offsets: np.ndarray, bad: np.ndarray, reason: str) -> None:
    if bad.any():
        raise _damaged(path, offsets[np.argmax(bad)], reason)


def _mapped(path: Path) -> mmap.mmap:
    if not path.exists():
        others = sorted(other.name for other in path.parent.glob("*.rec"))
        held = f" It holds {others[0]}: name it {RECORDS}, and its index {INDEX}." if others else ""
        raise InputError(f"There is no file {path}: set data to the folder that holds {RECORDS}.{held}")
    with open(path, "rb") as file:
        if reason := mistaken(file.read(1024)):  # an empty file could not be memory-mapped
            raise InputError(f"{path} {reason}.")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_SEQUENTIAL"):  # read-ahead, images included, is faster than one page fault per record
        data.madvise(mmap.MADV_SEQUENTIAL)
    return data


def _read_keys(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads lines "key<tab>offset"; returns keys (N,) and offsets (N,), both int64, sorted by offset."""
    content = path.read_bytes().replace(b"\r\n", b"\n")
    if not content:
        raise _bad_index(path, "is empty")
    content += b"" if content.endswith(b"\n") else b"\n"
    text = np.frombuffer(content, np.uint8)
    breaks = np.flatnonzero((text < ord("0")) | (text > ord("9")))
    digits = np.diff(breaks, prepend=-1) - 1
    expected = np.resize(np.frombuffer(b"\t\n", np.uint8), len(breaks))
    bad = (text[breaks] != expected) | (digits < 1) | (digits > DIGITS)
    if bad.any():
        line = 1 + content.count(b"\n", 0, breaks[np.argmax(bad)])
        raise _bad_index(path, f'has a line, {line:,}, that is not "key<tab>offset"')
    keys, offsets = np.fromstring(content, np.int64, sep=" ").reshape(-1, 2).T  # any white space separates
    ordered = np.sort(keys)
    if (same := ordered[1:] == ordered[:-1]).any():
        raise _bad_index(path, f"holds key {ordered[np.argmax(same)]} twice")
    order = np.argsort(offsets)
    return keys[order], offsets[order]


def _bad_index(path: Path, reason: str) -> InputError:
    return InputError(f"{path} {reason}: get it again, or delete it to have {RECORDS} walked through.")


def _walk(path: Path, data: mmap.mmap) -> np.ndarray:
    """Returns the offsets (N,) int64 of all records."""
    offsets, offset = array("q"), 0
    while offset < len(data):
        offsets.append(offset)
        offset = _padded(_parts_at(path, data, offset)[-1].stop)
    return np.frombuffer(offsets, np.int64)


def _read_heads(path: Path, data: mmap.mmap, offsets: np.ndarray) -> np.ndarray:
    """Reads the records at ascending `offsets` (N,), returns (N,) FOUND. Raises InputError if records overlap."""
    _refuse(path, offsets, offsets > len(data) - PART.size, "is beyond its end")
    _refuse(path, offsets, offsets % 4 != 0, "is no record")
    # Also bounds the time: a record of many parts would be read once for each offset that points to it.
    _refuse(path, offsets[1:], offsets[1:] == offsets[:-1], f"is in {INDEX} twice")
    found = np.empty(len(offsets), FOUND)
    for begin in range(0, len(offsets), CHUNK):
        chunk = slice(begin, begin + CHUNK)
        found[chunk] = _read_chunk(path, data, offsets[chunk])
    ends = offsets + found["length"]
    _refuse(path, offsets[:-1], ends[:-1] > offsets[1:], "is a record that reaches into the next")
    return found


def _read_chunk(path: Path, data: mmap.mmap, offsets: np.ndarray) -> np.ndarray:
    """Does the work of `_read_heads` for CHUNK records."""
    words = np.frombuffer(data, "<u4", len(data) // 4)
    first = _words_at(words, offsets, PART.size + HEAD_AND_LABELS)
    kind, length = first[:, 1] >> LENGTH_BITS, (first[:, 1] & LONGEST).astype(np.int64)
    _refuse(path, offsets, (first[:, 0] != MAGIC) | (kind > FIRST), "is no record")
    heads, ends = first[:, 2:], offsets + PART.size + _padded(length)
    for row in np.flatnonzero(kind == FIRST):
        parts = _parts_at(path, data, int(offsets[row]))
        heads[row] = np.frombuffer(_joined_head(data, parts), "<u4")
        length[row] = sum(part.stop - part.start for part in parts) + 4 * (len(parts) - 1)
        ends[row] = _padded(parts[-1].stop)
    _refuse(path, offsets, ends > len(data), "is a truncated record")
    # Past the end both words of `after` are the last word of the file, which cannot be magic number and kind in one.
    after = _words_at(words, ends, PART.size)
    followed = (after[:, 0] == MAGIC) & (after[:, 1] >> LENGTH_BITS <= FIRST)
    _refuse(path, offsets, (ends < len(data)) & ~followed, "is a record that no other follows")

    found, labels = np.empty(len(offsets), FOUND), heads.view("<f4")
    found["length"] = ends - offsets
    found["flag"] = heads[:, 0]
    found["image"] = length - HEAD.size - 4 * found["flag"]
    found["id"] = heads[:, 2:4].copy().view("<i8")[:, 0]
    found["identity"] = np.where(found["flag"] > 0, labels[:, 6], labels[:, 1])
    found["group"] = np.where(found["flag"] > 1, labels[:, 7], -1)
    _refuse(path, offsets, found["image"] < 0, "is a record too short for its labels")
    return found


def _words_at(words: np.ndarray, offsets: np.ndarray, size: int) -> np.ndarray:
    """Gathers `size` bytes from each offset as (N, size / 4) uint32; past the end of the file its last word repeats."""
    return words[np.minimum(offsets[:, None] // 4 + np.arange(size // 4), len(words) - 1)]


def _joined_head(data: mmap.mmap, parts: list[slice]) -> bytes:
    """Returns the first HEAD_AND_LABELS bytes of a record of several parts, padded with zeros if there are fewer."""
    joined = MAGIC_BYTES.join(data[part.start : min(part.stop, part.start + HEAD_AND_LABELS)] for part in parts)
    return joined[:HEAD_AND_LABELS].ljust(HEAD_AND_LABELS, b"\0")


def _images(path: Path, keys: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Returns the rows of the images in ascending order of their keys; raises InputError if some are missing."""
    rows = np.argsort(keys)
    zero = found[rows[0]]
    if keys[rows[0]] != 0 or zero["flag"] == 0 or zero["image"] > 0:
        return rows
    rows = rows[1:]  # keys are unique and not negative
    end = _end_of_images(path, keys, found, rows, float(zero["identity"]))
    rows = rows[keys[rows] < end]
    if len(rows) != end - 1:
        raise InputError(
            f"{path}: {len(rows):,} of the {end - 1:,} images of its header record are there: "
            f"get the file again, with its {INDEX}."
        )
    return rows


def _end_of_images(path: Path, keys: np.ndarray, found: np.ndarray, rows: np.ndarray, stored: float) -> int:
    """Returns the first key after the images; `rows` are all records but the header record, sorted by key.

    `stored` is that key as float32 in the header record. Up to EXACT it is exact; above, several keys round to it.
    Among the records of these keys the images come first, and the identities follow without a gap.
    """
    if not (1 < stored < 1 << 62 and stored.is_integer()):
        raise InputError(f"{path}: its header record says that images end at key {stored:g}: get the file again.")
    lowest, highest = _integers_rounded_to(stored)
    if lowest == highest or lowest > len(rows) + 1:  # in the second case the caller reports the missing images
        return lowest
    near = rows[slice(*np.searchsorted(keys[rows], (lowest, highest + 1)))]
    keys, found = keys[near], found[near]
    is_image = (found["image"] > 0) | (found["flag"] == 0)
    # The labels of an identity are its first key and the key after its last, so the second is not smaller. An image
    # without content is mistaken for an identity only if its group is not smaller than its identity.
    is_identity = ~is_image & (found["identity"] >= 1) & (found["identity"] <= found["group"])
    end = int(keys[is_image].max(initial=lowest - 1)) + 1
    if not (is_image | is_identity).all() or keys[is_identity].min(initial=highest + 1) != end or end > highest:
        raise InputError(
            f"{path}: its header record says that images end at a key from {lowest:,} to {highest:,}, and the records "
            f"of these keys do not tell which: get the file again, with its {INDEX}."
        )
    return end


def _integers_rounded_to(stored: float) -> tuple[int, int]:
    """Returns the lowest and the highest integer that round to `stored` as LABEL; `stored` is an integer itself."""
    below, above = (int(np.nextafter(LABEL(stored), LABEL(to))) for to in (-np.inf, np.inf))
    lowest, highest = (int(stored) + below + 1) // 2, (int(stored) + above) // 2
    # A tie is rounded to even, so that either bound may belong to the neighbour.
    return lowest + (LABEL(lowest) != stored), highest - (LABEL(highest) != stored)


def _refuse_labels(path: Path, keys: np.ndarray, labels: np.ndarray, name: str) -> None:
    with np.errstate(invalid="ignore"):  # a NaN among the labels is refused below
        bad = ~((labels >= 0) & (labels < EXACT) & (labels == np.floor(labels)))
    if bad.any():
        row = np.argmax(bad)
        raise InputError(
            f"{path}: key {keys[row]} has {labels[row]:g} for its {name}: "
            f"label images with whole numbers from 0 to {EXACT - 1:,}."
        )


# Write ----------------------------------------------------------------------------------------------------------------


def write_records(folder: Path, images: Iterable[tuple[bytes, int, int]], num_classes: int) -> None:
    """Writes (encoded image, identity, group or -1), sorted by identity, in insightface's layout.

    Images have the keys 1, 2, ... Every identity below `num_classes` gets a record, even without an image.

    Raises InputError if images are not sorted or cannot be represented, or the disk is full. The files in the folder
    are then unchanged.
    """
    with (
        replaced(folder / INDEX) as index,
        replaced(folder / PROPERTY) as properties,
        replaced(folder / RECORDS) as records,
    ):
        with open(records, "wb") as file, open(index, "w", newline="\n") as lines:
            _write(_checked(folder / RECORDS, images, num_classes), num_classes, file, lines)
        properties.write_text(f"{num_classes},112,112\n", newline="\n")
        # The files are renamed one after the other: a kill in between may leave no index, but never an outdated one.
        (folder / INDEX).unlink(missing_ok=True)


def _checked(
    path: Path, images: Iterable[tuple[bytes, int, int]], num_classes: int
) -> Iterator[tuple[bytes, int, int]]:
    """Passes the images through; raises InputError at the first that cannot be written."""
    previous, count = 0, 0
    for count, (image, identity, group) in enumerate(images, 1):
        reason = ""
        if not 0 <= identity < num_classes:
            reason = f"is of identity {identity} of {num_classes:,}: number identities from 0"
        elif identity < previous:
            reason = f"is of identity {identity} after one of {previous}: sort images by identity"
        elif not -1 <= group < EXACT:
            reason = f"is of group {group}: number groups from 0, or give -1 for none"
        elif len(image) > LONGEST - HEAD_AND_LABELS:
            reason = f"has {len(image):,} bytes: a record holds no more than {LONGEST:,}"
        elif 1 + count + num_classes > EXACT:
            reason = f"is one too many with {num_classes:,} identities: their records must be fewer than {EXACT:,}"
        if reason:
            raise InputError(f"{path}: image {count:,} {reason}.")
        previous = identity
        yield image, identity, group
    if not count:
        raise InputError(f"{path}: there is no image to be written.")


def _write(images: Iterable[tuple[bytes, int, int]], num_classes: int, file: BinaryIO, lines: TextIO) -> None:
    def add(key: int, labels: tuple[int, ...], image: bytes = b"") -> None:
        lines.write(f"{key}\t{file.tell()}\n")
        file.write(_record(key, labels, image))

    add(0, (0, 0))
    identities = array("q")
    for key, (image, identity, group) in enumerate(images, 1):
        add(key, (identity,) if group == -1 else (identity, group), image)
        identities.append(identity)
    end = 1 + len(identities)
    bounds = 1 + np.searchsorted(identities, np.arange(num_classes + 1))
    for identity in range(num_classes):
        add(end + identity, (bounds[identity], bounds[identity + 1]))
    file.seek(0)
    file.write(_record(0, (end, end + num_classes), b""))


def _record(key: int, labels: tuple[int, ...], image: bytes) -> bytes:
    """Encodes a record as the bytes of the file; a single label goes into the head, several become a vector."""
    flag, first, vector = (0, labels[0], ()) if len(labels) == 1 else (len(labels), 0, labels)
    content = HEAD.pack(flag, first, key, 0) + struct.pack(f"<{len(vector)}f", *vector) + image
    cuts = [match.start() for match in re.finditer(re.escape(MAGIC_BYTES), content) if match.start() % 4 == 0]
    begins, ends = [0, *(cut + len(MAGIC_BYTES) for cut in cuts)], [*cuts, len(content)]
    kinds = [FIRST, *[MIDDLE] * (len(cuts) - 1), LAST] if cuts else [WHOLE]
    return b"".join(
        PART.pack(MAGIC, kind << LENGTH_BITS | end - begin) + content[begin:end] + bytes(-(end - begin) % 4)
        for kind, begin, end in zip(kinds, begins, ends, strict=True)
    )
