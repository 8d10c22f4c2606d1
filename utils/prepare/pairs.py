"""Converts a list of pairs and a folder of faces to a verification set (.bin), or a .bin back to list and images.

Reads   <list>, whose lines have columns separated by tabs or, if there are none, by spaces:
          name n1 n2           a genuine pair
          name1 n1 name2 n2    an impostor pair
          path1 path2 same     a pair of files; same is 1 (genuine) or 0 (impostor)
        The first line may give the numbers of folds and pairs, as in LFW's pairs.txt.
        <images>/<name>/<name>_%04d.jpg, .jpeg, .png or .webp, or <images>/<path>, aligned to 112 x 112
Writes  <output>, a .bin with the pairs in the order of the list, encoded images unchanged
        <output's stem>_identities.json, the identities of each pair, if the list tells them by names or folders
        If an image is missing or cannot be decoded, <output's stem>_failures.csv is written beside it instead, and an
          existing .bin stays.
Run     python -m utils.prepare pairs --list pairs.txt --images faces --output data/RFW/lfw.bin

The way back:

Reads   <bin>
Writes  <output>/images/, every distinct image once, encoded as in the .bin
        <output>/pairs.txt, from which the same .bin can be made
Run     python -m utils.prepare pairs --bin data/RFW/lfw.bin --output lfw
"""

import argparse
import os
import shlex
import shutil
import sys
from itertools import chain, islice
from pathlib import Path

import numpy as np

from utils.data.image_formats import ending_of
from utils.data.pairs import FOLDS, decode_image, fold_of, read_bin
from utils.errors import InputError
from utils.prepare.lists import (
    Face,
    Pair,
    are_numbers,
    doubts,
    make_bin,
    numbered,
    read_lines,
    read_pairs,
)
from utils.prepare.work import add_processes, new_folder, path_of
from utils.storage.files import not_written
from utils.storage.locks import locked

FORM = '"name n1 n2", "name1 n1 name2 n2" or "path1 path2 0|1"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--list", type=path_of, metavar="FILE", help="list of pairs to convert to a .bin")
    source.add_argument("--bin", type=path_of, metavar="FILE", help="verification set to convert back")
    parser.add_argument(
        "--images", type=path_of, metavar="FOLDER", help="folder of the aligned faces that --list names"
    )
    parser.add_argument(
        "--output", type=path_of, required=True, metavar="PATH", help="the .bin, or with --bin a new folder"
    )
    add_processes(parser)


def run(given: argparse.Namespace) -> None:
    """Converts one way or the other. Raises InputError for bad input, and then writes nothing but the failures."""
    if given.list:
        if given.images is None:
            raise InputError("--list goes with --images: set it to the folder that holds what the list names.")
        make_set(given.list, given.images, given.output, given.processes)
    else:
        if given.images:
            raise InputError("--bin holds its images: leave --images out.")
        take_apart(given.bin, given.output)


# Forward --------------------------------------------------------------------------------------------------------------


def make_set(path: Path, images: Path, output: Path, processes: int) -> None:
    """Writes a list of pairs as a verification set. Raises InputError if the list or an image cannot be used."""
    if not images.is_dir():
        raise InputError(f"There is no folder {images}: set --images to the folder that holds what the list names.")
    if output.suffix != ".bin" or (output.exists() and not output.is_file()):
        raise InputError(f"{output} is no name of a .bin: set --output to one.")
    pairs = read_list(path)
    same = np.array([pair.same for pair in pairs])
    for doubt in (*doubts(path, pairs), *_doubts_of_folds(path, same)):
        print(doubt, file=sys.stderr)
    if complaint := make_bin(output, path, pairs, images, processes):
        raise InputError(complaint)
    held = " + ".join(f"{_range(count)} {kind}" for kind, count in _in_folds(same).items())
    print(f"Written to {output}: {len(pairs):,} pairs, {FOLDS} folds of {held}.")


def read_list(path: Path) -> list[Pair]:
    """Reads a list of the form in the module's docstring, in order; warns if the counts in its first line are wrong.

    Raises InputError naming the first line of another form.
    """
    lines = read_lines(path)
    first = [*islice(lines, 1)]
    head = first[0][1] if first and len(first[0][1]) <= 2 and are_numbers(*first[0][1]) else []
    pairs = read_pairs(path, chain([] if head else first, lines), _numbered_or_paths, FORM)
    match [int(number) for number in head]:
        case [folds, per_fold]:
            announced = (2 * folds * per_fold,)
        case [count]:  # all pairs, or the genuine ones with as many impostor pairs
            announced = (count, 2 * count)
        case _:
            announced = (len(pairs),)
    if len(pairs) not in announced:
        said = " or ".join(f"{number:,}" for number in announced)
        print(f"{path}: its first line announces {said} pairs, but {len(pairs):,} follow.", file=sys.stderr)
    return pairs


def _numbered_or_paths(columns: list[str]) -> tuple[Face, Face, bool] | None:
    match columns:
        case [one, other, "0" | "1" as same] if one and other and not are_numbers(other):
            return Face("", (one,)), Face("", (other,)), same == "1"
    return numbered(columns)


def _in_folds(same: np.ndarray) -> dict[str, np.ndarray]:
    """Counts genuine and impostor pairs in each fold of `eval.verification.ten_fold`, (folds,) each."""
    fold = fold_of(len(same))
    return {kind: np.bincount(fold[which], minlength=FOLDS) for kind, which in (("genuine", same), ("impostor", ~same))}


def _range(counts: np.ndarray) -> str:
    low, high = counts.min(), counts.max()
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _doubts_of_folds(path: Path, same: np.ndarray) -> list[str]:
    if len(same) < FOLDS:
        return [f"{path}: {len(same)} pairs are too few for the {FOLDS} folds of evaluation."]
    return [
        f"{path}: {np.count_nonzero(count == 0)} of {FOLDS} folds hold no {kind} pair: "
        f"a fold is a tenth of the list as it stands, give each tenth both kinds."
        for kind, count in _in_folds(same).items()
        if not count.all()
    ]


# Back -----------------------------------------------------------------------------------------------------------------


def take_apart(path: Path, output: Path) -> None:
    """Writes the distinct images of a .bin and the list of its pairs into a new folder, atomically.

    Raises InputError as `load_bin` does, if the folder is not empty, or if the disk is full.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}: set --bin to a verification set.")
    output = new_folder(output)
    encoded, same, _ = read_bin(path)
    names: dict[bytes, str] = {}
    for k, content in enumerate(encoded):
        if content not in names:
            decode_image(path, encoded, k)  # raises InputError if it cannot be decoded
            names[content] = f"images/{k:06}{ending_of(content)}"
    lines = [
        f"{names[one]}\t{names[other]}\t{int(is_same)}\n"
        for one, other, is_same in zip(encoded[0::2], encoded[1::2], same, strict=True)
    ]
    partial = output.with_name(f"{output.name}.partial")
    with locked(output):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "images").mkdir(parents=True)
            for content, name in names.items():
                (partial / name).write_bytes(content)
            (partial / "pairs.txt").write_text("".join(lines), newline="\n")
            os.replace(partial, output)
        except OSError as error:
            raise not_written(output, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    print(f"Written to {output}: {len(names):,} images, {len(same):,} pairs in {output / 'pairs.txt'}.")
    back = ["--list", str(output / "pairs.txt"), "--images", str(output), "--output", f"{path.stem}_again.bin"]
    print(f"Back: python -m utils.prepare pairs {shlex.join(back)}")
