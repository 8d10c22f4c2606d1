"""Identities of the two ends of each pair, in a file beside the .bin, which itself holds images and labels only.

`<name>_identities.json` beside `<name>.bin` is a JSON object. "sha256" is the SHA-256 of the .bin; "identities" is a
list with [identity, identity] for each pair, in the order of the .bin.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.errors import InputError
from utils.storage.files import read_json, write_text

SHOWN = 3  # identities named in a sentence


def sidecar_of(path: Path) -> Path:
    """Returns the path of the file of identities beside a .bin."""
    return path.with_name(f"{path.stem}_identities.json")


def write_identities(path: Path, digest: str, identities: Sequence[tuple[str, str]]) -> None:
    """Writes the identities of the pairs of the .bin `path`, whose SHA-256 is `digest`."""
    # One line per pair, so that the file can be read and compared by eye; names that are not valid UTF-8 are escaped.
    lines = ",\n".join(f"[{json.dumps(one)}, {json.dumps(other)}]" for one, other in identities)
    write_text(sidecar_of(path), f'{{"sha256": "{digest}",\n"identities": [\n{lines}\n]}}\n')


def read_identities(path: Path, same: np.ndarray, digest: str) -> np.ndarray | None:
    """Reads the identities (P, 2) of the pairs of the .bin `path`; returns None if there is no file of identities.

    Raises InputError if the file is damaged, belongs to another .bin, or contradicts `same` (P,) bool: a genuine pair
    has one identity. An impostor pair of one identity is kept, since real lists contain a few.
    """
    file = sidecar_of(path)
    if not file.exists():
        return None
    content = read_json(file)
    if content.get("sha256") != digest:
        raise InputError(f"{file} belongs to another {path.name}: make both again with utils.prepare, or delete it.")
    rows = content.get("identities")
    if not isinstance(rows, list) or not all(_is_pair(row) for row in rows):
        raise InputError(f"{file} must hold a list of two names per pair: make it again, or delete it.")
    return checked(file, np.array(rows, object).reshape(-1, 2), same)


def checked(file: Path, identities: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Returns `identities` (P, 2).

    Raises InputError naming `file` if their number is not that of `same` (P,), or a genuine pair has two of them.
    """
    if len(identities) != len(same):
        raise InputError(f"{file} names {len(identities):,} pairs, but there are {len(same):,}: make it again.")
    wrong = np.flatnonzero(same & (identities[:, 0] != identities[:, 1]))
    if len(wrong):
        one, other = identities[wrong[0]]
        raise InputError(
            f"{file}: pair {wrong[0]:,} is genuine, but has the identities {one} and {other}: correct the file."
        )
    return identities


def in_two_groups(identities: dict[str, np.ndarray | None]) -> str:
    """Returns a sentence that names the identities that occur in more than one group, or "" if there is none."""
    seen: dict[str, str] = {}
    shared = {}
    for group, of_group in identities.items():
        for name in [] if of_group is None else np.unique(of_group.astype(str)).tolist():
            if name in seen:
                shared[name] = (seen[name], group)
            seen.setdefault(name, group)
    if not shared:
        return ""
    few = ", ".join(f"{name} ({one}, {other})" for name, (one, other) in list(shared.items())[:SHOWN])
    more = ", ..." * (len(shared) > SHOWN)
    return f"Identities in two groups: {len(shared)}, drawn as different ones: {few}{more}."


def _is_pair(row: object) -> bool:
    return isinstance(row, list) and len(row) == 2 and all(isinstance(name, str) and name for name in row)
