"""Converts RFW's text release to the verification sets <output>/<ethnicity>_test.bin that the evaluation reads.

Reads   <release>/txts/<ethnicity>/<ethnicity>_pairs.txt, whose lines have columns separated by tabs:
          id n1 n2         a genuine pair
          id1 n1 id2 n2    an impostor pair
        <images>/<ethnicity>/<id>/<id>_%04d.jpg, or <images>/data/<ethnicity>/..., aligned to 112 x 112
Writes  <output>/<ethnicity>_test.bin, with the pairs in the order of the list, encoded images unchanged
        <output>/<ethnicity>_test_identities.json, the identities of each pair
        <output>/acquisition.csv, a copy of <images>/acquisition.csv, which utils.prepare align writes
        If an image is missing or cannot be decoded, <output>/<ethnicity>_test_failures.csv is written instead, and an
          existing .bin stays.
Run     python -m utils.prepare rfw --release RFW --images aligned/RFW --output data/RFW

Each list must hold RFW's 6,000 pairs: ten folds of 300 genuine, then 300 impostor pairs.
"""

import argparse
import shlex
import sys
from pathlib import Path

from utils.data.listing import is_hidden
from utils.data.pairs import FOLDS
from utils.errors import InputError
from utils.prepare import acquisition
from utils.prepare.lists import Pair, doubts, make_bin, numbered, read_pairs
from utils.prepare.tables import read_lines
from utils.prepare.work import add_processes, path_of
from utils.storage.files import write_text

IN_A_ROW = 300
SAME = ([True] * IN_A_ROW + [False] * IN_A_ROW) * FOLDS
FORM = '"id n1 n2" or "id1 n1 id2 n2"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--release", type=path_of, required=True, metavar="FOLDER", help="RFW's folder, which holds txts"
    )
    parser.add_argument("--images", type=path_of, required=True, metavar="FOLDER", help="folder of the aligned faces")
    parser.add_argument("--output", type=path_of, required=True, metavar="FOLDER", help="for <ethnicity>_test.bin")
    add_processes(parser)


def run(given: argparse.Namespace) -> None:
    """Writes the sets of all ethnicities that have a list.

    Raises InputError before anything is written if a list is not like RFW's. A set with missing images is not written;
    the others are, then InputError is raised.
    """
    lists = {ethnicity: _checked(path) for ethnicity, path in find_lists(given.release).items()}
    complaints = []
    for ethnicity, (path, pairs) in lists.items():
        output = given.output / f"{ethnicity}_test.bin"
        places = [given.images / ethnicity, given.images / "data" / ethnicity]
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            complaints.append(
                f"There is no folder {places[0]}, nor {places[1]}: set --images to what holds one of them."
            )
        elif complaint := make_bin(output, path, pairs, folder, given.processes):
            complaints.append(complaint)
        else:
            print(
                f"Written to {output}: {len(pairs):,} pairs, {FOLDS} folds of {IN_A_ROW} genuine + {IN_A_ROW} impostor."
            )
    if complaints:
        raise InputError("\n".join(complaints))
    if (counts := given.images / acquisition.FILE).exists():
        write_text(given.output / acquisition.FILE, counts.read_text(encoding="utf-8"))
    print(f"Next: python -m eval.evaluation --pairs {shlex.quote(str(given.output))}")


def find_lists(release: Path) -> dict[str, Path]:
    """Finds the list of pairs of each ethnicity, sorted. Raises InputError if there is none, or one is missing."""
    folders = sorted(path for path in release.glob("txts/*") if path.is_dir() and not is_hidden(path.name))
    lists = {folder.name: folder / f"{folder.name}_pairs.txt" for folder in folders}
    missing = [path for path in lists.values() if not path.is_file()]
    if len(missing) == len(lists):
        raise InputError(
            f"{release} holds no txts/<ethnicity>/<ethnicity>_pairs.txt: set --release to what holds txts."
        )
    if missing:
        raise InputError(f"There is no file {missing[0]}: add it, or take the folder {missing[0].parent} away.")
    return lists


def identities_of_lists(release: Path) -> dict[str, set[str]]:
    """Returns for each ethnicity the names of the identities in RFW's list of pairs.

    Raises InputError if there is no list, or a line has another form.
    """
    return {
        ethnicity: {face.identity for pair in _read(path) for face in (pair.one, pair.other)}
        for ethnicity, path in find_lists(release).items()
    }


def _read(path: Path) -> list[Pair]:
    return read_pairs(path, read_lines(path), numbered, FORM)


def _checked(path: Path) -> tuple[Path, list[Pair]]:
    """Reads a list; returns its path and pairs. Raises InputError if number or order of the pairs is not RFW's."""
    pairs = _read(path)
    for pair, same in zip(pairs, SAME, strict=False):
        if pair.same != same:
            raise InputError(
                f"{path}, line {pair.line:,}: expected {'a genuine' if same else 'an impostor'} pair, since RFW's "
                f"{FOLDS} folds have {IN_A_ROW} genuine, then {IN_A_ROW} impostor pairs each: get the list again."
            )
    if len(pairs) != len(SAME):
        raise InputError(f"{path} holds {len(pairs):,} pairs, expected {len(SAME):,}: get the list again.")
    for doubt in doubts(path, pairs):
        print(doubt, file=sys.stderr)
    return path, pairs
