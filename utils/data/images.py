"""Images of any origin: found in a tree of folders, and decoded from whatever a file holds."""

import functools
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from utils.data.image_formats import PNG, WEBP, WEBP_MOVES, size_of, still_png, still_webp
from utils.memory import keep_freed_memory

READABLE = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
OTHERS = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".tif", ".tiff")
"""Names of images that are not read: they are found all the same, so that they can be reported."""

MOST_PIXELS = 100_000_000
LONGEST_SIDE = 32_766  # pixels: OpenCV 4 cannot warp larger images
MOST_BYTES = 8 * MOST_PIXELS  # no readable image of so many pixels is larger: 16 bits of four channels


# Find -----------------------------------------------------------------------------------------------------------------


def find(folder: Path) -> tuple[list[str], Counter]:
    """Paths below `folder`, with slashes and sorted, of all files with an image's name; a count of other endings.

    Links are followed, but not in a circle; one that leads nowhere counts as a file. Raises OSError for a folder that
    cannot be listed.
    """
    paths, others = [], Counter()
    for path in _files(folder, "", ()):
        ending = os.path.splitext(path)[1].lower()
        if ending in READABLE or ending in OTHERS:
            paths.append(path)
        else:
            others[ending] += 1
    return sorted(paths), others


def _files(folder: Path, below: str, above: tuple) -> Iterator[str]:
    found = os.stat(folder / below)
    if (found.st_dev, found.st_ino) in above:
        return
    above = (*above, (found.st_dev, found.st_ino))
    with os.scandir(folder / below) as entries:
        for entry in entries:
            is_link = entry.is_symlink()
            if os.path.isdir(entry.path) if is_link else entry.is_dir():
                yield from _files(folder, f"{below}{entry.name}/", above)
            elif os.path.isfile(entry.path) or not os.path.exists(entry.path) if is_link else entry.is_file():
                yield below + entry.name


# Decode ---------------------------------------------------------------------------------------------------------------


def read(path: str | Path, upright: bool) -> np.ndarray:
    """`decode` of a file; also raises OSError."""
    return decode(read_bytes(path), upright)


def read_bytes(path: str | Path, offset: int = 0, size: int | None = None) -> bytes:
    """An image's file, or the part of one that holds an image.

    Raises OSError, and ValueError where it is too large, or no file at all. Python's files take three times as long,
    which is a sixth of what decoding takes.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("is no file")  # a pipe could be waited for forever
        size = found.st_size if size is None else size
        if size > MOST_BYTES:
            raise ValueError(f"has {size:,} bytes, more than any image of {MOST_PIXELS:,} pixels")
        os.lseek(handle, offset, os.SEEK_SET)
        content = os.read(handle, size)
        while len(content) < size and (more := os.read(handle, size - len(content))):  # of a network's file system
            content += more
        return content
    finally:
        os.close(handle)


def decode(content: bytes, upright: bool) -> np.ndarray:
    """BGR image (H, W, 3) uint8 from a JPEG, PNG or WebP file, whatever its name; the first frame of an animation.

    Grey, CMYK and 16-bit images are converted, transparency is dropped. With `upright` the image is turned as its EXIF
    orientation says, otherwise it has the stored rows and columns. The size is read from the header first: a small file
    can claim to be a huge image. Raises ValueError with the reason where it is too large, or no whole image.
    """
    if not content:
        raise ValueError("is empty")
    _refuse_large(content)
    if content.startswith(PNG) and b"acTL" in content:
        content = still_png(content)
    elif content.startswith(WEBP) and content[12:16] == b"VP8X" and int.from_bytes(content[20:21]) & WEBP_MOVES:
        content = still_webp(content)
        _refuse_large(content)  # a frame has a size of its own
    flags = cv2.IMREAD_COLOR if upright else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:  # too little memory, say
        image = None
    if image is None:
        raise ValueError("is no readable image")
    return image


def reason_of(error: Exception) -> str:
    """What is wrong with an image, to be said after its name, from what reading, decoding or working on it raised."""
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})"
    return str(error) if isinstance(error, ValueError) else "is too much for OpenCV, or for the memory"


def _refuse_large(content: bytes) -> None:
    width, height = size_of(content)
    if width * height > MOST_PIXELS or max(width, height) > LONGEST_SIDE:
        most = f"{MOST_PIXELS:,} pixels or {LONGEST_SIDE:,} in a row or column"
        raise ValueError(f"is {width} x {height}, more than {most}")


@functools.cache
def prepare_process() -> None:
    """Sets this process up to decode image after image, from now on; OpenCV itself says nothing of bad ones any more.

    The libraries below it may: they know no names of files.
    """
    getattr(cv2.utils, "logging", cv2).setLogLevel(0)  # OpenCV 4 and 5
    keep_freed_memory()
