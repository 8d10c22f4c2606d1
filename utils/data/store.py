"""Image store: every image of a data folder decoded once, in the order of its index."""

import contextlib
import hashlib
import mmap
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from config.config import Config
from utils.data import images
from utils.data.index import Index, find_images
from utils.data.recordio import RECORDS, image_of
from utils.distributed.world import first_of_machine_before, is_first
from utils.errors import Damaged, InputError
from utils.storage.arrays import Filling, about, provide
from utils.storage.files import printable, write_text
from utils.threads import map_ahead

SIZE = 112  # pixels, height and width of every image
MAX_BAD_SHARE = 0.001
BLOCK = 256  # images that are decoded and checked together: the digest of a data folder depends on it


def decode(content: bytes) -> np.ndarray:
    """RGB image (112, 112, 3) uint8 from an encoded one; raises ValueError with the reason where that cannot be."""
    image = images.decode(content, upright=False)
    if image.shape[:2] != (SIZE, SIZE):
        raise ValueError(f"is {image.shape[1]} x {image.shape[0]}, not {SIZE} x {SIZE}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)  # a tenth of the time of a view that NumPy copies


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
        path = folder / "images.npy"
        with first_of_machine_before() as is_one:  # one lists, decodes and checks for all
            self.index = find_images(cfg, _bad_images(path))  # they may have been mended
            form, made_from = ((len(self.index.paths), SIZE, SIZE, 3), np.uint8), {"files": self.index.digest}

            def fill() -> None:
                _make_room(path, made_from)
                _decode_all(self.index, data, Filling(path, *form, made_from, BLOCK, {"opencv": cv2.__version__}))

            self.images = provide(path, *form, made_from, fill, checked and is_one)
        blocks = about(path)["blocks"]
        self.digest = hashlib.sha256("".join(block["content"] for block in blocks).encode()).hexdigest()
        bad = _bad_of(blocks)
        self.usable = np.ones(len(self.index.paths), bool)
        self.usable[list(bad)] = False
        _report(bad, len(self.usable), data, folder, cfg.skip_bad_images, is_one)


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
        sizes = f"{printed_bytes(free)} free of {printed_bytes(needed)}"
        raise InputError(f"{folder} has only {sizes}: set cache to a larger disk.")

    def decode_block(block: int) -> tuple[str, str, list[tuple[int, str]]]:
        """SHA-256 of the rows and of the files that they come from, and what cannot be used of them."""
        content, bad, rows = hashlib.sha256(), [], filling.rows(block)
        decoded = np.empty((len(rows), SIZE, SIZE, 3), np.uint8)
        for out, row in zip(decoded, rows, strict=True):
            digest, reason = _decode_into(out, row, index, data, read)
            content.update(os.fsencode(index.paths[row]) + b"\0" + digest)
            bad += [(row, reason)] if reason else []
        return filling.write(block, decoded), content.hexdigest(), bad

    with _reader(index, data) as read, filling, _chatter_silenced(), ThreadPoolExecutor() as pool:
        left = sum(len(filling.rows(block)) for block in filling.missing)
        which = f"{left:,}" if left == count else f"{left:,} of {count:,}"
        source, room = data / RECORDS if index.in_records else data, f"{printed_bytes(free)} free"
        print(f"Decoding {which} images of {source} once: {printed_bytes(needed)} in {folder} ({room}).", flush=True)
        with tqdm(desc="decode", total=count, initial=count - left, unit=" images", disable=None) as bar:
            results = map_ahead(pool, decode_block, filling.missing, 2 * (os.cpu_count() or 1))
            for block, (digest, content, bad) in zip(filling.missing, results, strict=True):
                filling.finish(block, digest, content=content, bad=bad)
                bar.update(len(filling.rows(block)))


def _report(bad: dict[int, str], count: int, data: Path, folder: Path, skip: bool, is_one: bool) -> None:
    """Says which images cannot be used; of several processes `is_one` of each machine writes the list."""
    if not bad:
        return
    listing = folder / "bad_images.txt"
    reasons = [*map(printable, bad.values())]
    text = "".join(f"{reason}\n" for reason in reasons)
    known = is_one and listing.exists() and listing.read_text(encoding="utf-8") == text
    if is_one and not known:  # the cache may be a read-only one
        write_text(listing, text)
    shown = [f"\n  {reason}" for reason in reasons[:20]] + ["\n  ..."] * (len(bad) > 20)
    text = f"{len(bad):,} of {count:,} images of {data} cannot be used (all listed in {listing}):{''.join(shown)}"
    if not skip:
        raise InputError(f"{text}\nMend or remove them, or set skip_bad_images to train without them.")
    if len(bad) > MAX_BAD_SHARE * count:
        raise InputError(f"{text}\nThat is more than {MAX_BAD_SHARE:.1%}, which is too many to be skipped.")
    if is_first():
        print(text, file=sys.stderr)


@contextlib.contextmanager
def _reader(index: Index, data: Path) -> Iterator[Callable[[int], bytes]]:
    """The function that reads a row's encoded image; may be called in any thread."""
    if not index.in_records:
        folder = os.fspath(data)
        yield lambda row: images.read_bytes(f"{folder}/{index.paths[row]}")
        return
    with open(data / RECORDS, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        yield lambda row: image_of(mapped[index.stamps[row, 0] : index.stamps[row].sum()])


def _decode_into(out: np.ndarray, row: int, index: Index, data: Path, read: Callable) -> tuple[bytes, str]:
    """Decodes a row's image; gives the digest of its file and, where it cannot be used, what is wrong with it."""
    try:
        content = read(row)
        out[:] = decode(content)
    except (OSError, ValueError) as error:
        out[:] = 0
        path = f"{data / RECORDS}: {index.paths[row]}" if index.in_records else data / index.paths[row]
        return b"", f"{path} {images.reason_of(error)}"
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


def printed_bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
