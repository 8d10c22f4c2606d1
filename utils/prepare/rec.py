"""Converts a folder of faces to MXNet's RecordIO (train.rec), or train.rec to a folder, without MXNet.

The stages read train.rec directly: pass its folder as --data. Unpacking it is not necessary.

Reads   <folder>/<identity>/<image>, or with --ethnicities <folder>/<ethnicity>/<identity>/<image>, 112 x 112
Writes  <output>/train.rec, train.idx and property in insightface's layout, encoded images unchanged
        <output>/identities.txt, the name of each label: identities are numbered from 0, sorted by name, group after
          group; groups have BUPT-BalancedFace's numbers: 0 Caucasian, 1 Indian, 2 Asian, 3 African
        <output>/failures.csv, if images cannot be used or are misplaced; they are left out
Run     python -m utils.prepare rec --folder data/faces --ethnicities African,Asian,Caucasian,Indian --output data/rec

The way back:

Reads   <rec>/train.rec, with or without train.idx
Writes  <output>/<identity>/<key>.jpg, .png or .webp, with --groups <output>/<ethnicity>/<identity>/..., encoded images
          unchanged; identities and keys are numbers of eight digits
        <output>/failures.csv, if records hold no readable image; rec.json, provenance
Run     python -m utils.prepare rec --rec data/rec --groups --output data/faces

The folder is called <output>.partial until it is complete. Run the same command again to resume.
"""

import argparse
import functools
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from utils.data import image_formats, images
from utils.data.index import GROUPS_OF_RECORDS, Index, scan
from utils.data.recordio import INDEX, PROPERTY, RECORDS, Records, image_of, read_index, write_records
from utils.data.store import decode
from utils.errors import InputError
from utils.prepare.contents import passed_over
from utils.prepare.work import (
    add_processes,
    groups_of,
    in_processes,
    new_folder,
    path_of,
    refuse_filled,
    refuse_inside,
    write_failures,
)
from utils.storage.files import not_written, read_json, write_json, write_text
from utils.storage.locks import locked

IDENTITIES, FAILURES, ORIGIN = "identities.txt", "failures.csv", "rec.json"
PARTIAL = ".partial"
WRITTEN = (RECORDS, INDEX, PROPERTY, IDENTITIES, FAILURES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--folder", type=path_of, metavar="FOLDER", help="aligned faces to convert to train.rec")
    source.add_argument("--rec", type=path_of, metavar="FOLDER", help="folder of the train.rec to unpack")
    parser.add_argument("--ethnicities", metavar="A,B", help="with --folder: the groups, separated by commas")
    parser.add_argument(
        "--nested_images", action="store_true", help="with --folder: read images in subfolders of identities too"
    )
    parser.add_argument("--groups", action="store_true", help="with --rec: a folder for each group")
    parser.add_argument("--output", type=path_of, required=True, metavar="FOLDER", help="for the result")
    add_processes(parser)


def run(given: argparse.Namespace) -> None:
    """Converts one way or the other. Raises InputError for unusable input, and if the disk is full."""
    if given.folder:
        if given.groups:
            raise InputError("--groups goes with --rec: with --folder give --ethnicities.")
        groups = groups_of(given.ethnicities or "")
        pack(given.folder, groups, given.output, given.processes, given.nested_images)
    else:
        if given.ethnicities is not None:
            raise InputError("--ethnicities goes with --folder: with --rec give --groups, or nothing.")
        if given.nested_images:
            raise InputError("--nested_images goes with --folder: leave it out.")
        unpack(given.rec, given.groups, given.output, given.processes)


# Folder to train.rec --------------------------------------------------------------------------------------------------


def pack(folder: Path, groups: tuple[str, ...], output: Path, processes: int = 0, nested: bool = False) -> None:
    """Writes the images of a folder as records. Raises InputError as `scan` and `write_records` do."""
    if unknown := [name for name in groups if name not in GROUPS_OF_RECORDS]:
        raise InputError(
            f"Records have numbers for the groups {', '.join(GROUPS_OF_RECORDS)}, not for {unknown[0]}: leave "
            "--ethnicities out, and give --folder one that holds <identity>/<image>."
        )
    if (folder / RECORDS).exists():
        raise InputError(f"{folder} holds a {RECORDS} already: set --folder to one of images.")
    if (output / RECORDS).exists():
        raise InputError(f"There is a {RECORDS} in {output} already: delete it, or set --output to another folder.")
    refuse_inside(output, folder)
    refuse_filled(output, WRITTEN)
    index = scan(folder, groups, nested=nested)
    for note in index.notes(folder):
        print(note)
    with locked(output):
        # Written before the records: once train.rec exists, the output must be complete.
        write_text(output / IDENTITIES, "".join(f"{k}\t{name}\n" for k, name in enumerate(index.identities)))
        failures = [(path, "is passed over, as by stages") for path in passed_over(folder, groups, index.paths)]
        others = len(failures)
        try:
            write_records(output, _images(folder, index, failures, output, processes), len(index.identities))
        finally:
            write_failures(output / FAILURES, ("image", "reason"), failures)
    count = len(index.paths) - len(failures) + others
    print(f"Written to {output}: {count:,} images of {len(index.identities):,} identities.")
    _report(failures, output)
    print(f"Next: give --data {shlex.quote(str(output))} to the stages.")


def _images(
    folder: Path, index: Index, failures: list[tuple[str, str]], output: Path, processes: int
) -> Iterator[tuple[bytes, int, int]]:
    """Yields (encoded image, identity, group) for `write_records`; appends unusable images to `failures`."""
    of_identity = [GROUPS_OF_RECORDS.index(name.split("/")[0]) if "/" in name else -1 for name in index.identities]
    count, others = len(index.paths), len(failures)
    read = in_processes(functools.partial(_read, folder), index.paths, count, "pack", processes)
    for path, identity, (content, reason) in zip(index.paths, index.identity.tolist(), read, strict=True):
        if reason:
            failures.append((path, reason))
        else:
            yield content, identity, of_identity[identity]
    if len(failures) - others == count:
        raise InputError(f"None of the {count:,} images of {folder} can be used: {output / FAILURES} says why.")


def _read(folder: Path, path: str) -> tuple[bytes, str]:
    """Returns an encoded image that can be decoded and "", or b"" and the reason why the stages cannot use it."""
    try:
        content = images.read_bytes(f"{folder}/{path}")
        decode(content)
    except (OSError, ValueError) as error:
        return b"", images.reason_of(error)
    return content, ""


def _report(failures: list, folder: Path) -> None:
    if failures:
        print(f"{len(failures):,} images are left out: {folder / FAILURES} says why.")


# train.rec to folder --------------------------------------------------------------------------------------------------


def unpack(source: Path, with_groups: bool, output: Path, processes: int = 0) -> None:
    """Writes the images of records into a new folder. Raises InputError as `read_index` does."""
    output = new_folder(output)
    records = read_index(source)
    names = _names(records, with_groups)
    partial = output.with_name(f"{output.name}{PARTIAL}")
    items = [*zip(records.offsets.tolist(), records.lengths.tolist(), names, strict=True)]
    with locked(output):
        _claim(partial, source, with_groups)
        unpack_image = functools.partial(_unpack_image, records.path, partial)
        reasons = in_processes(unpack_image, items, len(items), "unpack", processes)
        failures = [(name, reason) for name, reason in zip(names, reasons, strict=True) if reason]
        write_failures(partial / FAILURES, ("record", "reason"), failures)
        if len(failures) == len(items):
            raise InputError(f"None of the {len(items):,} records can be used: {partial / FAILURES} says why.")
        _finish(partial, output)
    print(f"Written to {output}: {len(items) - len(failures):,} images.")
    _report(failures, output)


def _names(records: Records, with_groups: bool) -> list[str]:
    """Returns the path of each image, without its ending. Raises InputError if a group is needed and unknown."""
    names = [
        f"{number:08}/{key:08}" for number, key in zip(records.identity.tolist(), records.keys.tolist(), strict=True)
    ]
    if not with_groups:
        return names
    unknown = (records.group < 0) | (records.group >= len(GROUPS_OF_RECORDS))
    if unknown.any():
        row = np.argmax(unknown)
        label = "no group" if records.group[row] < 0 else f"the group {records.group[row]}"
        raise InputError(
            f"{records.path}: key {records.keys[row]} has {label}, and names are known for 0 to "
            f"{len(GROUPS_OF_RECORDS) - 1}: leave --groups out."
        )
    return [f"{GROUPS_OF_RECORDS[group]}/{name}" for group, name in zip(records.group.tolist(), names, strict=True)]


def _claim(partial: Path, source: Path, with_groups: bool) -> None:
    """Records the provenance of a folder; raises InputError if it is partly filled from another source."""
    files = [path for path in (source / RECORDS, source / INDEX) if path.exists()]
    stamps = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    origin = {"folder": str(source.resolve()), "files": stamps, "groups": with_groups}
    path = partial / ORIGIN
    if not partial.exists() or not any(partial.iterdir()):
        write_json(path, origin)
    elif not path.exists() or read_json(path) != origin:
        raise InputError(f"{partial} is not filled from this {RECORDS} in this way: delete it.")


def _finish(partial: Path, output: Path) -> None:
    """Renames the complete folder to its final name. Raises InputError if that fails."""
    try:
        for leftover in partial.glob(f"*{PARTIAL}"):  # left by a killed process
            leftover.unlink()
        if hasattr(os, "sync"):
            os.sync()  # one sync instead of an fsync per file; the content must be on disk before the rename
        if output.exists():
            output.rmdir()
        os.replace(partial, output)
    except OSError as error:
        raise not_written(output, error) from error


def _unpack_image(records: Path, folder: Path, item: tuple[int, int, str]) -> str:
    """Writes the image of a record, given by offset, length and name; returns why there is none, or "".

    Raises NotWritten on a full disk.
    """
    *where, name = item
    try:
        content = image_of(images.read_bytes(records, *where))
        images.decode(content, upright=False)
    except (OSError, ValueError) as error:
        return images.reason_of(error)
    _write(folder, f"{folder}/{name}{image_formats.ending_of(content)}", content)
    return ""


def _write(folder: Path, target: str, content: bytes) -> None:
    """Writes a file atomically, unless it exists with this content; a power failure may have truncated it."""
    partial = f"{folder}/{os.getpid()}{PARTIAL}"
    try:
        if os.path.isfile(target) and images.read_bytes(target) == content:
            return
        with open(partial, "wb") as file:
            file.write(content)
        try:
            os.replace(partial, target)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.replace(partial, target)
    except OSError as error:
        raise not_written(Path(target), error) from error
