"""Parses the headers of JPEG, PNG and WebP files: image size, truncation, first frame of an animation."""

import re
import struct
from collections.abc import Iterator

from utils.storage.mistaken import mistaken

WEBP_ANIMATED = 2  # flag in the VP8X header
JPEG, PNG, WEBP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"
ENDINGS = {JPEG: ".jpg", PNG: ".png", WEBP: ".webp"}
JPEG_MARKER = re.compile(rb"\xff+([^\xff\x00\x01\xd0-\xd8])")  # markers of segments that store a length
JPEG_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
JPEG_SCAN, JPEG_END = 0xDA, b"\xff\xd9"


def ending_of(content: bytes) -> str:
    """Returns the usual file ending (.jpg, .png or .webp) for the content of a readable image."""
    return next(ending for start, ending in ENDINGS.items() if content.startswith(start))


def size_of(content: bytes) -> tuple[int, int]:
    """Returns width and height of a JPEG, PNG or WebP file. Raises ValueError if it is truncated or none of these."""
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
    raise ValueError(mistaken(content) or "is no JPEG, PNG or WebP image")


def still_png(content: bytes) -> bytes:
    """Removes the animation chunks of a PNG: OpenCV 4.11 segfaults if they are corrupted."""
    kept, at = [content[:8]], 8
    while at + 8 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] not in (b"acTL", b"fcTL", b"fdAT"):
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


def still_webp(content: bytes) -> bytes:
    """Returns the first frame of an animated WebP as a WebP file, without EXIF.

    OpenCV 4.11 reads out of bounds if a frame is not as large as the animation. Raises ValueError if the first frame is
    missing, or smaller than the animation.
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
    """Yields type, begin and end of each complete RIFF chunk."""
    while at + 8 <= end and (last := at + 8 + struct.unpack_from("<I", content, at + 4)[0]) <= end:
        yield content[at : at + 4], at + 8, last
        at = last + last % 2


def components_of_jpeg(content: bytes) -> int:
    """Returns the number of components of a readable JPEG: 1 for grey, 3 for colour, 4 for CMYK."""
    frame = next(at for marker, at in _segments(content) if marker in JPEG_FRAMES)
    return content[frame + 7]


def _segments(content: bytes) -> Iterator[tuple[int, int]]:
    """Yields the marker of each segment of a JPEG and the offset of its length field."""
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
            # Cameras append data, so the end marker need not be the last bytes of the file.
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
