"""Image store: an index with labels that do not depend on the file system, and every image decoded once."""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from config.config import Config
from utils.arrays import Filling, about, provide
from utils.errors import Damaged, InputError
from utils.files import check_seal, replaced, seal, write_text
from utils.threads import map_ahead

SIZE = 112  # pixels, height and width of every image
EXTENSIONS = (".jpg", ".jpeg", ".png")
MAX_BAD_SHARE = 0.001
BLOCK = 256  # images that are decoded and checked together: the digest of a data folder depends on it


@dataclass(frozen=True)
class Index:
    """All images in a fixed order: sorted by group, identity and file name."""

    identities: tuple[str, ...]  # "<group>/<identity>", sorted
    paths: tuple[str, ...]  # "<group>/<identity>/<image>", sorted within an identity
    identity: np.ndarray  # (N,) int64: which identity an image shows
    stamps: np.ndarray  # (N, 2) int64: size in bytes and time of change in nanoseconds
    folders: tuple[str, ...]  # all that were listed: groups and identities, also those without an image
    changed: np.ndarray  # (folders,) int64: when the list of their files last changed, in nanoseconds
    digest: str  # of names, sizes and times of change of all files

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

    changed = [_changed(data / group) for group in groups]  # before they are listed
    folders = [f"{group}/{name}" for group in groups for name in _folders(data / group)]
    with ThreadPoolExecutor() as pool:
        listed = list(pool.map(lambda folder: _images(data / folder), folders))
    changed += [when for when, _ in listed]
    files = [(folder, images) for folder, (_, images) in zip(folders, listed, strict=True) if images]

    empty = sorted(set(groups) - {folder.split("/")[0] for folder, _ in files})
    if empty:
        raise InputError(f"{data / empty[0]} holds no image: expected {empty[0]}/<identity>/<image>.jpg or .png.")
    seen: dict[str, str] = {}
    for folder, _ in files:
        group, name = folder.split("/")
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
        (*groups, *folders),
        np.array(changed, np.int64),
        hashlib.sha256(_packed(paths) + stamps.astype("<i8").tobytes()).hexdigest(),
    )


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
    fields = {name: _as_array(value) for name, value in vars(index).items()}
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
    if fields.keys() != {field.name for field in dataclasses.fields(Index)}:  # of another version
        return None
    texts = {name: _unpacked(fields[name]) for name in ("identities", "paths", "folders")}
    index = Index(**{**fields, **texts, "digest": str(fields["digest"])})
    spread = np.linspace(0, len(index.paths) - 1, LOOKED_AT).astype(int)
    looked_at = np.unique([*spread, *(row for row in suspects if row < len(index.paths))])
    try:
        same = index.folders[: len(ethnicities)] == tuple(sorted(ethnicities))
        same = same and index.changed.tolist() == [_changed(data / folder) for folder in index.folders]
        same = same and index.stamps[looked_at].tolist() == [_stamp(data / index.paths[row]) for row in looked_at]
    except OSError:
        return None
    return index if same else None


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

    The folder `cfg.cache_dir` holds `images.npy` (N, 112, 112, 3) uint8 in index order, and `index.npz`. The images are
    trusted as long as the data folder is the one that they were decoded from, as far as `find_images` can tell; with
    `checked` their content is compared with what was written, and decoded again where it is another. Images that cannot
    be used are refused, or with `cfg.skip_bad_images` keep an empty row that is in no training set.
    """

    index: Index
    images: np.ndarray  # (N, 112, 112, 3) uint8, mapped
    usable: np.ndarray  # (N,) bool
    digest: str  # of the paths and contents of all files, in order

    def __init__(self, cfg: Config, checked: bool = True):
        data, folder = Path(cfg.data), cfg.cache_dir
        self.index = find_images(cfg, _bad_images(folder / "images.npy"))  # they may have been mended
        path, form = folder / "images.npy", ((len(self.index.paths), SIZE, SIZE, 3), np.uint8)
        made_from = {"files": self.index.digest}

        def fill() -> None:
            _make_room(path, made_from)
            _decode_all(self.index, data, Filling(path, *form, made_from, BLOCK, {"opencv": cv2.__version__}))

        self.images = provide(path, *form, made_from, fill, checked)
        blocks = about(path)["blocks"]
        self.digest = hashlib.sha256("".join(block["content"] for block in blocks).encode()).hexdigest()
        bad = _bad_of(blocks)
        self.usable = np.ones(len(self.index.paths), bool)
        self.usable[list(bad)] = False
        _report(bad, len(self.usable), data, folder, cfg.skip_bad_images)


def _bad_images(path: Path) -> dict[int, str]:
    """Rows of images that could not be used when they were decoded, and why."""
    with contextlib.suppress(Damaged):
        if found := about(path):
            return _bad_of(found["blocks"])
    return {}


def _bad_of(blocks: list[dict]) -> dict[int, str]:
    return {row: reason for block in blocks for row, reason in block["bad"]}


def _make_room(path: Path, made_from: dict) -> None:
    """Deletes images of other files before those of these files are decoded."""
    with contextlib.suppress(Damaged):
        found = about(path)
        if found and found["made from"] != made_from:
            path.unlink()


def _decode_all(index: Index, data: Path, filling: Filling) -> None:
    """Decodes the images of all blocks that are missing."""
    folder = filling.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    count = len(index.paths)
    needed, free = count * SIZE * SIZE * 3, shutil.disk_usage(folder).free
    there = sum(path.stat().st_size for path in folder.glob("images.npy*"))
    if needed > free + there:
        raise InputError(f"{folder} has only {_size(free)} free of {_size(needed)}: set cache to a larger disk.")

    def decode_block(block: int) -> tuple[str, str, list[tuple[int, str]]]:
        """SHA-256 of the rows and of the files that they come from, and what cannot be used of them."""
        content, bad = hashlib.sha256(), []
        for row in filling.rows(block):
            digest, reason = _decode_file(data / index.paths[row], filling.array[row])
            content.update(os.fsencode(index.paths[row]) + b"\0" + digest)
            bad += [(row, reason)] if reason else []
        return filling.digest(block), content.hexdigest(), bad

    with filling, _chatter_silenced(), ThreadPoolExecutor() as pool:
        left = sum(len(filling.rows(block)) for block in filling.missing)
        which = f"{left:,}" if left == count else f"{left:,} of {count:,}"
        print(f"Decoding {which} images of {data} once: {_size(needed)} in {folder} ({_size(free)} free).", flush=True)
        with tqdm(desc="decode", total=count, initial=count - left, unit=" images", disable=None) as bar:
            results = map_ahead(pool, decode_block, filling.missing, 2 * (os.cpu_count() or 1))
            for block, (digest, content, bad) in zip(filling.missing, results, strict=True):
                filling.finish(block, digest, content=content, bad=bad)
                bar.update(len(filling.rows(block)))


def _report(bad: dict[int, str], count: int, data: Path, folder: Path, skip: bool) -> None:
    if not bad:
        return
    listing = folder / "bad_images.txt"
    printable = [os.fsencode(reason).decode(errors="replace") for reason in bad.values()]
    text = "".join(f"{reason}\n" for reason in printable)
    if not listing.exists() or listing.read_text(encoding="utf-8") != text:  # the cache may be a read-only one
        write_text(listing, text)
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
    except (OSError, ValueError) as error:
        out[:] = 0
        return b"", f"{path} cannot be read ({error.strerror})" if isinstance(error, OSError) else f"{path} {error}"
    return hashlib.sha256(content).digest()[:16], ""


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
