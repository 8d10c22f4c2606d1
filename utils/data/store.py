"""Decodes every image of a data folder once into one memory-mapped array, in the order of its index."""

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
OF_ANOTHER_SIZE = f"not {SIZE} x {SIZE}"  # the end of the reason why an image cannot be used
ALIGN = f"Align the faces to {SIZE} x {SIZE} first: python -m utils.prepare align --help"
MAX_BAD_SHARE = 0.001
BLOCK = 256  # images decoded and verified together; changing it changes the digest of every data folder


def decode(content: bytes) -> np.ndarray:
    """Decodes an image file to RGB (112, 112, 3) uint8; raises ValueError, with the reason, if that is impossible."""
    image = images.decode(content, upright=False)
    if image.shape[:2] != (SIZE, SIZE):
        raise ValueError(f"is {image.shape[1]} x {image.shape[0]}, {OF_ANOTHER_SIZE}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)  # ten times as fast as copying the reversed view with NumPy


class ImageStore:
    """Holds index and decoded images of a data folder; made once, then read from `cfg.cache_dir` by every stage.

    The cache holds `images.npy` (N, 112, 112, 3) uint8 in index order, and `index.npz`. It is valid as long as
    `find_images` notices no change in the data folder. With `checked` the content of `images.npy` is verified against
    the digests written with it, and corrupted blocks are decoded again. Raises InputError if images cannot be used;
    with `cfg.skip_bad_images` their rows stay black instead, and belong to no training set.
    """

    index: Index
    images: np.ndarray  # (N, 112, 112, 3) uint8, memory-mapped
    usable: np.ndarray  # (N,) bool
    digest: str  # SHA-256 over the paths and contents of all files, in index order

    def __init__(self, cfg: Config, checked: bool = True):
        data, folder = Path(cfg.data), cfg.cache_dir
        path = folder / "images.npy"
        # Local rank 0 lists, decodes and verifies; the other ranks of the machine then read.
        with first_of_machine_before() as is_local_rank_0:
            self.index = find_images(cfg, _bad_images(path))  # bad images may have been repaired
            form, made_from = ((len(self.index.paths), SIZE, SIZE, 3), np.uint8), {"files": self.index.digest}

            def fill() -> None:
                _delete_outdated(path, made_from)
                _decode_all(self.index, data, Filling(path, *form, made_from, BLOCK, {"opencv": cv2.__version__}))

            for note in self.index.notes(data) if is_first() else []:
                print(note)
            self.images = provide(path, *form, made_from, fill, checked and is_local_rank_0)
        blocks = about(path)["blocks"]
        self.digest = hashlib.sha256("".join(block["content"] for block in blocks).encode()).hexdigest()
        bad = _bad_of(blocks)
        self.usable = np.ones(len(self.index.paths), bool)
        self.usable[list(bad)] = False
        _report(bad, len(self.usable), data, folder, cfg.skip_bad_images, is_local_rank_0)


def _bad_images(path: Path) -> dict[int, str]:
    """Returns the rows of images that could not be used when they were decoded, with the reasons."""
    with contextlib.suppress(Damaged):
        if found := about(path):
            return _bad_of(found["blocks"])
    return {}


def _bad_of(blocks: list[dict]) -> dict[int, str]:
    return {row: reason for block in blocks for row, reason in block["bad"]}


def _delete_outdated(path: Path, made_from: dict) -> None:
    """Deletes decoded images of an earlier state of the data folder, to free disk space before decoding."""
    with contextlib.suppress(Damaged):
        found = about(path)
        if found and found["made from"] != made_from:
            path.unlink()


def _decode_all(index: Index, data: Path, filling: Filling) -> None:
    """Decodes the images of all missing blocks. Raises InputError if the disk is too small."""
    folder = filling.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    count = len(index.paths)
    needed, free = count * SIZE * SIZE * 3, shutil.disk_usage(folder).free
    existing = sum(path.stat().st_size for path in folder.glob("images.npy*"))
    if needed > free + existing:
        sizes = f"{printed_bytes(free)} free of {printed_bytes(needed)}"
        raise InputError(f"{folder} has only {sizes}: set cache to a larger disk.")

    def decode_block(block: int) -> tuple[str, str, list[tuple[int, str]]]:
        """Decodes a block; returns the SHA-256 of its rows, that of its files, and (row, reason) of unusable images."""
        content, bad, rows = hashlib.sha256(), [], filling.rows(block)
        decoded = np.empty((len(rows), SIZE, SIZE, 3), np.uint8)
        for out, row in zip(decoded, rows, strict=True):
            digest, reason = _decode_into(out, row, index, data, read)
            content.update(os.fsencode(index.paths[row]) + b"\0" + digest)
            bad += [(row, reason)] if reason else []
        return filling.write(block, decoded), content.hexdigest(), bad

    with _reader(index, data) as read, filling, _opencv_logging_off(), ThreadPoolExecutor() as pool:
        left = sum(len(filling.rows(block)) for block in filling.missing)
        which = f"{left:,}" if left == count else f"{left:,} of {count:,}"
        source, space = data / RECORDS if index.in_records else data, f"{printed_bytes(free)} free"
        print(f"Decoding {which} images of {source} once: {printed_bytes(needed)} in {folder} ({space}).", flush=True)
        with tqdm(desc="decode", total=count, initial=count - left, unit=" images", disable=None) as bar:
            results = map_ahead(pool, decode_block, filling.missing, 2 * (os.cpu_count() or 1))
            for block, (digest, content, bad) in zip(filling.missing, results, strict=True):
                filling.finish(block, digest, content=content, bad=bad)
                bar.update(len(filling.rows(block)))


def _report(bad: dict[int, str], count: int, data: Path, folder: Path, skip: bool, is_local_rank_0: bool) -> None:
    """Lists unusable images in bad_images.txt (local rank 0 only). Raises InputError unless they are skipped."""
    if not bad:
        return
    listing = folder / "bad_images.txt"
    reasons = [*map(printable, bad.values())]
    text = "".join(f"{reason}\n" for reason in reasons)
    known = is_local_rank_0 and listing.exists() and listing.read_text(encoding="utf-8") == text
    if is_local_rank_0 and not known:  # the cache may be read-only: do not write the same list again
        write_text(listing, text)
    shown = [f"\n  {reason}" for reason in reasons[:20]] + ["\n  ..."] * (len(bad) > 20)
    text = f"{len(bad):,} of {count:,} images of {data} cannot be used (all listed in {listing}):{''.join(shown)}"
    are_few = len(bad) <= MAX_BAD_SHARE * count
    if not skip or not are_few:
        raise InputError(f"{text}\n{_advice(reasons, count, skip, are_few)}")
    if is_first():
        print(text, file=sys.stderr)


def _advice(reasons: list[str], count: int, skip: bool, are_few: bool) -> str:
    """Tells the user what to do about unusable images, by their reasons."""
    of_another_size = [reason for reason in reasons if reason.endswith(OF_ANOTHER_SIZE)]
    sizes = {reason.removesuffix(f", {OF_ANOTHER_SIZE}").rsplit(" is ", 1)[1] for reason in of_another_size}
    text = f"That is more than {MAX_BAD_SHARE:.1%}, which is too many to be skipped. " * skip
    if len(of_another_size) == count and len(sizes) == 1:
        return f"{text}All images are {sizes.pop()}: crops of another kind, or not aligned. {ALIGN}"
    if of_another_size:
        rest = "Repair or remove the others. " * (len(of_another_size) < len(reasons))
        return f"{text}{rest}{len(of_another_size):,} of them are of another size. {ALIGN}"
    return f"{text}Repair or remove them{', or set skip_bad_images to train without them' * (are_few and not skip)}."


@contextlib.contextmanager
def _reader(index: Index, data: Path) -> Iterator[Callable[[int], bytes]]:
    """Yields a function that reads the encoded image of a row; it is thread-safe."""
    if not index.in_records:
        folder = os.fspath(data)
        yield lambda row: images.read_bytes(f"{folder}/{index.paths[row]}")
        return
    with open(data / RECORDS, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        yield lambda row: image_of(mapped[index.stamps[row, 0] : index.stamps[row].sum()])


def _decode_into(out: np.ndarray, row: int, index: Index, data: Path, read: Callable) -> tuple[bytes, str]:
    """Decodes the image of `row` into `out`; returns the digest of its file, and the reason if it cannot be used."""
    try:
        content = read(row)
        out[:] = decode(content)
    except (OSError, ValueError) as error:
        out[:] = 0
        path = f"{data / RECORDS}: {index.paths[row]}" if index.in_records else data / index.paths[row]
        return b"", f"{path} {images.reason_of(error)}"
    return hashlib.sha256(content).digest()[:16], ""


@contextlib.contextmanager
def _opencv_logging_off() -> Iterator[None]:
    """Turns OpenCV's logging off: unusable files are reported by name here."""
    logging = getattr(cv2.utils, "logging", cv2)  # OpenCV 5 and 4
    level = logging.getLogLevel()
    logging.setLogLevel(0)
    try:
        yield
    finally:
        logging.setLogLevel(level)


def printed_bytes(count: float) -> str:
    """Formats a number of bytes as GB or MB, with one decimal."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
