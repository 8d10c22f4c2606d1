"""Reads text files of lines with columns: recognises encoding, ends of lines, separator, quotes, comments, header."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from utils.data.images import OTHERS, READABLE
from utils.errors import InputError
from utils.storage.mistaken import mistaken

SEPARATORS = {"tab": "\t", "comma": ",", "semicolon": ";", "bar": "|"}
COMMENT = "#"
FULL = 0.9  # share of lines that hold a separator, if the file is separated by it
ENDING = re.compile(rf"({'|'.join(map(re.escape, READABLE + OTHERS))})$", re.I)

GENUINE = {"true", "t", "yes", "y", "same", "genuine", "match", "matched", "mated", "positive", "pos", "intra"}
IMPOSTOR = {"false", "f", "no", "n", "different", "diff", "impostor", "imposter", "mismatch", "mismatched", "nonmatch"}
IMPOSTOR |= {"nonmated", "negative", "neg", "inter", "notsame"}

_OBJECT = r"(?:p|path|im|img|image|file|filename|filepath|imgpath|imagepath|photo|pic|picture|face|probe|gallery|name)"
_ONE, _OTHER = r"(?:1|a|x|one|left|first|l)", r"(?:2|b|y|two|right|second|r)"
NAMES = {
    "one": rf"{_OBJECT}{_ONE}|(?:first|left|one){_OBJECT}|reference|enroll?|template1",
    "other": rf"{_OBJECT}{_OTHER}|(?:second|right|two){_OBJECT}|query|verif|template2",
    "label": "labels?|(is)?same(pair|person|identity|subject)?|(is)?match|decision|target|gt|groundtruth|(is)?genuine"
    "|actual(issame)?|issimilar|mated|pairlabel|y",
    "inverted": "(is)?different|(is)?impost[oe]r|(is)?mismatch|dissimilar|dissimilarity|dist(ance)?"
    "|(is)?(non?|not)(match|same(person|identity|subject)?|mated|genuine)",
    "name": "name|person|identity|names?1?|person1",
    "number": r"(image|img)?num(ber)?\d?|n\d",
    "fold": "folds?|foldid|split|cvfold",
    "id": r"(id|identity|subject|person|class)[12ab]",
    "attribute": r"(att|attribute|group|ethnicity|race|gender|sex|a|e|g)[12]",
}
"""What a column is by its name in a header line, in lower case and without signs."""


class Sheet(NamedTuple):
    """Holds the rows of a file, split into columns in one possible way."""

    path: Path
    separator: str  # "tab", "comma", "semicolon", "bar", "blank", or "blank after image"
    header: tuple[str, ...]  # () if the file has none
    rows: list[tuple[int, list[str]]]  # number of the line, counted from 1, and its columns
    comments: int  # lines that begin with COMMENT and were passed over

    @property
    def described(self) -> str:
        """The beginning of a sentence that says how the file was understood."""
        header = ", with a header line" * bool(self.header)
        comments = f", {self.comments:,} comment lines passed over" * bool(self.comments)
        return f"{self.separator.split()[0]} separated{header}{comments}"

    def column(self, number: int) -> list[str]:
        """Returns the cells of a column, counted from 0."""
        return [cells[number] for _, cells in self.rows]


def kind_of_column(name: str) -> str:
    """Returns the key of NAMES that describes a column of this name, "" if none does."""
    name = re.sub(r"[^a-z0-9]", "", name.lower())
    return next((kind for kind, pattern in NAMES.items() if re.fullmatch(pattern, name)), "")


def label_of(text: str) -> bool | None:
    """Returns True for a label that means genuine, False for impostor, None for any other text."""
    word = re.sub(r"[^a-z0-9.+-]", "", text.lower())
    if re.fullmatch(r"[+-]?[01](\.0*)?", word):
        return float(word) == 1
    word = word.replace("-", "")
    return True if word in GENUINE else False if word in IMPOSTOR else None


def is_path(text: str) -> bool:
    """Tells whether a text looks like the path of an image."""
    return bool("/" in text or "\\" in text or ENDING.search(text))


def read_text(path: Path) -> str:
    """Reads a text file in UTF-8, UTF-16 or UTF-32, with or without byte order mark.

    Bytes that are not valid UTF-8 are kept as in file names (surrogateescape). Raises InputError if the file cannot be
    read, or is a web page, a pointer or an archive.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}).") from error
    if content and (reason := mistaken(content)):
        raise InputError(f"{path} {reason}.")
    return decoded(content)


def decoded(content: bytes) -> str:
    """Decodes the content of a text file, see `read_text`."""
    marks = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encoding = next((name for mark, name in marks.items() if content.startswith(mark) and b"\0" in content), "")
    if not encoding and b"\0" in content[:1000]:  # without a mark: most names are ASCII, half of the bytes are zero
        zeros = [content[begin:1000:2].count(0) / max(1, len(content[begin:1000:2])) for begin in (0, 1)]
        encoding = "utf-16-le" if zeros[1] > 0.8 > zeros[0] else "utf-16-be" if zeros[0] > 0.8 > zeros[1] else ""
    if encoding:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            pass
    return content.removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape")


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yields number and text of each line that is not blank; lines end as on Linux, Windows or old Macs."""
    for number, line in enumerate(re.split(r"\r\n|\n|\r", read_text(path)), 1):
        if line.strip():
            yield number, line


def read_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields number and columns of each line that is not blank; columns are separated by tabs, otherwise by spaces."""
    for number, line in lines_of(path):
        yield number, [column.strip() for column in line.split("\t" if "\t" in line else None)]


def sheets(path: Path) -> Iterator[Sheet]:
    """Yields the file split into columns in every way that its separators allow, the likeliest first."""
    every = [*lines_of(path)]
    lines = [(number, line) for number, line in every if not line.lstrip().startswith(COMMENT)]
    tabs = any("\t" in line for _, line in lines)
    for name, sign in SEPARATORS.items():
        if sum(sign in line for _, line in lines) >= FULL * len(lines) > 0 or (tabs and name == "tab"):
            # A line without a tab in a list of tabs is split at blanks, such as the first line of LFW's pairs.txt.
            rows = [(number, _cut(line, sign) if sign in line else line.split()) for number, line in lines]
            yield _sheet(path, name, rows, len(every) - len(lines))
            if name == "tab":
                return
    for name, cut in {"blank": _cut_at_blanks, "blank after image": _cut_after_images}.items():
        yield _sheet(path, name, [(number, cut(line)) for number, line in lines], len(every) - len(lines))


def _sheet(path: Path, name: str, rows: list[tuple[int, list[str]]], comments: int) -> Sheet:
    header: tuple[str, ...] = ()
    if len(rows) > 1 and _is_header(rows[0][1], rows[1][1]):
        header, rows = tuple(rows[0][1]), rows[1:]
        rows = [(number, _without_empty_end(cells)) for number, cells in rows]
    return Sheet(path, name, header, rows, comments)


def _is_header(first: list[str], second: list[str]) -> bool:
    """Tells whether the first line names the columns: with known names, or with words above paths."""
    if any(map(is_path, first)) or any(re.fullmatch(r"[\d.+-]+", cell) for cell in first):
        return False
    return sum(bool(kind_of_column(cell)) for cell in first) >= 2 or (len(first) > 1 and any(map(is_path, second)))


def _without_empty_end(cells: list[str]) -> list[str]:
    while cells and not cells[-1]:
        cells = cells[:-1]
    return cells


def _cut(line: str, sign: str) -> list[str]:
    if '"' in line:
        try:
            return [cell.strip() for cell in next(csv.reader([line], delimiter=sign, skipinitialspace=True))]
        except csv.Error:
            pass
    return [cell.strip() for cell in line.split(sign)]


def _cut_at_blanks(line: str) -> list[str]:
    return [cell for cell in _cut(" ".join(line.split()), " ") if cell] if '"' in line else line.split()


def _cut_after_images(line: str) -> list[str]:
    """Splits at blanks, but joins the words of a path, which ends at the ending of an image."""
    cells: list[str] = []
    words: list[str] = []
    for word in line.split():
        words.append(word)
        if ENDING.search(word):
            cells.append(" ".join(words))
            words = []
    if cells and not words and " " in cells[0] and label_of(cells[0].split()[0]) is not None:  # the label comes first
        cells[:1] = cells[0].split(" ", 1)
    return [*cells, *words]
