"""Attributes of the people in the pairs, such as ethnicity, gender and age, from a table beside the .bin.

`<name>_attributes.csv` beside `<name>.bin` has one row per pair, in the order of the .bin. An attribute is a column
(`gender`) or one column for each end (`gender_1`, `gender_2`; BFW's `e1`, `e2` are ethnicity, `g1`, `g2` gender). A
column `same` (or BFW's `label`) is compared with the .bin.
"""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from utils.errors import InputError

ATTRIBUTES = ("ethnicity", "gender", "age")
ENDS = {"ethnicity": ("e1", "e2"), "gender": ("g1", "g2"), "age": ("age1", "age2")}
SAME_COLUMNS = ("same", "label", "y_true")
MIXED = ""  # the value of a pair whose ends differ, or for which none is given


def table_of(path: Path) -> Path:
    """Returns the path of the table of attributes beside a .bin."""
    return path.with_name(f"{path.stem}_attributes.csv")


def read_attributes(path: Path, same: np.ndarray) -> dict[str, np.ndarray]:
    """Reads the attributes of the pairs of the .bin `path`: (P,) values by name; empty if there is no table.

    Raises InputError if the table cannot be read, has no attribute, or contradicts `same` (P,) bool.
    """
    file = table_of(path)
    if not file.exists():
        return {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            header, *rows = csv.reader(opened)
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{file} cannot be read ({error}): correct or delete it.") from error
    if len(rows) != len(same) or any(len(row) != len(header) for row in rows):
        raise InputError(f"{file} must have a row of {len(header)} columns for each of the {len(same):,} pairs.")
    columns = {name.strip(): [row[k].strip() for row in rows] for k, name in enumerate(header)}
    for name in SAME_COLUMNS:
        labels = np.array([text.lower() in ("1", "true", "1.0") for text in columns.get(name, [])])
        wrong = np.flatnonzero(labels != same) if name in columns else []
        if len(wrong):
            raise InputError(f"{file}, line {wrong[0] + 2:,}: {name} contradicts {path.name}: correct or delete it.")
    found = attributes_of(columns)
    if not found:
        raise InputError(f"{file} has no column of {', '.join(ATTRIBUTES)}, alone or with _1 and _2: add one.")
    return found


def attributes_of(columns: Mapping[str, list[str]]) -> dict[str, np.ndarray]:
    """Returns the value (P,) of each pair by attribute; MIXED where its ends differ."""
    found = {}
    for name in ATTRIBUTES:
        ends = next((two for two in ((f"{name}_1", f"{name}_2"), ENDS[name]) if {*two} <= columns.keys()), None)
        if ends:
            one, other = (np.array(columns[end], object) for end in ends)
            found[name] = np.where(one == other, one, MIXED)
        elif name in columns:
            found[name] = np.array(columns[name], object)
    return found
