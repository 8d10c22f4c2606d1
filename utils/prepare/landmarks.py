"""Files of landmarks: which points each line gives, whether they are like a face's, and which image they belong to."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

from utils.data import images
from utils.data.align import TEMPLATE
from utils.errors import InputError

OF_NO_FACE, MOSTLY_NO_FACES = 0.75, 0.5  # `unlikeness` of landmarks that are refused, of one image and of most

FIELD = re.compile(r"[^\s,]+")
IMAGE = re.compile(rf".*?({'|'.join(map(re.escape, images.READABLE + images.OTHERS))})(?=[\s,\"]|$)", re.I)


@dataclass(frozen=True)
class Landmarks:
    """What a file of landmarks holds."""

    paths: list[str]  # N, as in the file but with slashes
    lines: list[str]  # N: where in the file
    points: np.ndarray  # (N, 5, 2) float64
    strays: list[tuple[str, str]]  # lines that hold no landmarks, and why


def read_landmarks(path: Path) -> Landmarks:
    """Reads lines of a path, perhaps other fields, and ten numbers; finds out how these are arranged.

    Raises InputError for a file that is not there, holds no such line, or numbers in neither arrangement.
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
    if path.name.endswith("_lmk.txt"):  # the file's name tells the group where its paths do not
        group = path.name.removesuffix("_lmk.txt")
        paths = [f"{group}/{name}" if name.count("/") == 1 else name for name in paths]
    return Landmarks(paths, lines, _arranged(np.array(numbers), lines), strays)


def _parsed(line: str) -> tuple[str, list[float]] | None:
    """Path and ten numbers of a line, or None; without tabs the path ends with an image's ending, or is one field."""
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


def _arranged(numbers: np.ndarray, lines: list[str]) -> np.ndarray:
    """Points (N, 5, 2) of ten numbers each (N, 10), in the arrangement in which they are more like faces."""
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
    """(...) what is left of the template by the similarity that brings points (..., 5, 2) closest to it, as a share.

    That is 0 for the template, moved, scaled and turned in any way, at most 0.5 for heads turned by 60 degrees to the
    side, 0.7 at 90, and 1 for points that have nothing of it, or are no finite numbers.
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
    """Gives each image the landmarks whose path ends like its own, the longest such end first.

    Two parts must be the same, `<id>/<image>`, or the one that there is. Returns the landmarks (5, 2) of the images
    that have some, why the others have none, and the lines that are of no use, with the reason.
    """
    ends, names = _by_end(paths, 2), _by_end(paths, 1)
    claims: dict[str, list[tuple[int, np.ndarray, str, str]]] = {}  # parts in common, landmarks, path and line
    points, failures, strays = {}, {}, []
    for file in files:
        strays += file.strays
        for name, line, five in zip(file.paths, file.lines, file.points, strict=True):
            found = ends.get(_end(name, 2)) or ends.get(_end(name, 1), []) if "/" in name else names.get(name, [])
            common = [_in_common(name, path) for path in found]
            best = [path for path, parts in zip(found, common, strict=True) if parts == max(common)]
            if len(best) == 1:
                claims.setdefault(best[0], []).append((max(common), five, name, line))
            else:
                strays.append((name, f"{line} fits {'several images' if best else 'no image'}"))
    for path, lines in claims.items():
        most = max(parts for parts, *_ in lines)
        strays += [(name, f"{line} fits no image") for parts, _, name, line in lines if parts < most]
        first, *others = (claim for claim in lines if claim[0] == most)
        if other := next((other for other in others if not np.array_equal(other[1], first[1])), None):
            failures[path] = f"has different landmarks in {first[3]} and {other[3]}"
        else:
            points[path] = first[1]
    return points, failures | {path: "has no landmarks" for path in paths if path not in claims}, strays


def _by_end(paths: list[str], parts: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(_end(path, parts), []).append(path)
    return found


def _end(path: str, parts: int) -> str:
    return "/".join(path.split("/")[-parts:])


def _in_common(one: str, other: str) -> int:
    """How many parts two paths share at their ends."""
    pairs = zip(reversed(one.split("/")), reversed(other.split("/")), strict=False)
    return len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])
