"""The headers of JPEG, PNG and WebP files: sizes, truncation, the first frame of an animation."""

import re
import struct
from collections.abc import Iterator

WEBP_MOVES = 2  # the bit of a WebP's header that says so
JPEG, PNG, WEBP = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"
ENDINGS = {JPEG: ".jpg", PNG: ".png", WEBP: ".webp"}
JPEG_MARKER = re.compile(rb"\xff+([^\xff\x00\x01\xd0-\xd8])")  # of a segment that has a length
JPEG_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
JPEG_SCAN, JPEG_END = 0xDA, b"\xff\xd9"


def ending_of(content: bytes) -> str:
    """The usual ending of the name of an encoded image that can be decoded."""
    return next(ending for start, ending in ENDINGS.items() if content.startswith(start))


def size_of(content: bytes) -> tuple[int, int]:
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


def still_png(content: bytes) -> bytes:
    """A PNG without its animation: OpenCV 4.11 ends with a segmentation fault where that is damaged."""
    kept, at = [content[:8]], 8
    while at + 8 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] not in (b"acTL", b"fcTL", b"fdAT"):
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


def still_webp(content: bytes) -> bytes:
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
