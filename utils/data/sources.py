"""Several data sets as one: their images one after another, their identities under names that tell them apart."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from config.config import Config
from utils.data.columns import Joined
from utils.data.index import Index
from utils.data.store import ImageStore
from utils.errors import InputError

SHARE = 4  # the first word of the seed that chooses a share; see utils.data.faces


class Sources:
    """Index and images of all data sets that `data` names; each has its own cache, as if it were used alone.

    With one data set this is its `ImageStore`: the same index, rows and digest.
    """

    index: Index
    images: np.ndarray | Joined  # (N, 112, 112, 3) uint8
    usable: np.ndarray  # (N,) bool
    source: np.ndarray  # (N,) int64: number of the data set of each row
    digest: str  # SHA-256 over the paths and contents of all files

    def __init__(self, cfg: Config, checked: bool = True):
        stores = [ImageStore(one, checked) for one in each_source(cfg)]
        self.index = join([store.index for store in stores], cfg.same_names_are_one)
        self.source = np.repeat(np.arange(len(stores)), [len(store.usable) for store in stores])
        self.usable = np.concatenate([store.usable for store in stores])
        if len(stores) == 1:
            self.images, self.digest = stores[0].images, stores[0].digest
        else:
            self.images = Joined(tuple(store.images for store in stores))
            self.digest = digest_of(*(store.digest for store in stores), *self.index.identities)


def each_source(cfg: Config) -> list[Config]:
    """Returns a copy of the settings for each data set alone."""
    return [replace(cfg, data=path, data_flip=(), data_share=()) for path in cfg.data_paths]


def index_of(cfg: Config, listed: Callable[[Config], Index]) -> Index:
    """Returns the index of all data sets, each listed by a function of its settings."""
    return join([listed(one) for one in each_source(cfg)], cfg.same_names_are_one)


def join(indexes: list[Index], same_names_are_one: bool) -> Index:
    """Joins indexes: rows one data set after another, identities sorted by name.

    Identities of the same group and name are told apart: in the second data set g/a is named g/a@2. With
    `same_names_are_one` they are one identity; raises InputError if a name is then in two groups.
    """
    if len(indexes) == 1:
        return indexes[0]
    renamed: list[list[str]] = []
    taken: set[str] = set()
    for k, index in enumerate(indexes):
        names = [*index.identities]
        for i in range(len(names)):
            while names[i] in taken and not same_names_are_one:
                names[i] = f"{names[i]}@{k + 1}"
        taken.update(names)
        renamed.append(names)
    if same_names_are_one:
        _refuse_two_groups(taken)
    identities = sorted(taken)
    number = {name: k for k, name in enumerate(identities)}
    both = [*zip(indexes, renamed, strict=True)]
    paths = (
        names[i] + path[len(index.identities[i]) :]
        for index, names in both
        for path, i in zip(index.paths, index.identity.tolist(), strict=True)
    )
    return replace(
        indexes[0],
        identities=tuple(identities),
        paths=tuple(paths),
        identity=np.concatenate([np.array([number[name] for name in names])[index.identity] for index, names in both]),
        stamps=np.concatenate([index.stamps for index in indexes]),
        folders=tuple(folder for index in indexes for folder in index.folders),
        changed=np.concatenate([index.changed for index in indexes]),
        digest=digest_of(*(index.digest for index in indexes), *identities),
    )


def digest_of(*texts: str) -> str:
    """Returns the SHA-256 of texts, one a line; names of files may be no valid text."""
    return hashlib.sha256("\n".join(texts).encode(errors="surrogateescape")).hexdigest()


def _refuse_two_groups(names: Iterable[str]) -> None:
    group_of: dict[str, str] = {}
    for name in sorted(names):
        group, _, identity = name.rpartition("/")
        if group_of.setdefault(identity, group) != group:
            raise InputError(
                f"Identity {identity} is in {group_of[identity]} and in {group}: give the two different names, or "
                "leave out same_names_are_one."
            )


def shared(cfg: Config, index: Index, source: np.ndarray) -> np.ndarray:
    """Returns a mask (N,) bool of the rows that `data_share` selects at random from each data set.

    It selects the same share of every group, so that balanced data stay balanced: of its identities, or with `share_of`
    images, of its images. The choice depends on the seed, the data set's number and the group only.
    """
    chosen = np.ones(len(source), bool)
    groups = [name.rpartition("/")[0] for name in index.identities]
    group_of = np.array([*dict.fromkeys(groups)])
    group = np.searchsorted(np.sort(group_of), np.array(groups))[index.identity]
    for k, share in enumerate(cfg.data_share):
        for g, name in enumerate(sorted(group_of)):
            rows = np.flatnonzero((source == k) & (group == g))
            kinds = np.unique(index.identity[rows]) if cfg.share_of == "identities" else rows
            random = np.random.default_rng((SHARE, cfg.seed, k, *name.encode()))
            kept = random.permutation(kinds)[: max(1, round(share * len(kinds)))]
            of = index.identity[rows] if cfg.share_of == "identities" else rows
            chosen[rows] = np.isin(of, kept)
    return chosen


def never_flipped(cfg: Config, source: np.ndarray) -> np.ndarray | None:
    """Returns a mask (N,) bool of the rows whose data set has `data_flip` off; None if there are none."""
    if "off" not in cfg.data_flip:
        return None
    return np.array([flip == "off" for flip in cfg.data_flip])[source]


def folders(cfg: Config) -> tuple[Path, ...]:
    """Returns the folders of all data sets."""
    return tuple(map(Path, cfg.data_paths))
