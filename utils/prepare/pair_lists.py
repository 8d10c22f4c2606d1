"""Understands lists of pairs as other projects hand them out, and tells how each was understood."""

import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.data.pairs import FOLDS
from utils.errors import InputError
from utils.prepare.lists import Face, Pair, are_numbers, face_of, numbered
from utils.prepare.tables import Sheet, is_path, kind_of_column, label_of, sheets

FORM = '"name n1 n2", "name1 n1 name2 n2" or "path1 path2 0|1"'

LEFTOVERS = (",", ";", "|", '"')  # at the end of a path they show that the list was split by the wrong sign


class Reading(NamedTuple):
    """Holds the pairs of a list, and how it was understood."""

    pairs: list[Pair]
    text: str  # one line
    columns: dict[str, list[str]]  # further columns by name, one cell for each pair


class Unlike(Exception):
    """A line has another form than a reading of the list expects."""

    def __init__(self, sheet: Sheet, row: int, expected: str = FORM):
        self.row, (line, cells) = row, sheet.rows[row]
        super().__init__(f"{sheet.path}, line {line:,}: expected {expected}, found {' '.join(cells)[:80]!r}.")


def read_list(path: Path) -> Reading:
    """Reads a list of pairs in any of the forms of docs/data.md, in order; folds that it names are put in order.

    Warns if the counts in its first line are wrong. Raises InputError naming the first line of another form, and if the
    list can be read in two ways.
    """
    readings, failures = [], []
    for sheet in sheets(path):
        announced, sheet = _announced(sheet)
        if not sheet.rows or (readings and sheet.separator == "blank after image"):
            continue
        try:
            readings.append((announced, _read(sheet)))
        except Unlike as error:
            failures.append(error)
    if not readings:
        if failures:
            raise InputError(str(max(failures, key=lambda error: error.row)))
        raise InputError(f"{path} names no pair: expected lines {FORM}.")
    announced, first = readings[0]
    if other := next((one for _, one in readings if one.pairs != first.pairs), None):
        raise InputError(
            f"{path} can be read in two ways: {first.text}; or {other.text}: write tabs between its columns."
        )
    if announced and len(first.pairs) not in announced:
        said = " or ".join(f"{number:,}" for number in announced)
        print(f"{path}: its first line announces {said} pairs, but {len(first.pairs):,} follow.", file=sys.stderr)
    return first


def _announced(sheet: Sheet) -> tuple[tuple[int, ...], Sheet]:
    """Returns the numbers of pairs that the first line may mean, as in LFW's pairs.txt, and the sheet without it."""
    cells = sheet.rows[0][1] if sheet.rows else []
    if sheet.header or not 1 <= len(cells) <= 2 or not are_numbers(*cells):
        return (), sheet
    numbers = [int(cell) for cell in cells]
    counts = (numbers[0], 2 * numbers[0]) if len(numbers) == 1 else (2 * numbers[0] * numbers[1],)
    return counts, sheet._replace(rows=sheet.rows[1:])


def _read(sheet: Sheet) -> Reading:
    if any("\0" in cell for cell in sheet.rows[0][1]):
        raise Unlike(sheet, 0)
    if all(len(cells) == 2 and is_path(cells[0]) and are_numbers(cells[1]) for _, cells in sheet.rows):
        return _two_lines_a_pair(sheet)
    paths, label = _columns(sheet)
    pairs, words = [], sheet.separator == "blank"
    for row, (line, cells) in enumerate(sheet.rows):
        is_named = sheet.header and label is not None  # then images may be called by numbers
        found = None if is_named else numbered(cells) or (_numbered_words(cells) if words else None)
        if found is None and label is not None:
            found = _paths(sheet, row, paths, label)
        if found is None or any("\0" in cell for cell in cells):
            raise Unlike(sheet, row)
        pairs.append(Pair(line, *found))
    _refuse_numbers_only(sheet)
    if label is None:
        return Reading(pairs, f"{sheet.described}, names and numbers of images as in LFW's pairs.txt", {})
    one, other = (column + 1 for column in paths)
    text = f"{sheet.described}, images in columns {one} and {other}, label in column {label + 1}"
    columns = {}
    if sheet.header:
        text += f" ({sheet.header[label]})"
        whole = min(len(cells) for _, cells in sheet.rows)
        columns = {name: sheet.column(k) for k, name in enumerate(sheet.header[:whole])}
    return Reading(pairs, text, columns)


def _numbered_words(cells: list[str]) -> tuple[Face, Face, bool] | None:
    """Parses what `numbered` does, but with names of several words, if no word of a name is a number."""
    if any(map(is_path, cells)):
        return None
    numbers = [k for k, cell in enumerate(cells) if are_numbers(cell)]
    match [k - len(cells) for k in numbers]:
        case [-2, -1] if len(cells) > 2:
            return numbered([" ".join(cells[:-2]), *cells[-2:]])
        case [_, -1] if 0 < numbers[0] < len(cells) - 2:
            k = numbers[0]
            return numbered([" ".join(cells[:k]), cells[k], " ".join(cells[k + 1 : -1]), cells[-1]])
    return None


def _refuse_numbers_only(sheet: Sheet) -> None:
    """Raises InputError if every cell is a number, so that a label cannot be told from the number of an image."""
    rows = [cells for _, cells in sheet.rows]
    if not sheet.header and all(len(cells) == 3 and are_numbers(*cells) for cells in rows):
        for column in (0, 2):
            if {cells[column] for cells in rows} == {"0", "1"}:
                raise InputError(
                    f"{sheet.path} can be read in two ways: a name and the numbers of two images in each line; or two "
                    f"images, and the label in column {column + 1}: give the images' paths, or a header line."
                )


# Columns of paths and label -------------------------------------------------------------------------------------------


def _columns(sheet: Sheet) -> tuple[tuple[int, int], int | None]:
    """Returns the two columns of paths and the column of the label; None for the label if all rows are numbered.

    Raises Unlike for the first row without them, and InputError if several columns may be the label.
    """
    numbered_words = _numbered_words if sheet.separator == "blank" else lambda _: None
    others = [
        row for row, (_, cells) in enumerate(sheet.rows) if numbered(cells) is None and numbered_words(cells) is None
    ]
    kinds = [kind_of_column(name) for name in sheet.header]
    labels = [k for k, kind in enumerate(kinds) if kind in ("label", "inverted")]
    if "one" in kinds and "other" in kinds and len(labels) == 1:
        return (kinds.index("one"), kinds.index("other")), labels[0]
    if not others:
        return (0, 0), None
    cells = [sheet.rows[row][1] for row in others]
    width = len(cells[0])
    for row, some in zip(others, cells, strict=True):
        if len(some) != width or not all(some[:3]) or width < 3:
            raise Unlike(sheet, row)
    held = [k for k in range(width) if all(is_path(some[k]) for some in cells)]
    if "one" in kinds and "other" in kinds:
        held = [kinds.index("one"), kinds.index("other")]
    labels = [k for k in range(width) if k not in held and _are_labels([some[k] for some in cells])]
    if len(held) != 2 and width == 3 and (outer := [k for k in labels if k != 1]):
        # Names without ending: the label is the column that holds labels only, the last if two do.
        labels = outer[-1:]
        held = [k for k in range(3) if k not in labels]
    if len(held) != 2:
        raise Unlike(sheet, others[0])
    if not labels:
        raise Unlike(sheet, _first_without_label(others, cells, held))
    return (held[0], held[1]), _one_label(sheet, labels, cells)


def _first_without_label(others: list[int], cells: list[list[str]], held: list[int]) -> int:
    """Returns the first row whose label cannot be read, in the column in which most can."""
    free = [k for k in range(len(cells[0])) if k not in held]
    best = max(free, key=lambda k: sum(label_of(some[k]) is not None for some in cells))
    rows = (row for row, some in zip(others, cells, strict=True) if label_of(some[best]) is None)
    return next(rows, others[0])


def _are_labels(texts: list[str]) -> bool:
    """Tells whether all texts are labels, and of one kind: not 0 and -1, which both mean impostor."""
    signs = {text.lstrip().startswith("-") for text in texts if label_of(text) is False}
    return all(label_of(text) is not None for text in texts) and len(signs) <= 1


def _one_label(sheet: Sheet, labels: list[int], cells: list[list[str]]) -> int:
    """Chooses the column of labels, by its name if there is a header. Raises InputError if several differ."""
    kinds = [kind_of_column(name) for name in sheet.header]
    named = [k for k in labels if k < len(kinds) and kinds[k] in ("label", "inverted")]
    labels = named or labels
    inverted = {k for k in labels if k < len(kinds) and kinds[k] == "inverted"}
    values = {k: [label_of(some[k]) != (k in inverted) for some in cells] for k in labels}
    if any(values[k] != values[labels[0]] for k in labels):
        counts = [f"label in column {k + 1} ({sum(values[k]):,} genuine pairs)" for k in labels]
        raise InputError(
            f"{sheet.path} can be read in two ways: {'; or '.join(counts)}: remove the column that is none, or name "
            "them in a header line such as img1, img2, label."
        )
    return labels[0]


def _paths(sheet: Sheet, row: int, paths: tuple[int, int], label: int) -> tuple[Face, Face, bool] | None:
    """Parses a row with two paths and a label; returns None if it has another form."""
    cells = sheet.rows[row][1]
    if len(cells) <= max(*paths, label):
        return None
    one, other = (cells[column] for column in paths)
    same = label_of(cells[label])
    if one.endswith(LEFTOVERS) or other.endswith(LEFTOVERS):
        return None
    if same is None or not one or not other or (not sheet.header and are_numbers(one, other)):
        return None
    if sheet.header and kind_of_column(sheet.header[label]) == "inverted":
        same = not same
    ids = [k for k, name in enumerate(sheet.header) if kind_of_column(name) == "id" and k < len(cells)]
    names = [cells[k] for k in ids] if len(ids) == 2 else ["", ""]
    return face_of(one, names[0]), face_of(other, names[1]), same


# Forms of CALFW and CPLFW, and folds ----------------------------------------------------------------------------------


def _two_lines_a_pair(sheet: Sheet) -> Reading:
    """Reads "image label" lines, two for each pair; the label is 0 for impostor, else 1 or the number of the fold."""
    if len(sheet.rows) % 2:
        raise Unlike(sheet, len(sheet.rows) - 1, "two lines a pair, and its second")
    pairs = []
    for row in range(0, len(sheet.rows), 2):
        (line, (one, label)), (_, (other, again)) = sheet.rows[row : row + 2]
        if label != again or int(label) > FOLDS:
            raise Unlike(sheet, row + 1, f"two lines a pair with the label {label}, at most {FOLDS}")
        pairs.append(Pair(line, face_of(one), face_of(other), int(label) > 0))
    impostors = [pair for pair in pairs if not pair.same]
    if impostors and all(_person(pair.one) == _person(pair.other) for pair in impostors):
        raise InputError(
            f"{sheet.path} looks like a list of images with the number of their identity, since both images of every "
            "impostor pair have one name: give a list of pairs."
        )
    text = f"{sheet.described}, two lines a pair as in CALFW and CPLFW, label in column 2"
    return Reading(_in_blocks(pairs), f"{text}; written in {FOLDS} folds, the genuine pairs first in each", {})


def _person(face: Face) -> str:
    """Returns the path of an image without the number of the image and its ending."""
    return re.sub(r"[_-]*\d*(\.\w+)?$", "", face.places[0])


def in_order_of_folds(pairs: list[Pair], folds: list[str], name: str) -> tuple[list[Pair], str]:
    """Returns the pairs in the order of their folds, with both kinds spread evenly in each fold, and a remark.

    `folds` holds the fold of each pair, from the column `name`. A .bin has ten folds of the same size, so that folds of
    other sizes, or another number of them, move their bounds.
    """
    if not all(re.fullmatch(r"\d{1,9}", fold) for fold in folds):
        return pairs, f"column {name} is not used, since it does not number folds"
    of_pair = np.array([int(fold) for fold in folds])
    numbers, sizes = np.unique(of_pair, return_counts=True)
    ordered = [pair for fold in numbers for pair in _spread([pairs[k] for k in np.flatnonzero(of_pair == fold)])]
    exact = FOLDS % len(numbers) == 0 and len(set(sizes)) == 1 and sizes[0] % (FOLDS // len(numbers)) == 0
    moved = "" if exact else f", of {sizes.min():,} to {sizes.max():,} pairs, whose bounds move"
    return ordered, f"in the order of the {len(numbers)} folds in column {name}{moved}"


def _in_blocks(pairs: list[Pair]) -> list[Pair]:
    """Orders pairs in FOLDS folds of as many pairs of each kind, the genuine ones first in each."""
    kinds = [[pair for pair in pairs if pair.same is same] for same in (True, False)]
    parts = [np.array_split(np.arange(len(kind)), FOLDS) for kind in kinds]
    return [kinds[k][i] for fold in range(FOLDS) for k in (0, 1) for i in parts[k][fold]]


def _spread(pairs: list[Pair]) -> list[Pair]:
    """Orders pairs so that both kinds are spread evenly; pairs of one kind stay in their order."""
    kinds = [[pair for pair in pairs if pair.same is same] for same in (True, False)]
    places = [((i + 0.5) / len(kind), k, i) for k, kind in enumerate(kinds) for i in range(len(kind))]
    return [kinds[k][i] for _, k, i in sorted(places)]
