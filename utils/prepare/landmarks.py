"""Reads files of landmarks, checks that the points resemble a face, and matches them with images by path."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

from utils.data import images
from utils.data.align import TEMPLATE
from utils.errors import InputError

OF_NO_FACE, MOSTLY_NO_FACES = 0.75, 0.5  # highest `unlikeness` accepted: of one image, and as median of a file

FIELD = re.compile(r"[^\s,]+")
IMAGE = re.compile(rf".*?({'|'.join(map(re.escape, images.READABLE + images.OTHERS))})(?=[\s,\"]|$)", re.I)


@dataclass(frozen=True)
class Landmarks:
    """Holds the N landmarks of a file."""

    paths: list[str]  # N: as in the file, but with slashes
    lines: list[str]  # N: "line <number> of <file>"
    points: np.ndarray  # (N, 5, 2) float64: x, y in pixels
    strays: list[tuple[str, str]]  # lines without landmarks, and why


def read_landmarks(path: Path) -> Landmarks:
    """Reads lines with a path, optionally other fields, and ten numbers; detects the order of the numbers.

    Raises InputError if the file cannot be read, has no such line, or its numbers look like a face in neither order.
    """
    paths, lines, numbers, strays = [], [], [], []
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if found := _parsed(line):
                    paths.append(found[0])
                    lines.append(f"line {number} of {path}")
                    numbers.append(found[1])
                elif line.strip():
                    strays.append((f"line {number} of {path}", "is no path with ten numbers at the end"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): set --landmarks to files of landmarks.") from error
    if not paths:
        raise InputError(f"{path} has no line of a path with ten numbers at the end: set --landmarks to another file.")
    if path.name.endswith("_lmk.txt"):  # the paths may lack the group, but the file name has it
        group = path.name.removesuffix("_lmk.txt")
        paths = [f"{group}/{name}" if name.count("/") == 1 else name for name in paths]
    return Landmarks(paths, lines, _in_likelier_order(np.array(numbers), lines), strays)


def _parsed(line: str) -> tuple[str, list[float]] | None:
    """Returns path and ten numbers of a line, or None. Without tabs, the path ends at an image ending or a space."""
    fields = [*FIELD.finditer(line)]
    try:
        numbers = [float(field[0]) for field in fields[-10:]]
    except ValueError:
        return None
    if len(fields) <= 10:
        return None
    before = line[fields[0].start() : fields[-11].end()]
    path = line.strip().split("\t")[0] if "\t" in line else (IMAGE.match(before) or fields[0])[0]
    return path.strip('" ').replace("\\", "/"), numbers


def _in_likelier_order(numbers: np.ndarray, lines: list[str]) -> np.ndarray:
    """Returns points (N, 5, 2) from numbers (N, 10), in the order that resembles faces more."""
    both = numbers.reshape(-1, 5, 2), numbers.reshape(-1, 2, 5).swapaxes(1, 2)
    found = np.stack([unlikeness(points) for points in both])
    medians = np.median(found, axis=1)
    if medians.min() > MOSTLY_NO_FACES:
        which = lines[np.argmax(found.min(0) > MOSTLY_NO_FACES)]
        raise InputError(
            f"The numbers in {which}, as in most, are neither x1 y1 ... x5 y5 nor x1 ... x5 y1 ... y5 of left eye, "
            "right eye, nose, left and right corner of the mouth, as seen in the image: give them so."
        )
    return both[medians.argmin()]


def unlikeness(points: np.ndarray) -> np.ndarray:
    """Returns the relative residual (...) of the best similarity transform between points (..., 5, 2) and TEMPLATE.

    It is 0 for the template, shifted, scaled or rotated in any way; at most 0.5 for a head turned by 60 degrees to the
    side, 0.7 at 90 degrees; and 1 for uncorrelated or non-finite points.
    """
    with np.errstate(all="ignore"):
        z, w = ((one[..., 0] + 1j * one[..., 1]) for one in (points, TEMPLATE))
        z, w = z - z.mean(-1, keepdims=True), w - w.mean()
        size = (np.abs(z) ** 2).sum(-1) * (np.abs(w) ** 2).sum()
        left = 1 - np.abs((z.conj() * w).sum(-1)) ** 2 / size
    return np.sqrt(np.clip(np.nan_to_num(left, nan=1.0), 0, 1))


def match(
    paths: list[str], files: Iterable[Landmarks]
) -> tuple[dict[str, np.ndarray], dict[str, str], list[tuple[str, str]]]:
    """Assigns each image the landmarks whose path shares the most trailing parts with its own.

    At least two parts must agree, <id>/<image>, or the only part. Returns the landmarks (5, 2) by image, the reasons
    why the other images have none, and the unused lines with the reason.
    """
    ends, names = _by_end(paths, 2), _by_end(paths, 1)
    candidates: dict[str, list[tuple[int, np.ndarray, str, str]]] = {}  # image: shared parts, landmarks, path and line
    points, failures, strays = {}, {}, []
    for file in files:
        strays += file.strays
        for name, line, five in zip(file.paths, file.lines, file.points, strict=True):
            found = ends.get(_end(name, 2)) or ends.get(_end(name, 1), []) if "/" in name else names.get(name, [])
            common = [_shared_parts(name, path) for path in found]
            best = [path for path, parts in zip(found, common, strict=True) if parts == max(common)]
            if len(best) == 1:
                candidates.setdefault(best[0], []).append((max(common), five, name, line))
            else:
                strays.append((name, f"{line} fits {'several images' if best else 'no image'}"))
    for path, lines in candidates.items():
        most = max(parts for parts, *_ in lines)
        strays += [(name, f"{line} fits no image") for parts, _, name, line in lines if parts < most]
        first, *others = (claim for claim in lines if claim[0] == most)
        if other := next((other for other in others if not np.array_equal(other[1], first[1])), None):
            failures[path] = f"has different landmarks in {first[3]} and {other[3]}"
        else:
            points[path] = first[1]
    return points, failures | {path: "has no landmarks" for path in paths if path not in candidates}, strays


def _by_end(paths: list[str], parts: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(_end(path, parts), []).append(path)
    return found


def _end(path: str, parts: int) -> str:
    return "/".join(path.split("/")[-parts:])


def _shared_parts(one: str, other: str) -> int:
    """Counts the trailing parts that two paths share."""
    pairs = zip(reversed(one.split("/")), reversed(other.split("/")), strict=False)
    return len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])
