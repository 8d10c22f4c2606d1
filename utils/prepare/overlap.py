"""Finds images that a data folder shares with verification sets, and duplicates within the folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from utils.data.listing import is_hidden
from utils.data.pairs import load_bin
from utils.errors import InputError
from utils.prepare.contents import Seen, digest_of
from utils.prepare.likeness import BYTES, fingerprint, near


@dataclass(frozen=True)
class PairsImages:
    """Holds the M distinct images of verification sets."""

    places: list[tuple[Path, int]]  # M: first occurrence of each, as .bin file and number of the image in it
    fingerprint: np.ndarray  # (M, 32) uint8
    digests: list[bytes]  # M: of their pixels


class Match(NamedTuple):
    """Describes an image of the data that equals an image of the pairs, or shows the same photograph."""

    row: int
    other: int  # position in `PairsImages`
    bits: int  # number of bits in which their fingerprints differ
    same_pixels: bool


def read_pairs(folder: Path) -> PairsImages:
    """Reads the distinct images of all .bin files. Raises InputError if there is none, and as `load_bin` does."""
    paths = sorted(path for path in folder.glob("*.bin") if not is_hidden(path.name))
    if not paths:
        raise InputError(f"{folder} holds no .bin: set --pairs to the folder of the <ethnicity>_test.bin files.")
    found: dict[bytes, tuple[Path, int]] = {}
    fingerprints = bytearray()
    for path in paths:
        pairs = load_bin(path)
        first = np.unique(pairs.rows, return_index=True)[1]
        images = zip(first.tolist(), pairs.distinct, strict=True)
        for number, image in tqdm(images, path.name, len(first), unit=" images", disable=None):
            bgr = np.ascontiguousarray(image[..., ::-1])
            digest = digest_of(bgr)
            if digest not in found:
                found[digest] = path, number
                fingerprints += fingerprint(bgr)
    return PairsImages([*found.values()], np.frombuffer(fingerprints, np.uint8).reshape(-1, BYTES), [*found])


def candidates(seen: Seen, pairs: PairsImages) -> list[tuple[int, int, int]]:
    """Compares all images with those of the pairs; returns (row, position in `pairs`, bits) of those that are near."""
    usable = np.flatnonzero(seen.usable & seen.fingerprint.any(1))  # without uniform images, which all look alike
    rows, others, bits = near(seen.fingerprint[usable], pairs.fingerprint)
    return [*zip(usable[rows].tolist(), others.tolist(), bits.tolist(), strict=True)]


def matches(found: list[tuple[int, int, int]], pairs: PairsImages, digests: dict[int, bytes]) -> list[Match]:
    """Turns `candidates` into matches; `digests` holds those of their rows and decides `same_pixels`."""
    return [Match(row, other, bits, digests[row] == pairs.digests[other]) for row, other, bits in found]


def equal_images(seen: Seen) -> np.ndarray:
    """Returns the rows (K,) of images that may have equal pixels: fingerprint and size equal those of another image."""
    usable = np.flatnonzero(seen.usable)
    keys = np.concatenate([seen.fingerprint, seen.sides.view(np.uint8).reshape(len(seen.sides), -1)], 1)[usable]
    _, which, count = np.unique(keys.view(f"V{keys.shape[1]}").ravel(), return_inverse=True, return_counts=True)
    return usable[count[which.ravel()] > 1]


def duplicates(rows: np.ndarray, digests: dict[int, bytes]) -> list[list[int]]:
    """Groups rows of equal pixels, in order; rows without a duplicate are left out."""
    sets: dict[bytes, list[int]] = {}
    for row in rows.tolist():
        sets.setdefault(digests[row], []).append(row)
    return [same for same in sets.values() if len(same) > 1]
