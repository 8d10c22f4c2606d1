"""Converts a list of pairs and a folder of faces to a verification set (.bin), or a .bin back to list and images.

Reads   <list>, separated by tabs, commas, semicolons, bars or spaces, with or without a header line:
          name n1 n2           a genuine pair
          name1 n1 name2 n2    an impostor pair
          path1 path2 label    a pair of files; the label is 1, True, Yes, ... (genuine) or 0, -1, False, No, ...
          path label           two lines a pair, as in CALFW and CPLFW
        The first line may give the numbers of folds and pairs, as in LFW's pairs.txt. A column called fold gives the
        order. How the list was understood is printed; a list with two readings is refused.
        <images>/<name>/<name>_%04d.jpg, .jpeg, .png or .webp, or <images>/<path>, aligned to 112 x 112
Writes  <output>, a .bin with the pairs in the order of the list, encoded images unchanged
        <output's stem>_identities.json, the identities of each pair, if the list tells them by names or folders
        If an image is missing or cannot be decoded, <output's stem>_failures.csv is written beside it instead, and an
          existing .bin stays.
Run     python -m utils.prepare pairs --list pairs.txt --images faces --output data/RFW/lfw.bin
        python -m utils.prepare pairs --list bfw.csv --images faces --groups att1,att2 --output data/BFW

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
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from config.config import Config
from utils.data.image_formats import ending_of
from utils.data.pairs import FOLDS, decode_image, in_folds, lacking, read_bin
from utils.errors import InputError
from utils.prepare.lists import doubts, make_bin
from utils.prepare.pair_lists import Reading, in_order_of_folds, read_list
from utils.prepare.tables import kind_of_column
from utils.prepare.work import add_processes, new_folder, path_of
from utils.storage.files import not_written
from utils.storage.locks import locked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--list", type=path_of, metavar="FILE", help="list of pairs to convert to a .bin")
    source.add_argument("--bin", type=path_of, metavar="FILE", help="verification set to convert back")
    parser.add_argument(
        "--images", type=path_of, metavar="FOLDER", help="folder of the aligned faces that --list names"
    )
    parser.add_argument(
        "--output", type=path_of, required=True, metavar="PATH", help="the .bin; for groups, or with --bin, a folder"
    )
    parser.add_argument(
        "--groups", metavar="A,B", help="with --list: its columns that name the group of each image, for a set of each"
    )
    add_processes(parser)


def run(given: argparse.Namespace) -> None:
    """Converts one way or the other. Raises InputError for bad input, and then writes nothing but the failures."""
    if given.list:
        if given.images is None:
            raise InputError("--list goes with --images: set it to the folder that holds what the list names.")
        make_set(given.list, given.images, given.output, given.processes, given.groups)
    else:
        if given.groups:
            raise InputError("--groups goes with --list: leave it out.")
        if given.images:
            raise InputError("--bin holds its images: leave --images out.")
        take_apart(given.bin, given.output)


# Forward --------------------------------------------------------------------------------------------------------------


def make_set(path: Path, images: Path, output: Path, processes: int, columns: str | None = None) -> None:
    """Writes a list of pairs as a verification set, or as one for each group that its `columns` name.

    Raises InputError if the list or an image cannot be used.
    """
    if not images.is_dir():
        raise InputError(f"There is no folder {images}: set --images to the folder that holds what the list names.")
    if output.suffix == ".bin" and output.exists() and not output.is_file():
        raise InputError(f"{output} is no name of a .bin: set --output to one.")
    reading = read_list(path)
    named = _group_columns(path, reading, columns)
    if output.suffix != ".bin" and not named:
        raise InputError(f"{output} is no name of a .bin: set --output to one.")
    print(f"{path}: {reading.text}.")
    if output.suffix == ".bin":
        if columns:
            raise InputError(f"--groups goes with a folder as --output: {output} is one .bin.")
        if named:
            print(f"Columns {' and '.join(named)} name groups: give a folder as --output for a set of each group.")
        every = {output: [*range(len(reading.pairs))]}
    else:
        every = _sets_of_groups(path, reading, named, output)
    complaints = [
        complaint for file, rows in every.items() if (complaint := _make(path, reading, rows, images, file, processes))
    ]
    if complaints:
        raise InputError("\n".join(complaints))
    if output.suffix != ".bin":
        names = ",".join(file.stem.removesuffix("_test") for file in every)
        settings = ["--pairs", str(output), "--ethnicities", names]
        print(f"Next: python -m eval.evaluation {shlex.join(settings)}")


def _make(path: Path, reading: Reading, rows: Sequence[int], images: Path, output: Path, processes: int) -> str:
    """Writes these pairs of a list as a verification set; returns the error message for the user, otherwise ""."""
    pairs, remark = [reading.pairs[row] for row in rows], ""
    if fold := next((name for name in reading.columns if kind_of_column(name) == "fold"), ""):
        pairs, remark = in_order_of_folds(pairs, [reading.columns[fold][row] for row in rows], fold)
    same = np.array([pair.same for pair in pairs])
    for doubt in (*doubts(path, pairs), *_doubts_of_folds(path, same)):
        print(doubt, file=sys.stderr)
    if complaint := make_bin(output, path, pairs, images, processes):
        return complaint
    held = " + ".join(f"{_range(count)} {kind}" for kind, count in in_folds(same).items())
    print(f"Written to {output}: {len(pairs):,} pairs, {FOLDS} folds of {held}{remark and f', {remark}'}.")
    return ""


def _group_columns(path: Path, reading: Reading, given: str | None) -> tuple[str, ...]:
    """Returns the two columns that name the groups of a pair's images: those given, else two that are called so."""
    if given is None:
        found = [name for name in reading.columns if kind_of_column(name) == "attribute"]
        return tuple(found[:2]) if len(found) >= 2 else ()
    names = tuple(name.strip() for name in given.split(","))
    if unknown := [name for name in names if name not in reading.columns]:
        known = ", ".join(reading.columns) or "no header line"
        raise InputError(f"{path} has no column {unknown[0]!r} ({known}): set --groups to one or two of its columns.")
    return names


def _sets_of_groups(path: Path, reading: Reading, names: tuple[str, ...], output: Path) -> dict[Path, list[int]]:
    """Returns the rows of each group, by the .bin to write; pairs of images of two groups are left out and counted."""
    rows: dict[str, list[int]] = {}
    across = 0
    for row, groups in enumerate(zip(*(reading.columns[name] for name in names), strict=True)):
        if len(set(groups)) == 1:
            rows.setdefault(groups[0], []).append(row)
        else:
            across += 1
    if across:
        print(f"{path}: {across:,} pairs are of images of two groups, and belong to no set.")
    if not rows:
        raise InputError(f"{path} has no pair of one group in {' and '.join(names)}: set --groups to other columns.")
    groups = Config(ethnicities=tuple(sorted(rows))).ethnicities  # refuses names that stages refuse
    return {output / f"{group}_test.bin": rows[group] for group in groups}


def _range(counts: np.ndarray) -> str:
    low, high = counts.min(), counts.max()
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _doubts_of_folds(path: Path, same: np.ndarray) -> list[str]:
    if len(same) < FOLDS:
        return [f"{path}: {len(same)} pairs are too few for the {FOLDS} folds of evaluation."]
    reason = lacking(same)
    return [f"{path}: {reason}: a fold is a tenth of the list as it stands, give each tenth both kinds."] * bool(reason)


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
