"""The baseline's split: each group's identities dealt at random to as many quarters as there are teachers."""

import numpy as np

from config.config import Config
from utils.data.index import Index
from utils.errors import InputError
from utils.process import command
from utils.storage.files import read_json, write_json


def deal(identities: list[str], parts: int, random: np.random.Generator) -> list[list[str]]:
    """Shuffles and cuts into `parts` lists of equal size, the first ones longer by one where it does not divide."""
    shuffled = random.permutation(sorted(identities)).tolist()
    return [sorted(part.tolist()) for part in np.array_split(np.array(shuffled, dtype=object), parts)]


def split_of(cfg: Config, ethnicity: str, identities: list[str]) -> dict[str, list[str]]:
    """The identities of one group ("<group>/<identity>") by quarter, as the seed deals them."""
    # The group's name is part of the seed: all groups are dealt alike whether together or one at a time.
    random = np.random.default_rng((cfg.seed, *ethnicity.encode()))
    return dict(zip(cfg.quarters, deal(identities, len(cfg.quarters), random), strict=True))


def write_split(cfg: Config, ethnicity: str, identities: list[str]) -> dict[str, list[str]]:
    """Deals one group's identities ("<group>/<identity>") and writes the lists to `cfg.split_dir`.

    Raises InputError where another split is there already: teachers may have been trained on it.
    """
    path = cfg.split_dir / f"{ethnicity}.json"
    split = split_of(cfg, ethnicity, identities)
    if path.exists() and read_json(path) != split:
        raise InputError(f"{path} holds another split (other seed or identities): delete it to deal again.")
    write_json(path, split)
    return split


def require_split(cfg: Config) -> None:
    """Raises InputError that names the groups that have not been split."""
    missing = [name for name in cfg.ethnicities if not (cfg.split_dir / f"{name}.json").exists()]
    if missing:
        first = command(cfg, "baseline_data_split.py")
        raise InputError(f"{cfg.split_dir} has no split of {', '.join(missing)}: run first: {first}")


def read_quarter(cfg: Config, quarter: str, index: Index) -> list[str]:
    """The identities ("<group>/<identity>") of one quarter, from all groups.

    Raises InputError where a group has not been split, or was split when the data folder held other identities.
    """
    require_split(cfg)
    chosen = []
    for ethnicity in cfg.ethnicities:
        path = cfg.split_dir / f"{ethnicity}.json"
        split = read_json(path)
        dealt = sorted(name for names in split.values() for name in names)
        if dealt != sorted(index.identities_of(ethnicity)):
            raise InputError(f"{path} was made when data held other identities: delete it and split again.")
        if tuple(split) != cfg.quarters:
            raise InputError(f"{path} holds {len(split)} quarters, expected {len(cfg.quarters)}: split again.")
        chosen += split[quarter]
    return chosen
