"""Finds image files in a folder tree and decodes JPEG, PNG and WebP safely."""

import functools
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from utils.data.image_formats import PNG, WEBP, WEBP_ANIMATED, size_of, still_png, still_webp
from utils.data.listing import described, entries
from utils.memory import keep_freed_memory

READABLE = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
OTHERS = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".tif", ".tiff")
"""Endings of image formats that cannot be read. `find` lists these files too, so that they can be reported."""

NOT_READ = (*(ending for ending in READABLE if ending not in (".jpg", ".jpeg", ".png", ".webp")), *OTHERS)
"""Endings of images that stages pass over, see `utils.data.index.EXTENSIONS`."""

MOST_PIXELS = 100_000_000
LONGEST_SIDE = 32_766  # pixels: OpenCV 4 cannot warp larger images
MOST_BYTES = 8 * MOST_PIXELS  # the size of that many pixels uncompressed, with four 16-bit channels


# Find -----------------------------------------------------------------------------------------------------------------


def find(folder: Path, says: bool = False) -> tuple[list[str], Counter]:
    """Lists all files below `folder` whose ending is that of an image; counts the other files by ending.

    The paths are relative to `folder`, with slashes, sorted. Hidden and system entries are passed over (see
    `utils.data.listing`), and counted in a printed line if it `says` so. Symbolic links are followed, without looping;
    a broken link counts as a file. Raises OSError if a folder cannot be listed.
    """
    paths, others, hidden = [], Counter(), []
    for path in _files(folder, "", (), hidden):
        ending = os.path.splitext(path)[1].lower()
        if ending in READABLE or ending in OTHERS:
            paths.append(path)
        else:
            others[ending] += 1
    if says and hidden:
        print(described(hidden, folder))
    return sorted(paths), others


def _files(folder: Path, below: str, above: tuple, hidden: list[str]) -> Iterator[str]:
    found = os.stat(folder / below)
    if (found.st_dev, found.st_ino) in above:
        return
    above = (*above, (found.st_dev, found.st_ino))
    for entry in entries(folder / below, hidden):
        is_link = entry.is_symlink()
        if os.path.isdir(entry.path) if is_link else entry.is_dir():
            yield from _files(folder, f"{below}{entry.name}/", above, hidden)
        elif os.path.isfile(entry.path) or not os.path.exists(entry.path) if is_link else entry.is_file():
            yield below + entry.name


# Decode ---------------------------------------------------------------------------------------------------------------


def read(path: str | Path, upright: bool) -> np.ndarray:
    """Reads and decodes an image file, see `decode`. Raises OSError, or ValueError as `decode` does."""
    return decode(read_bytes(path), upright)


def read_bytes(path: str | Path, offset: int = 0, size: int | None = None) -> bytes:
    """Reads a file, or `size` bytes of it from `offset` on.

    Raises OSError, and ValueError if the path is no regular file or the size exceeds MOST_BYTES. Uses os.read because
    `open` takes three times as long; the difference is a sixth of the time of decoding.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("is no file")  # reading from a pipe could block forever
        size = found.st_size if size is None else size
        if size > MOST_BYTES:
            raise ValueError(f"has {size:,} bytes, more than any image of {MOST_PIXELS:,} pixels")
        os.lseek(handle, offset, os.SEEK_SET)
        content = os.read(handle, size)
        # A network file system may return fewer bytes than were asked for.
        while len(content) < size and (more := os.read(handle, size - len(content))):
            content += more
        return content
    finally:
        os.close(handle)


def decode(content: bytes, upright: bool) -> np.ndarray:
    """Decodes a JPEG, PNG or WebP file to a BGR image (H, W, 3) uint8; of an animation, the first frame.

    The format is recognised by content, not by name. Grey, CMYK and 16-bit images are converted; transparency is
    dropped. With `upright` the EXIF orientation is applied, otherwise rows and columns are as stored. The size is read
    from the header before decoding, since a small file can declare a huge image. Raises ValueError, with the reason, if
    the image is too large, truncated or not readable.
    """
    if not content:
        raise ValueError("is empty")
    _refuse_large(content)
    if content.startswith(PNG) and b"acTL" in content:
        content = still_png(content)
    elif content.startswith(WEBP) and content[12:16] == b"VP8X" and int.from_bytes(content[20:21]) & WEBP_ANIMATED:
        content = still_webp(content)
        _refuse_large(content)  # the header of the frame declares its own size
    flags = cv2.IMREAD_COLOR if upright else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:  # for example out of memory
        image = None
    if image is None:
        raise ValueError("is no readable image")
    return image


def reason_of(error: Exception) -> str:
    """Turns an exception from reading, decoding or processing an image into the rest of a sentence after its name."""
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})"
    return str(error) if isinstance(error, ValueError) else "is too much for OpenCV, or for the memory"


def _refuse_large(content: bytes) -> None:
    """Raises ValueError if the header declares more than MOST_PIXELS pixels, or a side over LONGEST_SIDE."""
    width, height = size_of(content)
    if width * height > MOST_PIXELS or max(width, height) > LONGEST_SIDE:
        most = f"{MOST_PIXELS:,} pixels or {LONGEST_SIDE:,} in a row or column"
        raise ValueError(f"is {width} x {height}, more than {most}")


@functools.cache
def prepare_process() -> None:
    """Prepares this process for decoding many images: keeps freed memory, and turns OpenCV's logging off.

    libjpeg and libpng may still print warnings, without file names.
    """
    getattr(cv2.utils, "logging", cv2).setLogLevel(0)  # OpenCV 4 and 5
    keep_freed_memory()
