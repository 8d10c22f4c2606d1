"""Reads files of landmarks, checks that the points resemble a face, and matches them with images by path."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.data import images
from utils.data.align import TEMPLATE
from utils.errors import InputError
from utils.prepare.tables import lines_of

OF_NO_FACE, MOSTLY_NO_FACES = 0.75, 0.5  # highest `unlikeness` accepted: of one image, and as median of a file

FIELD = re.compile(r"[^\s,;]+")
IMAGE = re.compile(rf".*?({'|'.join(map(re.escape, images.READABLE + images.OTHERS))})(?=[\s,;\"]|$)", re.I)
BEHIND = 2  # most numbers behind the landmarks, such as a score
CERTAIN = 0.25  # highest median `unlikeness` at which they are looked for there; at the wrong place it is 0.3 to 0.9
OF_POINTS = {"lefteye": 0, "righteye": 1, "nose": 2, "nosetip": 2, "leftmouth": 3, "rightmouth": 4}
OF_POINTS |= {"mouthleft": 3, "mouthright": 4, "leftmouthcorner": 3, "rightmouthcorner": 4}
OF_POINTS |= {"leftlip": 3, "rightlip": 4, "mouthleftcorner": 3, "mouthrightcorner": 4}


@dataclass(frozen=True)
class Landmarks:
    """Holds the N landmarks of a file."""

    paths: list[str]  # N: as in the file, but with slashes
    lines: list[str]  # N: "line <number> of <file>"
    points: np.ndarray  # (N, 5, 2) float64: x, y in pixels
    strays: list[tuple[str, str]]  # lines without landmarks, and why
    text: str = ""  # how the file was understood, one line


class Row(NamedTuple):
    """Holds the numbers of one face in a file."""

    path: str
    line: str
    numbers: list[float]


def read_landmarks(path: Path) -> Landmarks:
    """Reads landmarks from lines with a path, optionally other fields, and ten numbers, from JSON, or from label files.

    docs/data.md lists the forms. Detects the order of the numbers, and numbers behind them. Raises InputError if the
    file cannot be read, holds no landmarks, or its numbers look like a face in neither order.
    """
    try:
        lines = [*lines_of(path)]
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}: set --landmarks to files of landmarks.") from error
    several = 0
    if lines and lines[0][1].lstrip().startswith(("{", "[")):
        (rows, several), strays, form = _largest(_of_json(path, lines)), [], "JSON"
    elif any(line.startswith("# ") and IMAGE.match(line) for _, line in lines):
        found, strays = _of_label_file(path, lines)
        (rows, several), form = _largest(found), "a label file as of RetinaFace"
    else:
        (rows, strays), form = _of_lines(path, lines), "lines"
    if not rows:
        raise InputError(f"{path} has no line of a path with ten numbers at the end: set --landmarks to another file.")
    paths = [row.path for row in rows]
    if path.name.endswith("_lmk.txt"):  # the paths may lack the group, but the file name has it
        group = path.name.removesuffix("_lmk.txt")
        paths = [f"{group}/{name}" if name.count("/") == 1 else name for name in paths]
    points, kept, text = _in_likeliest_order(rows)
    fewer = sorted({*range(len(rows))} - {*kept})
    strays += [(rows[k].line, "has no number behind its landmarks, as most have") for k in fewer]
    if several:
        text += f"; {several:,} images show several faces, of which the largest is taken"
    named = sum(not _has_ending(name) for name in paths)
    text += f"; {named:,} names without ending" * bool(named)
    text = f"{len(kept):,} faces, {form}, {text}"
    return Landmarks([paths[k] for k in kept], [rows[k].line for k in kept], points, strays, text)


# Forms ----------------------------------------------------------------------------------------------------------------


def _of_lines(path: Path, lines: list[tuple[int, str]]) -> tuple[list[Row], list[tuple[str, str]]]:
    """Parses lines with a path and numbers at the end; the first lines may give a count and names of columns."""
    rows, strays = [], []
    for number, line in lines:
        where = f"line {number} of {path}"
        if found := _parsed(line):
            rows.append(Row(found[0], where, found[1]))
        elif rows or not _is_head(line):
            strays.append((where, "is no path with ten numbers at the end"))
    return rows, strays


def _is_head(line: str) -> bool:
    """Tells whether a line gives the number of images, or the names of ten columns or more, as in CelebA's table."""
    words = FIELD.findall(line)
    return (len(words) == 1 and words[0].isdigit()) or (len(words) >= 10 and not any(map(_is_number, words)))


def _parsed(line: str) -> tuple[str, list[float]] | None:
    """Returns path and all numbers at the end of a line, ten or more, or None.

    Of a line with tabs the path is the first column that is no number; otherwise it ends at an image ending or a space.
    """
    fields = [*FIELD.finditer(line)]
    count = len([*takewhile(lambda field: _is_number(field[0]), reversed(fields))])
    if len(fields) <= 10 or count < 10:
        return None
    if count == len(fields):  # the path is a number, or there is none
        count = len(fields) - 1
    before = line[fields[0].start() : fields[-count - 1].end()]
    if "\t" in line:
        path = next((cell for cell in line.strip().split("\t") if not _is_number(cell)), fields[0][0])
    else:
        path = (IMAGE.match(before) or fields[0])[0]
    numbers = [float(field[0]) for field in fields[-count:]]
    return path.strip('" ').replace("\\", "/"), numbers[-10 - BEHIND :]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _of_label_file(path: Path, lines: list[tuple[int, str]]) -> tuple[list[Row], list[tuple[str, str]]]:
    """Parses "# image" lines with a line for each face: a box, five times x, y and a flag, optionally a score.

    Faces without landmarks have -1 in place of them.
    """
    rows, strays, image = [], [], ""
    for number, line in lines:
        where = f"line {number} of {path}"
        if line.startswith("#"):
            image = line[1:].strip().replace("\\", "/")
            continue
        words = line.split()
        numbers = [float(word) for word in words] if all(map(_is_number, words)) else []
        if len(numbers) in (19, 20) and image:
            points = [numbers[k] for k in range(4, 19) if k % 3 != 0]
            if any(point != -1 for point in points):  # -1 stands for landmarks that are not known
                rows.append(Row(image, where, points))
        elif len(numbers) != 4:  # a face of which only the box is known
            strays.append((where, "is no face with a box and five points"))
    return rows, strays


def _of_json(path: Path, lines: list[tuple[int, str]]) -> list[Row]:
    """Parses JSON, or JSON lines: landmarks by path, or entries with a path and landmarks, as lists or by name."""
    try:
        try:
            values = [(1, json.loads("\n".join(line for _, line in lines)))]
        except ValueError:
            values = [(number, json.loads(line)) for number, line in lines]
    except ValueError as error:
        raise InputError(f"{path} is damaged or no JSON ({error}): set --landmarks to another file.") from error
    found = [(name, number, points) for number, value in values for name, points in _entries(value, "")]
    named = np.array([points for _, _, points in found if isinstance(points, tuple)]).reshape(-1, 5, 2)
    # The left eye may be meant as the person's own, which lies to the right in the image.
    swapped = len(named) > 0 and np.median(named[:, 0, 0] - named[:, 1, 0]) > 0
    rows = []
    for name, number, points in found:
        if swapped and isinstance(points, tuple):
            points = [points[k] for k in (1, 0, 2, 4, 3)]
        numbers = [float(value) for value in np.ravel(points)]
        rows.append(Row(name.replace("\\", "/"), f"{name or f'line {number}'} of {path}", numbers))
    return rows


def _entries(value: object, path: str) -> Iterator[tuple[str, list | tuple]]:
    """Yields the path and the landmarks of each face in a JSON value; a tuple of points if they have names."""
    if isinstance(value, dict):
        keys = {re.sub("[^a-z]", "", str(key).lower()): key for key in value}
        named = {OF_POINTS[name]: value[key] for name, key in keys.items() if name in OF_POINTS}
        if len(named) == 5 and all(np.shape(point)[:1] >= (2,) for point in named.values()):
            yield path, tuple(list(named[k])[:2] for k in range(5))
            return
        texts = [item for item in value.values() if isinstance(item, str)]
        path = next(filter(_has_ending, texts), path) or next((text for text in texts if "/" in text), "")
        for key, item in value.items():
            inner = key if _has_ending(str(key)) or "/" in str(key) or not path else path
            yield from _entries(item, str(inner))
    elif isinstance(value, list):
        shape = _shape(value)
        if shape in ((10,), (5, 2), (2, 5)):
            yield path, value
        elif shape in ((5, 3), (15,)):  # each point with a flag or score
            yield path, [point[:2] for point in np.reshape(value, (5, 3)).tolist()]
        elif not shape:
            for item in value:
                yield from _entries(item, path)


def _shape(value: list) -> tuple[int, ...]:
    """Returns the shape of a list of numbers or of lists of numbers, () for any other list."""
    try:
        array = np.array(value)
    except ValueError:
        return ()
    return array.shape if array.dtype.kind in "if" else ()


def _largest(rows: list[Row]) -> tuple[list[Row], int]:
    """Keeps of several faces of an image the one whose landmarks lie farthest apart; returns also how many images."""
    best: dict[str, Row] = {}
    several = set()
    for row in rows:
        if row.path in best:
            several.add(row.path)
        if row.path not in best or np.ptp(row.numbers) > np.ptp(best[row.path].numbers):
            best[row.path] = row
    return [*best.values()], len(several)


# Order of the numbers -------------------------------------------------------------------------------------------------


def _in_likeliest_order(rows: list[Row]) -> tuple[np.ndarray, list[int], str]:
    """Finds how many numbers stand behind the landmarks, and their arrangement, by which most resemble faces.

    Returns points (K, 5, 2), the K positions in `rows` of those with so many numbers, and how they were understood.
    """
    best, plain = None, []
    for behind in range(BEHIND + 1):
        kept = [k for k, row in enumerate(rows) if len(row.numbers) >= 10 + behind]
        if 2 * len(kept) <= len(rows):
            break
        numbers = np.array([rows[k].numbers[-10 - behind :][:10] for k in kept])
        for which, points in enumerate((numbers.reshape(-1, 5, 2), numbers.reshape(-1, 2, 5).swapaxes(1, 2))):
            found = unlikeness(points)
            plain += [] if behind else [found]
            if best is None or np.median(found) < (best[0] if not behind else min(best[0], CERTAIN)):
                best = np.median(found), points, kept, behind, which
    median, points, kept, behind, which = best
    if median > MOSTLY_NO_FACES:
        line = rows[int(np.argmax(np.minimum(*plain) > MOSTLY_NO_FACES))].line
        raise InputError(
            f"The numbers in {line}, as in most, are neither x1 y1 ... x5 y5 nor x1 ... x5 y1 ... y5 of left eye, "
            "right eye, nose, left and right corner of the mouth, as seen in the image: give them so."
        )
    if np.median(np.ptp(points, axis=1)) < 2:
        raise InputError(
            f"The landmarks in {rows[0].line}, as in most, lie within two pixels: give them in pixels, not as "
            "shares of the width and height."
        )
    text = "x1 ... x5 y1 ... y5" if which else "x1 y1 ... x5 y5"
    return points, kept, text + f" with {behind} numbers behind" * bool(behind)


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

    At least two parts must agree, <id>/<image>, or the only part. A name without ending matches an image with any, and
    one with another ending matches where its own is not there. Returns the landmarks (5, 2) by image, the reasons
    why the other images have none, and the unused lines with the reason.
    """
    every = [_by_end(paths, 2), _by_end(paths, 1)]
    stems = [_by_end(paths, 2, _stem), _by_end(paths, 1, _stem)]
    candidates: dict[str, list[tuple[int, np.ndarray, str, str]]] = {}  # image: shared parts, landmarks, path and line
    points, failures, strays = {}, {}, []
    for file in files:
        strays += file.strays
        for name, line, five in zip(file.paths, file.lines, file.points, strict=True):
            changed: Callable[[str], str] = str
            found = _ending_alike(name, *every)
            if not found:
                found, changed = _ending_alike(_stem(name), *stems), _stem
            common = [_shared_parts(changed(name), changed(path)) for path in found]
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


def _ending_alike(name: str, ends: dict[str, list[str]], names: dict[str, list[str]]) -> list[str]:
    """Returns the images with the last two parts of a name, or with its only part: the keys of `ends` and `names`."""
    return ends.get(_end(name, 2)) or ends.get(_end(name, 1), []) if "/" in name else names.get(name, [])


def _by_end(paths: list[str], parts: int, changed: Callable[[str], str] = str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(_end(changed(path), parts), []).append(path)
    return found


def _has_ending(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in images.READABLE + images.OTHERS


def _stem(path: str) -> str:
    """Removes the ending of an image; other dots are part of the name."""
    return os.path.splitext(path)[0] if _has_ending(path) else path


def _end(path: str, parts: int) -> str:
    return "/".join(path.split("/")[-parts:])


def _shared_parts(one: str, other: str) -> int:
    """Counts the trailing parts that two paths share."""
    pairs = zip(reversed(one.split("/")), reversed(other.split("/")), strict=False)
    return len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])
