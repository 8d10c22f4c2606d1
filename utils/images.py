"""Images of any origin: found in a tree of folders, and decoded from whatever a file holds."""

import functools
import os
import re
import stat
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from utils.memory import keep_freed_memory

READABLE = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
OTHERS = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".tif", ".tiff")
"""Names of images that are not read: they are found all the same, so that they can be reported."""

MOST_PIXELS = 100_000_000
LONGEST_SIDE = 32_766  # pixels: OpenCV 4 cannot warp larger images
MOST_BYTES = 8 * MOST_PIXELS  # no readable image of so many pixels is larger: 16 bits of four channels

WEBP_MOVES = 2  # the bit of a WebP's header that says so
JPEG, PNG, WEBP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"
ENDINGS = {JPEG: ".jpg", PNG: ".png", WEBP: ".webp"}
JPEG_MARKER = re.compile(rb"\xff+([^\xff\x00\x01\xd0-\xd8])")  # of a segment that has a length
JPEG_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
JPEG_SCAN, JPEG_END = 0xDA, b"\xff\xd9"


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
        content = _still_png(content)
    elif content.startswith(WEBP) and content[12:16] == b"VP8X" and int.from_bytes(content[20:21]) & WEBP_MOVES:
        content = _still_webp(content)
        _refuse_large(content)  # a frame has a size of its own
    flags = cv2.IMREAD_COLOR if upright else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:  # too little memory, say
        image = None
    if image is None:
        raise ValueError("is no readable image")
    return image


def ending_of(content: bytes) -> str:
    """The usual ending of the name of an encoded image that can be decoded."""
    return next(ending for start, ending in ENDINGS.items() if content.startswith(start))


def reason_of(error: Exception) -> str:
    """What is wrong with an image, to be said after its name, from what reading, decoding or working on it raised."""
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})"
    return str(error) if isinstance(error, ValueError) else "is too much for OpenCV, or for the memory"


def _refuse_large(content: bytes) -> None:
    width, height = _size(content)
    if width * height > MOST_PIXELS or max(width, height) > LONGEST_SIDE:
        most = f"{MOST_PIXELS:,} pixels or {LONGEST_SIDE:,} in a row or column"
        raise ValueError(f"is {width} x {height}, more than {most}")


def _size(content: bytes) -> tuple[int, int]:
    """Width and height of a whole JPEG, PNG or WebP file."""
    try:
        if content.startswith(JPEG):
            return _size_of_jpeg(content)
        if content.startswith(PNG):
            if content.rfind(b"IEND") < 0:
                raise ValueError("is a truncated PNG")
            return struct.unpack_from(">II", content, 16)
        if content.startswith(WEBP) and content[8:12] == b"WEBP":
            return _size_of_webp(content)
    except struct.error:
        raise ValueError("ends in its header") from None
    raise ValueError("is no JPEG, PNG or WebP image")


def _still_png(content: bytes) -> bytes:
    """A PNG without its animation: OpenCV 4.11 ends with a segmentation fault where that is damaged."""
    kept, at = [content[:8]], 8
    while at + 8 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] not in (b"acTL", b"fcTL", b"fdAT"):
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


def _still_webp(content: bytes) -> bytes:
    """The first frame of an animated WebP: OpenCV 4.11 reads beyond its memory where sizes do not agree.

    What EXIF says is left out. Raises ValueError where the frame is not there, or not as large as the animation.
    """
    for kind, start, end in _chunks(content, 12, len(content)):
        if kind == b"ANMF":
            if content[start : start + 6] != bytes(6) or content[start + 6 : start + 12] != content[24:30]:
                raise ValueError("is an animation whose first frame is only a part")
            for inner, first, last in _chunks(content, start + 16, end):
                if inner in (b"VP8 ", b"VP8L"):
                    image = content[first - 8 : last] + bytes((last - first) % 2)
                    return b"RIFF" + struct.pack("<I", 4 + len(image)) + b"WEBP" + image
            break
    raise ValueError("is no readable image")


def _chunks(content: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, begin and end of each whole chunk of a WebP file."""
    while at + 8 <= end and (last := at + 8 + struct.unpack_from("<I", content, at + 4)[0]) <= end:
        yield content[at : at + 4], at + 8, last
        at = last + last % 2


def components_of_jpeg(content: bytes) -> int:
    """Of a JPEG that can be decoded: 1 of a grey, 3 of a colour image, 4 where it was made for printing."""
    frame = next(at for marker, at in _segments(content) if marker in JPEG_FRAMES)
    return content[frame + 7]


def _segments(content: bytes) -> Iterator[tuple[int, int]]:
    """Marker, and offset of the length, of each segment of a JPEG."""
    at = 2
    while found := JPEG_MARKER.search(content, at):
        at = found.end()
        yield found[1][0], at
        at += struct.unpack_from(">H", content, at)[0]


def _size_of_jpeg(content: bytes) -> tuple[int, int]:
    size = None
    for marker, at in _segments(content):
        if marker in JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", content, at + 3)
            size = width, height
        if marker == JPEG_SCAN and size:
            # Cameras append to a file: its last bytes need not be the image's.
            if content.endswith(JPEG_END) or content.find(JPEG_END, at) >= 0:
                return size
            break
    raise ValueError("is a truncated JPEG")


def _size_of_webp(content: bytes) -> tuple[int, int]:
    if struct.unpack_from("<I", content, 4)[0] + 8 > len(content):
        raise ValueError("is a truncated WebP")
    kind = content[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", content, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", content, 26)
    return width & 0x3FFF, height & 0x3FFF


@functools.cache
def prepare_process() -> None:
    """Sets this process up to decode image after image, from now on; OpenCV itself says nothing of bad ones any more.

    The libraries below it may: they know no names of files.
    """
    getattr(cv2.utils, "logging", cv2).setLogLevel(0)  # OpenCV 4 and 5
    keep_freed_memory()
