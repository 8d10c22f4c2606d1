"""Verification sets: pairs of face images in the .bin format of RFW and insightface."""

import hashlib
import io
import os
import pickle
import re
import shlex
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
from tqdm import tqdm

from config.config import Config
from utils.data.attributes import read_attributes
from utils.data.identities import read_identities
from utils.data.store import ALIGN, BLOCK, OF_ANOTHER_SIZE, SIZE, decode
from utils.distributed.world import is_first
from utils.errors import InputError, NotWritten
from utils.storage.arrays import Filling, provide
from utils.storage.mistaken import mistaken
from utils.threads import map_ahead

FOLDS = 10


@dataclass(frozen=True)
class Pairs:
    """A verification set of P pairs: pair k is images 2k and 2k + 1. An image in several pairs is stored once."""

    distinct: np.ndarray  # (U, 112, 112, 3) uint8, RGB, in order of first occurrence; memory-mapped if cached
    rows: np.ndarray  # (2P,) int64, index into `distinct` of each image
    same: np.ndarray  # (P,) bool, True if both images show the same identity
    digest: str  # SHA-256 of the .bin file
    identities: np.ndarray | None = None  # (P, 2) names of the identities of both ends; None if they are not known
    attributes: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # (P,) values of both ends by attribute, where known

    @property
    def images(self) -> np.ndarray:
        """All images of the pairs, (2P, 112, 112, 3) uint8, RGB; copied from `distinct` at each access."""
        return np.asarray(self.distinct)[self.rows]


def load_bin(path: Path, cache: Path | None = None) -> Pairs:
    """Reads a verification set in the .bin format of RFW and insightface: a pickle of (encoded images, same or not).

    Images with equal encoded bytes are decoded once. With a folder `cache`, the decoded images are written to it and
    memory-mapped. Without one, or if it cannot be written, they are held in memory: 38 kB per distinct image. Raises
    InputError if the file is anything else. No code in the file is executed.
    """
    path = Path(path)
    encoded, same, digest = read_bin(path)
    index_of: dict[bytes, int] = {}
    rows = np.array([index_of.setdefault(item, len(index_of)) for item in encoded])
    first = np.unique(rows, return_index=True)[1]
    shape, images = (len(first), SIZE, SIZE, 3), None

    def decode_item(row: int) -> np.ndarray:
        return decode_image(path, encoded, first[row])

    if cache is not None:
        path_digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
        # Earlier versions cached all 2P images. Without repeated images that is the same array, so the cache is reused.
        made_from = {"pairs": digest} | ({"distinct images": len(first)} if len(first) < len(encoded) else {})
        array_spec = (cache / f"{path.stem}-{path_digest}.npy", shape, np.uint8, made_from)
        try:
            images = provide(
                *array_spec,
                lambda: _decode_pairs(Filling(*array_spec, BLOCK, {"opencv": cv2.__version__}), decode_item),
            )
        except NotWritten as error:
            print(f"{error} The images of {path} are decoded into memory instead, each time.")
    if images is None:
        images = np.empty(shape, np.uint8)
        with ThreadPoolExecutor() as pool:
            for row, image in enumerate(map_ahead(pool, decode_item, range(len(first)), BLOCK)):
                images[row] = image
    return Pairs(images, rows, same, digest)


def read_bin(path: Path) -> tuple[list[bytes], np.ndarray, str]:
    """Reads a .bin file; returns (2P encoded images, same (P,) bool, SHA-256 of the file).

    Does not decode the images. Raises InputError if the file is anything else. No code in the file is executed.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}: set pairs to the folder of the <ethnicity>_test.bin files.")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}).") from error
    if reason := mistaken(raw):
        raise InputError(f"{path} {reason}.")
    try:
        content = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a corrupted pickle can raise nearly anything
        raise InputError(f"{path} is damaged or no set of pairs ({error}).") from error
    if not (isinstance(content, (tuple, list)) and len(content) == 2):
        raise InputError(f"{path} is no set of pairs: expected (images, same or not).")
    encoded, same = map(_to_numpy, content)
    if not all(
        isinstance(part, (list, tuple)) or (isinstance(part, np.ndarray) and part.ndim) for part in (encoded, same)
    ):
        raise InputError(f"{path} is no set of pairs: expected two lists.")
    if len(encoded) == 0 or len(encoded) != 2 * len(same):
        raise InputError(f"{path} holds {len(encoded)} images for {len(same)} pairs: expected two for each.")
    if not all(isinstance(value, (bool, int, np.bool_, np.integer)) and value in (0, 1) for value in same):
        raise InputError(f"{path}: whether a pair is the same must be True or False.")
    images = [item.tobytes() if isinstance(item, np.ndarray) else item for item in map(_to_numpy, encoded)]
    for k, item in enumerate(images):
        if not isinstance(item, bytes):
            raise InputError(f"{path}: image {k} is no bytes, but {type(item).__name__}.")
    return images, np.array([bool(value) for value in same]), hashlib.sha256(raw).hexdigest()


def decode_image(path: Path, encoded: list[bytes], k: int) -> np.ndarray:
    """Decodes image k of `read_bin` to RGB (112, 112, 3) uint8. Raises InputError, which names `path`, if it fails."""
    try:
        return decode(encoded[k])
    except ValueError as error:
        advice = f" {ALIGN}." if str(error).endswith(OF_ANOTHER_SIZE) else ""
        raise InputError(f"{path}: image {k} {error}.{advice}") from error


def _to_numpy(part: Any) -> Any:
    """Converts an array read by `_Unpickler` to NumPy; returns other objects unchanged."""
    return part.value if isinstance(part, _Array) else part


def _decode_pairs(filling: Filling, decode_item: Callable[[int], np.ndarray]) -> None:
    """Decodes the images of all missing blocks; deletes the partial file after an InputError."""

    def decode_block(block: int) -> str:
        return filling.write(block, np.stack([*map(decode_item, filling.rows(block))]))

    try:
        with filling, ThreadPoolExecutor() as pool:
            blocks = tqdm(filling.missing, f"decode {filling.path.stem}", unit=" blocks", leave=False, disable=None)
            for block, digest in zip(blocks, map_ahead(pool, decode_block, filling.missing, BLOCK), strict=True):
                filling.finish(block, digest)
    except InputError:  # an image cannot be decoded, or the disk is full
        filling.discard()
        raise


class _Unpickler(pickle._Unpickler):
    """Unpickles lists, tuples, numbers, bytes and NumPy arrays only; a pickle that refers to any other name is refused.

    It extends Python's unpickler in Python. The one in C can be made to allocate gigabytes by ten bytes that name a
    large memo index. The one in Python can by a bytearray with a false size, so `load_bytearray8` is overridden.

    Arrays are rebuilt by the classes below: NumPy's own functions can access memory beyond an array if the file chooses
    their arguments.
    """

    dispatch: ClassVar[dict] = {**pickle._Unpickler.dispatch}
    read: Callable[[int], bytes]  # set by the base class, as is the next
    append: Callable[[Any], None]

    def load_bytearray8(self) -> None:
        """Reads a bytearray without allocating its declared size first."""
        (size,) = struct.unpack("<Q", self.read(8))
        content = self.read(size)
        if len(content) < size:
            raise pickle.UnpicklingError("it ends too early")
        self.append(bytearray(content))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def find_class(self, module: str, name: str):
        """Returns the replacement of an allowed name; raises UnpicklingError for any other."""
        # New objects at each call: a pickle can set attributes on whatever this returns.
        known = {
            "_codecs.encode": lambda text, encoding: _latin1(text, encoding),  # bytes, in old protocols of Python 3
            "numpy.ndarray": None,
            "numpy.dtype": lambda *code: _DType(*code),
            "numpy.multiarray._reconstruct": lambda *_: _Array(),
            "numpy.multiarray.scalar": lambda dtype, data: dtype.array(data, (1,))[0],
            "numpy.numeric._frombuffer": lambda data, dtype, shape, order: _Array(dtype.array(data, shape, order)),
        }
        # The module names depend on the pickle protocol and on NumPy's major version.
        full = f"{module}.{name}".replace("numpy._core.", "numpy.").replace("numpy.core.", "numpy.")
        if full in known:
            return known[full]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not read")


class _DType:
    """Replaces numpy.dtype for booleans and integers; built from NumPy's code, such as "u1"."""

    def __init__(self, code: str | bytes, *_):
        self.code = code.decode() if isinstance(code, bytes) else code
        if not re.fullmatch(r"[biu][1248]", self.code):
            raise pickle.UnpicklingError(f"it holds an array of type {self.code!r}, which is not read")
        self.order = "="

    def __setstate__(self, state: tuple) -> None:
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        self.order = order if order in ("<", ">") else "="

    def array(self, data: bytes, shape: tuple[int, ...], order: Literal["C", "F"] = "C") -> np.ndarray:
        return np.frombuffer(data, np.dtype(self.order + self.code)).reshape(shape, order=order)


class _Array:
    """Replaces numpy.ndarray during unpickling; `__setstate__` sets `value`."""

    def __init__(self, value: np.ndarray | None = None):
        self.value = value

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = dtype.array(data, shape, "F" if is_fortran else "C")


def _latin1(text: str, encoding: str) -> bytes:
    """Encodes text as Latin-1, the only encoding that a pickle of bytes needs."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}, which is not read")
    return text.encode("latin1")


def fold_of(pairs: int, folds: int = FOLDS) -> np.ndarray:
    """Returns the fold (P,) int64 of each of P pairs: consecutive, the first folds longer, as scikit-learn's KFold."""
    return np.repeat(np.arange(folds), [len(part) for part in np.array_split(np.arange(pairs), folds)])


def in_folds(same: np.ndarray, folds: int = FOLDS) -> dict[str, np.ndarray]:
    """Counts the genuine and the impostor pairs in each fold, (folds,) each, from the labels `same` (P,) bool."""
    fold, kinds = fold_of(len(same), folds), (("genuine", same), ("impostor", ~same))
    return {kind: np.bincount(fold[which], minlength=folds) for kind, which in kinds}


def lacking(same: np.ndarray, folds: int = FOLDS) -> str:
    """Tells how many folds lack genuine or impostor pairs, "" if every fold holds both kinds.

    The accuracy of a set that lacks a kind is no verification accuracy: a network that maps all faces to one point has
    100 % on genuine pairs alone.
    """
    counts = {kind: np.count_nonzero(held == 0) for kind, held in in_folds(same, folds).items()}
    return " and ".join(f"{count} of {folds} folds hold no {kind} pair" for kind, count in counts.items() if count)


def load_pairs(cfg: Config) -> dict[str, Pairs]:
    """Reads the verification sets of all groups, or those that `pairs_sets` names.

    Prints a line for each set without both kinds of pairs in every fold. Raises InputError if a file is missing or
    holds fewer pairs than folds, and if no set has both kinds in every fold. Identities and
    attributes are read from the files beside each set, where they exist (`utils.data.identities`,
    `utils.data.attributes`); InputError is raised also if these do not fit it.
    """
    paths = cfg.pairs_files
    missing = {name: path for name, path in paths.items() if not path.is_file()}
    if missing:
        raise InputError(f"Missing: {', '.join(map(str, missing.values()))}. {_advice(cfg, [*paths], [*missing])}")
    sets = {name: load_bin(path, Path(cfg.cache) / "pairs") for name, path in paths.items()}
    for name, pairs in sets.items():
        if len(pairs.same) < FOLDS:
            raise InputError(f"{paths[name]} holds {len(pairs.same)} pairs, too few for {FOLDS} folds.")
        identities = read_identities(paths[name], pairs.same, pairs.digest)
        sets[name] = replace(pairs, identities=identities, attributes=read_attributes(paths[name], pairs.same))
    reasons = {name: lacking(pairs.same) for name, pairs in sets.items()}
    if all(reasons.values()):
        name, reason = next(iter(reasons.items()))
        raise InputError(f"{paths[name]}: {reason}: give each tenth of the pairs both kinds.")
    for name, reason in reasons.items() if is_first() else ():
        if reason:
            print(f"{paths[name]}: {reason}: its accuracy is left out of averages, and chooses no epoch.")
    return sets


def _advice(cfg: Config, names: list[str], missing: list[str]) -> str:
    """Tells what to set if some verification sets are missing: pairs_sets without them, if others are there."""
    text = "Set pairs to the folder of these files"
    there = [name for name in names if name not in missing]
    if cfg.of_groups or not there:
        return f"{text}."
    return f"{text}, or verify on those that are there: --pairs_sets {shlex.quote(','.join(there))}"
