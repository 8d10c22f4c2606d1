"""Reads the text files of IJB-B and IJB-C, which `eval.ijb` lists."""

import os
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from eval.identities import Ends
from utils.data.align import TEMPLATE
from utils.errors import InputError
from utils.storage.files import sha256

SETS = {"ijbb": "IJB-B", "ijbc": "IJB-C"}


@dataclass(frozen=True)
class Benchmark:
    """A benchmark with N images of T templates, and P pairs of templates."""

    name: str  # IJB-B | IJB-C
    crops: Path  # folder of the images
    images: list[str]  # N file names
    landmarks: np.ndarray  # (N, 5, 2) float64, x and y in pixels
    detector_score: np.ndarray  # (N,) float64
    template: np.ndarray  # (N,) int64 in 0 ... T - 1: the template of each image
    media: np.ndarray  # (N,) int64: the photograph or video of each image
    pairs: np.ndarray  # (P, 2) int64 in 0 ... T - 1
    same: np.ndarray  # (P,) bool: genuine
    digest: str  # SHA-256 of the file with names and landmarks, on which the features depend

    def people(self) -> Ends:
        """Returns the identities of the genuine pairs, which IJB's files do not name.

        Templates that genuine pairs connect, directly or through others, are of one person.
        """
        one, other = self.pairs[self.same].T
        size = int(self.template.max()) + 1
        graph = csr_matrix((np.ones(len(one), bool), (one, other)), shape=(size, size))
        count, person = connected_components(graph, directed=False)
        return Ends(person[one].astype(np.int64), person[other].astype(np.int64), count)


def load_benchmark(folder: Path) -> Benchmark:
    """Reads the text files of IJB-B or IJB-C, whichever `folder` holds, and checks that every image file exists.

    Raises InputError with the file, and the line if there is one, for anything that is missing or inconsistent.
    """
    kind = kind_of(folder)
    meta, crops = folder / "meta", folder / "loose_crop"
    path = meta / f"{kind}_name_5pts_score.txt"
    images, numbers = _table(path, "<image name> x1 y1 x2 y2 x3 y3 x4 y4 x5 y5 <detector score>", 11, float)
    landmarks = numbers[:, :10].reshape(-1, *TEMPLATE.shape)
    _check_lines(path, np.isfinite(numbers).all(1), "a number is not finite")
    _check_lines(path, np.ptp(landmarks, axis=1).any(1), "all landmarks lie at one point")

    of_images = meta / f"{kind}_face_tid_mid.txt"
    names, ids = _table(of_images, "<image name> <template id> <media id>", 2, int)
    if len(names) != len(images):
        raise InputError(f"{of_images} has {len(names)} lines, {path} {len(images)}: expected one per image in both.")
    in_order = np.array([one == other for one, other in zip(names, images, strict=True)])
    _check_lines(of_images, in_order, f"not the image in this line of {path}: both files must be in the same order")
    found = set(os.listdir(crops))
    if missing := [name for name in images if name not in found]:
        raise InputError(f"{crops} lacks {len(missing)} of {len(images)} images, the first {missing[0]}: add them.")

    of_pairs = meta / f"{kind}_template_pair_label.txt"
    _, pairs = _table(of_pairs, "<template id> <template id> <1 or 0>", 3, int)
    _check_lines(of_pairs, np.isin(pairs[:, 2], (0, 1)), "the last number must be 1 (genuine) or 0 (impostor)")
    known, template = np.unique(ids[:, 0], return_inverse=True)
    rows = np.searchsorted(known, pairs[:, :2]).clip(max=len(known) - 1)
    _check_lines(of_pairs, (known[rows] == pairs[:, :2]).all(1), f"a template that is not in {of_images}")
    same = pairs[:, 2] == 1
    if same.all() or not same.any():
        raise InputError(f"{of_pairs} holds no {'impostor' if same.all() else 'genuine'} pair: replace it.")
    scores = numbers[:, 10]
    return Benchmark(SETS[kind], crops, images, landmarks, scores, template, ids[:, 1], rows, same, sha256(path))


def kind_of(folder: Path) -> str:
    """Returns "ijbb" or "ijbc"; raises InputError with all files that are missing."""
    names = ("face_tid_mid", "name_5pts_score", "template_pair_label")
    files = {kind: [folder / "meta" / f"{kind}_{name}.txt" for name in names] for kind in SETS}
    there = [kind for kind, paths in files.items() if any(path.is_file() for path in paths)]
    if len(there) > 1:
        raise InputError(f"{folder} holds files of both IJB-B and IJB-C: give each a folder of its own.")
    kind, instead = (there[0], "") if there else ("ijbc", " (or the same with ijbb_)")
    missing = [str(path) for path in files[kind] if not path.is_file()]
    missing += [] if (folder / "loose_crop").is_dir() else [str(folder / "loose_crop")]
    if missing:
        raise InputError(f"Missing: {', '.join(missing)}{instead}. Set --folder to where meta and loose_crop are.")
    return kind


def _table(path: Path, form: str, columns: int, kind: type) -> tuple[list[str], np.ndarray]:
    """Returns the image names, if `form` begins with one, and the numbers (lines, columns), int64 or float64.

    Raises InputError with the first line that does not have this form.
    """
    names, numbers = [], array("d" if kind is float else "q")
    first = int(form.startswith("<image name>"))  # index of the first field that is a number
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        lines = tqdm(file, f"read {path.name}", unit=" lines", leave=False, disable=None, delay=1)
        for number, line in enumerate(lines, 1):
            fields = line.split()
            try:
                numbers.extend(map(kind, fields[first:]))
                is_valid = len(fields) == first + columns
            except (ValueError, OverflowError):
                is_valid = False
            if not is_valid:
                raise InputError(f"{path}, line {number}: expected {form}, found {line.strip()[:80]!r}.")
            names += fields[:first]
    if not numbers:
        raise InputError(f"{path} is empty: expected lines {form}.")
    return names, np.frombuffer(numbers, np.float64 if kind is float else np.int64).reshape(-1, columns)


def _check_lines(path: Path, is_valid: np.ndarray, what: str) -> None:
    if not is_valid.all():
        raise InputError(f"{path}, line {is_valid.argmin() + 1}: {what}.")
