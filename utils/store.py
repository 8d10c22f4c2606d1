"""Image store: an index with labels that do not depend on the file system, and every image decoded once."""

import contextlib
import hashlib
import os
import shutil
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from config.config import Config
from utils.errors import InputError
from utils.files import locked, new_array, remove_leftovers, replaced, write_text

SIZE = 112  # pixels, height and width of every image
EXTENSIONS = (".jpg", ".jpeg", ".png")
MAX_BAD_SHARE = 0.001


@dataclass(frozen=True)
class Index:
    """All images in a fixed order: sorted by group, identity and file name."""

    identities: tuple[str, ...]  # "<group>/<identity>", sorted
    paths: tuple[str, ...]  # "<group>/<identity>/<image>", sorted within an identity
    identity: np.ndarray  # (N,) int64: which identity an image shows
    stamps: np.ndarray  # (N, 2) int64: size in bytes and time of change in nanoseconds

    def identities_of(self, group: str) -> list[str]:
        return [name for name in self.identities if name.startswith(f"{group}/")]


def scan(data: Path, ethnicities: Iterable[str]) -> Index:
    """Lists <data>/<ethnicity>/<identity>/<image>; opens no image.

    Raises InputError for a missing folder, an empty group and a name that two groups give to an identity.
    """
    if not data.is_dir():
        raise InputError(f"There is no folder {data}: set data to the folder that holds one folder per ethnicity.")
    try:
        return _scan(data, sorted(ethnicities))
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}).") from error


def _scan(data: Path, groups: list[str]) -> Index:
    missing = [name for name in groups if not (data / name).is_dir()]
    if missing:
        raise InputError(f"{data} has no folder for {', '.join(missing)}: set data or ethnicities.")

    folders = [(group, name) for group in groups for name in _folders(data / group)]
    with ThreadPoolExecutor() as pool:
        listed = list(pool.map(lambda folder: _images(data.joinpath(*folder)), folders))
    filled = [(folder, files) for folder, files in zip(folders, listed, strict=True) if files]

    empty = [group for group in groups if group not in {folder[0] for folder, _ in filled}]
    if empty:
        raise InputError(f"{data / empty[0]} holds no image: expected {empty[0]}/<identity>/<image>.jpg or .png.")
    seen: dict[str, str] = {}
    for (group, name), _ in filled:
        if name in seen:
            raise InputError(
                f"Identity {name} is in both {seen[name]} and {group}: give the two different names, or remove one."
            )
        seen[name] = group
    return Index(
        tuple(f"{group}/{name}" for (group, name), _ in filled),
        tuple(f"{group}/{name}/{file}" for (group, name), files in filled for file, _, _ in files),
        np.repeat(np.arange(len(filled)), [len(files) for _, files in filled]),
        np.array([stamp for _, files in filled for _, *stamp in files], np.int64),
    )


def _folders(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _images(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of every image, sorted by name."""
    found = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.lower().endswith(EXTENSIONS):
                try:
                    stat = entry.stat()
                    found.append((entry.name, stat.st_size, stat.st_mtime_ns))
                except FileNotFoundError:  # a link that leads nowhere: listed with the bad images
                    found.append((entry.name, -1, -1))
    return sorted(found)


def decode(content: bytes) -> np.ndarray:
    """RGB image (112, 112, 3) uint8 from an encoded one; raises ValueError with the reason where that cannot be."""
    if not content:
        raise ValueError("is empty")
    # OpenCV may fill what is missing of a truncated file with grey, and only log it.
    for kind, start, end in (("JPEG", b"\xff\xd8", b"\xff\xd9"), ("PNG", b"\x89PNG", b"IEND")):
        if content.startswith(start) and end not in content[-1024:]:
            raise ValueError(f"is a truncated {kind}")
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # an impossible size in the header, say
        image = None
    if image is None:
        raise ValueError("is no readable image")
    if image.shape[:2] != (SIZE, SIZE):
        raise ValueError(f"is {image.shape[1]} x {image.shape[0]}, not {SIZE} x {SIZE}")
    return image[..., ::-1]


class ImageStore:
    """Index and decoded images of a data folder, made once and used by every stage.

    The folder `cfg.cache_dir` holds `images.npy` (N, 112, 112, 3) uint8 in index order and `index.npz`. It is trusted
    as long as names, sizes and times of change of all files are those of the data folder, and else made anew. Images
    that cannot be used are refused, or with `cfg.skip_bad_images` keep an empty row that is in no training set.
    """

    index: Index
    images: np.ndarray  # (N, 112, 112, 3) uint8, mapped
    usable: np.ndarray  # (N,) bool
    digest: str  # of the paths and contents of all files, in order

    def __init__(self, cfg: Config):
        data, folder = Path(cfg.data), cfg.cache_dir
        self.index = scan(data, cfg.ethnicities)
        with locked(folder):  # teachers may be trained side by side, each in its own process
            self.digest, bad = _load_store(folder, self.index) or _make_store(folder, self.index, data)
            self.images = np.load(folder / "images.npy", mmap_mode="r")
        self.usable = np.ones(len(self.index.paths), bool)
        self.usable[list(bad)] = False
        _report(bad, len(self.usable), data, folder, cfg.skip_bad_images)


def _load_store(folder: Path, index: Index) -> tuple[str, dict[int, str]] | None:
    """Digest and unusable images (row -> reason) of the store in `folder`, or None where it is not that of `index`."""
    try:
        shape = np.load(folder / "images.npy", mmap_mode="r").shape
        with open(folder / "index.npz", "rb") as file, np.load(file, allow_pickle=False) as stored:
            same = (
                shape == (len(index.paths), SIZE, SIZE, 3)
                and np.array_equal(stored["paths"], _pack(index.paths))
                and np.array_equal(stored["stamps"], index.stamps)
            )
            bad = zip(stored["bad_rows"].tolist(), _unpack(stored["bad_reasons"]), strict=False)
            return (str(stored["digest"]), dict(bad)) if same else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _make_store(folder: Path, index: Index, data: Path) -> tuple[str, dict[int, str]]:
    count = len(index.paths)
    for stale in ("index.npz", "images.npy"):  # before the space on the disk is measured
        (folder / stale).unlink(missing_ok=True)
    remove_leftovers(folder / "images.npy")
    needed, free = count * SIZE * SIZE * 3, shutil.disk_usage(folder).free
    print(f"Decoding {count:,} images of {data} once: {_size(needed)} in {folder} ({_size(free)} free).", flush=True)
    if needed > free:
        raise InputError(f"{folder} has only {_size(free)} free of {_size(needed)}: set cache to a larger disk.")

    with replaced(folder / "images.npy") as partial:
        images = new_array(partial, (count, SIZE, SIZE, 3), np.uint8)
        with _chatter_silenced(), ThreadPoolExecutor() as pool:
            results = map_ahead(
                pool, lambda row: _decode_file(data / index.paths[row], images[row]), range(count), 1024
            )
            digests = list(tqdm(results, "decode", count, unit=" images", disable=None, smoothing=0))
        images.flush()

    content = hashlib.sha256()
    for path, (digest, _) in zip(index.paths, digests, strict=True):
        content.update(os.fsencode(path) + b"\0" + digest)
    bad = {row: reason for row, (_, reason) in enumerate(digests) if reason}
    with replaced(folder / "index.npz") as partial, open(partial, "wb") as file:
        np.savez(
            file,
            paths=_pack(index.paths),
            stamps=index.stamps,
            bad_rows=np.array(list(bad), np.int64),
            bad_reasons=_pack(bad.values()),
            digest=content.hexdigest(),
        )
    return content.hexdigest(), bad


def _pack(texts: Iterable[str]) -> np.ndarray:
    """Any number of names as one array of bytes; names of files need not be text."""
    return np.frombuffer(b"\0".join(map(os.fsencode, texts)), np.uint8)


def _unpack(packed: np.ndarray) -> list[str]:
    return [os.fsdecode(text) for text in packed.tobytes().split(b"\0")]


def _report(bad: dict[int, str], count: int, data: Path, folder: Path, skip: bool) -> None:
    if not bad:
        return
    listing = folder / "bad_images.txt"
    printable = [os.fsencode(reason).decode(errors="replace") for reason in bad.values()]
    write_text(listing, "".join(f"{reason}\n" for reason in printable))
    shown = [f"\n  {reason}" for reason in printable[:20]] + ["\n  ..."] * (len(bad) > 20)
    text = f"{len(bad):,} of {count:,} images of {data} cannot be used (all listed in {listing}):{''.join(shown)}"
    if not skip:
        raise InputError(f"{text}\nMend or remove them, or set skip_bad_images to train without them.")
    if len(bad) > MAX_BAD_SHARE * count:
        raise InputError(f"{text}\nThat is more than {MAX_BAD_SHARE:.1%}, which is too many to be skipped.")
    print(text, file=sys.stderr)


def _decode_file(path: Path, out: np.ndarray) -> tuple[bytes, str]:
    """Decodes into `out`; gives the digest of the file and, where it cannot be used, what is wrong with it."""
    try:
        content = path.read_bytes()
        out[:] = decode(content)
    except OSError as error:
        return b"", f"{path} cannot be read ({error.strerror})"
    except ValueError as error:
        return b"", f"{path} {error}"
    return hashlib.sha256(content).digest()[:16], ""


def map_ahead(pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """`pool.map` that runs no more than `ahead` results ahead of the consumer."""
    pending: deque = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextlib.contextmanager
def _chatter_silenced() -> Iterator[None]:
    """Keeps OpenCV from logging about files that are reported here by name."""
    logging = getattr(cv2.utils, "logging", cv2)  # OpenCV 5 and 4
    level = logging.getLogLevel()
    logging.setLogLevel(0)
    try:
        yield
    finally:
        logging.setLogLevel(level)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
