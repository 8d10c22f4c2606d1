"""Reads lists of pairs and the faces that they name, and writes both as verification sets (.bin)."""

import os
import pickle
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from utils.data.identities import sidecar_of, write_identities
from utils.data.images import find, read_bytes, reason_of
from utils.data.index import EXTENSIONS
from utils.data.store import ALIGN, OF_ANOTHER_SIZE, decode
from utils.errors import InputError
from utils.prepare.tables import ENDING
from utils.prepare.work import in_processes, write_failures
from utils.storage.files import replaced, sha256

PROTOCOL = 2  # pickle protocol of the published .bin files
NAMED = 20  # bad images named in a message; the CSV file lists all
ENDINGS = (*EXTENSIONS, *map(str.upper, EXTENSIONS))
IS_NOT_THERE = "is not there"


class Face(NamedTuple):
    """Describes a face named by a list."""

    identity: str  # "" if the list does not tell
    places: tuple[str, ...]  # possible paths of its image, relative to the folder of images, the likeliest first


class Pair(NamedTuple):
    """Describes a line of a list."""

    line: int  # counted from 1
    one: Face
    other: Face
    same: bool


class Image(NamedTuple):
    """Holds the encoded image of a face."""

    place: str  # path relative to the folder of images
    content: bytes
    reason: str  # why it cannot be used, "" if it can
    way: int = 0  # position in `Face.places` of the place where it was found


Parse = Callable[[list[str]], tuple[Face, Face, bool] | None]

# Lists ----------------------------------------------------------------------------------------------------------------


def read_pairs(path: Path, lines: Iterator[tuple[int, list[str]]], parse: Parse, form: str) -> list[Pair]:
    """Reads the pairs of a list in order; `parse` returns None for columns that do not match `form`.

    Raises InputError naming the first line that does not match, or if the list is empty.
    """
    pairs = []
    for number, columns in lines:
        found = None if any("\0" in column for column in columns) else parse(columns)
        if found is None:
            shown = " ".join(columns)[:80]
            raise InputError(f"{path}, line {number:,}: expected {form}, found {shown!r}.")
        pairs.append(Pair(number, *found))
    if not pairs:
        raise InputError(f"{path} names no pair: expected lines {form}.")
    return pairs


def numbered(columns: list[str]) -> tuple[Face, Face, bool] | None:
    """Parses "name n1 n2" as a genuine pair and "name1 n1 name2 n2" as an impostor pair; returns None otherwise."""
    match columns:
        case [name, one, other] if name and are_numbers(one, other):
            return _face(name, one), _face(name, other), True
        case [first, one, second, other] if first and second and are_numbers(one, other):
            return _face(first, one), _face(second, other), False
    return None


def are_numbers(*texts: str) -> bool:
    """Tells whether all texts are non-negative integers of at most nine digits."""
    return all(re.fullmatch(r"[0-9]{1,9}", text) for text in texts)


WAYS = (
    *("{name}/{name}_{n:04}", "{name}/{name}_{n:04}_0", "{name}/{name}_{n}", "{name}/{n:04}", "{name}/{n}"),
    *("{name}_{n:04}", "{name}_{n}"),
)
"""Where image n of a name lies: as in LFW and RFW; as MTCNN writes faces; then as other releases have them."""


def _face(name: str, number: str) -> Face:
    first = name.replace("{", "{{").replace("}", "}}")
    return Face(name, tuple(way.replace("{name}", first).format(n=int(number)) for way in WAYS))


def face_of(path: str, identity: str = "") -> Face:
    """Returns the face at a path as a list gives it: possibly absolute, or of Windows, or of another root."""
    paths = [path]
    if "\\" in path:
        paths = [path.replace("\\", "/"), path]
    parts = [part for part in re.sub(r"^[A-Za-z]:/", "/", paths[0]).split("/") if part not in ("", ".")]
    return Face(identity, (*paths, *("/".join(parts[k:]) for k in range(1, len(parts)))))


def doubts(path: Path, pairs: list[Pair]) -> list[str]:
    """Warns of pairs that are valid but suspicious: an image paired with itself, impostor pairs of one identity."""
    kinds = {
        "genuine pairs show one image twice": [pair for pair in pairs if pair.same and pair.one == pair.other],
        "impostor pairs are of one identity": [
            pair for pair in pairs if not pair.same and pair.one.identity and pair.one.identity == pair.other.identity
        ],
    }
    return [f"{path}: {len(of):,} {kind}, first in line {of[0].line:,}." for kind, of in kinds.items() if of]


# Images ---------------------------------------------------------------------------------------------------------------


def make_bin(output: Path, path: Path, pairs: list[Pair], folder: Path, processes: int) -> str:
    """Writes the pairs of the list `path` as a verification set, with the encoded images of `folder` unchanged.

    Every image is decoded first. If one cannot be used, the .bin is not written, an existing one stays, and all such
    images are listed in `<output's stem>_failures.csv`. Returns the error message for the user then, otherwise "".
    The identities of the pairs, where the list tells them, are written beside the .bin (`utils.data.identities`).
    Raises NotWritten if the disk is full.
    """
    lines: dict[Face, int] = {}  # the line that names a face first
    for pair in pairs:
        lines.setdefault(pair.one, pair.line)
        lines.setdefault(pair.other, pair.line)
    images = in_processes(partial(read_image, folder), lines, len(lines), f"check {output.stem}", processes)
    found = dict(zip(lines, images, strict=True))
    bad = [(lines[face], image.place, image.reason) for face, image in found.items() if image.reason]
    failures = output.with_name(f"{output.stem}_failures.csv")
    write_failures(failures, ("line", "image", "reason"), bad)
    if bad:
        shown = [f"\n  {place} {reason}" for _, place, reason in bad[:NAMED]] + ["\n  ..."] * (len(bad) > NAMED)
        kept = f"\n{output} is still that of an earlier run." if output.exists() else ""
        costs = sum(bool(found[pair.one].reason or found[pair.other].reason) for pair in pairs)
        return (
            f"{len(bad):,} of the {len(lines):,} images in {folder} that {path} names cannot be used, which costs "
            f"{costs:,} of {len(pairs):,} pairs (all listed in {failures}):{''.join(shown)}\n"
            f"{_advice(bad, len(lines), folder)}{kept}"
        )
    if complaint := _mixed(path, found):
        return complaint
    sidecar_of(output).unlink(missing_ok=True)  # it belongs to the .bin that is replaced
    write_bin(output, [found[face].content for pair in pairs for face in pair[1:3]], [pair.same for pair in pairs])
    if identities := identities_of(pairs):
        write_identities(output, sha256(output), identities)
    return ""


def _mixed(path: Path, found: dict[Face, Image]) -> str:
    """Tells the user if the images were not all found in the same way; says in which, if it is not the usual one."""
    dropped = {image.way for image in found.values()}
    kept = {image.place.count("/") for image in found.values()}
    if len(dropped) > 1 and len(kept) > 1:
        one, other = (next(image.place for image in found.values() if image.way == way) for way in sorted(dropped)[:2])
        return f"{path} names images that are found in two ways, such as {one} and {other}: set --images to one folder."
    if dropped != {0}:
        face, image = next((face, image) for face, image in found.items() if image.way)
        print(f"{path}: {face.places[0]} is found as {image.place}, and so are others.")
    return ""


def identities_of(pairs: list[Pair]) -> list[tuple[str, str]]:
    """Returns the identities of both faces of each pair, or an empty list if the list of pairs does not tell them.

    A list of paths tells them by folders: every genuine pair must lie in one folder, and every impostor pair in two.
    """
    if all(face.identity for pair in pairs for face in pair[1:3]):
        return [(pair.one.identity, pair.other.identity) for pair in pairs]
    folders = [(_identity_or_folder(pair.one), _identity_or_folder(pair.other)) for pair in pairs]
    fits = all(one and other and (one == other) == pair.same for (one, other), pair in zip(folders, pairs, strict=True))
    return folders if fits else []


def read_image(folder: Path, face: Face) -> Image:
    """Reads the image of a face and decodes it to check that it is usable."""
    for way, place in enumerate(face.places):
        for spelled in _spellings(place):
            try:
                content = read_bytes(folder / spelled)
                decode(content)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, ValueError) as error:
                return Image(spelled, b"", reason_of(error), way)
            return Image(spelled, content, "", way)
    return Image(next(_spellings(face.places[0])), b"", IS_NOT_THERE)


def _spellings(place: str) -> Iterator[str]:
    """Yields a path with the endings of images, if it has none; then with other endings and other forms of letters."""
    stem = ENDING.sub("", place)
    if stem != place:
        yield place
    yield from (stem + ending for ending in ENDINGS if stem + ending != place)
    if not place.isascii():
        # macOS decomposes accented letters; lists made on Windows may be in its own encoding.
        forms = {unicodedata.normalize(form, _from_windows(place)) for form in ("NFC", "NFD")} - {place}
        yield from (ENDING.sub("", form) + ending for form in sorted(forms) for ending in ENDINGS)


def _from_windows(place: str) -> str:
    """Returns a path whose bytes are not valid UTF-8 as if they were Windows-1252; other paths unchanged."""
    try:
        return place.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError:
        return place.encode("utf-8", "surrogateescape").decode("cp1252", "replace")


def _advice(bad: list[tuple[int, str, str]], of: int, folder: Path) -> str:
    """Advises the user what to do about unusable images."""
    if any(reason.endswith(OF_ANOTHER_SIZE) for *_, reason in bad):
        return ALIGN
    if len(bad) == of and all(reason == IS_NOT_THERE for *_, reason in bad):
        example = next((path for path in find(folder)[0]), "")
        held = f" {folder} holds {example}, for example." if example else ""
        return f"Set --images to the folder in which {bad[0][1]} lies.{held}"
    return "Add or repair them."


def write_bin(path: Path, images: list[bytes], same: list[bool]) -> None:
    """Writes 2P encoded images and P booleans in the format of `utils.data.pairs.load_bin` and published evaluators.

    The file is a pickle of (images, same); pair k consists of images 2k and 2k + 1. An object that occurs repeatedly
    in `images` is stored once. Raises InputError if the file cannot be written; an existing one then stays unchanged.
    """
    with replaced(path) as beside, open(beside, "wb") as file:
        pickle.dump((images, same), file, PROTOCOL)


def _identity_or_folder(face: Face) -> str:
    return face.identity or os.path.dirname(face.places[0])
