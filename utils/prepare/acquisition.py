"""Failures to acquire by group: how many images there were, and in how many no face could be aligned."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from utils.errors import InputError
from utils.storage.files import read_csv, write_csv

FILE = "acquisition.csv"
HEADER = ["group", "images", "failed"]


def write(folder: Path, paths: Iterable[str], failed: Iterable[str]) -> None:
    """Writes <folder>/acquisition.csv from relative paths of all images and of those that failed.

    The group of an image is the first folder of its path, "" for an image outside any folder.
    """
    images, failures = (Counter(_group(path) for path in which) for which in (paths, failed))
    write_csv(folder / FILE, [HEADER, *((name, count, failures[name]) for name, count in sorted(images.items()))])


def read(path: Path) -> dict[str, tuple[int, int]]:
    """Reads (images, failed) of each group; raises InputError naming `path` and the line of an impossible count."""
    header, rows = read_csv(path, "delete it, or copy it again")
    if header != HEADER:
        raise InputError(f"{path} must have the columns {','.join(HEADER)}: delete it, or copy it again.")
    found = {}
    for number, row in enumerate(rows, 2):
        counts = [int(text) for text in row[1:] if text.isascii() and text.isdigit()]
        if len(row) != 3 or len(counts) != 2 or counts[1] > counts[0] or row[0] in found:
            raise InputError(f"{path}, line {number}: expected <group>,<images>,<failed>: delete it, or copy it again.")
        found[row[0]] = (counts[0], counts[1])
    return found


def _group(path: str) -> str:
    return path.partition("/")[0] if "/" in path else ""
