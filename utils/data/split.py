"""The split of the baseline: each group's identities are divided at random into one quarter per teacher."""

import numpy as np

from config.config import Config
from utils.data.index import Index, difference
from utils.errors import InputError
from utils.process import command_of_run
from utils.storage.files import read_json, write_json


def deal(identities: list[str], parts: int, random: np.random.Generator) -> list[list[str]]:
    """Shuffles identities and splits them into `parts` sorted lists whose sizes differ by at most one."""
    shuffled = random.permutation(sorted(identities)).tolist()
    return [sorted(part.tolist()) for part in np.array_split(np.array(shuffled, dtype=object), parts)]


def split_of(cfg: Config, ethnicity: str, identities: list[str]) -> dict[str, list[str]]:
    """Divides one group's identities ("<group>/<identity>") into {quarter: identities}; deterministic in `cfg.seed`."""
    # The group's name is part of the seed, so the split does not depend on the groups that are split with it.
    random = np.random.default_rng((cfg.seed, *ethnicity.encode()))
    return dict(zip(cfg.quarters, deal(identities, len(cfg.quarters), random), strict=True))


def write_split(cfg: Config, ethnicity: str, identities: list[str]) -> dict[str, list[str]]:
    """Writes the split of one group's identities ("<group>/<identity>") to `cfg.split_dir` and returns it.

    Raises InputError if a different split exists already: teachers may have been trained on it.
    """
    path = cfg.split_dir / f"{ethnicity}.json"
    split = split_of(cfg, ethnicity, identities)
    if path.exists() and read_json(path) != split:
        raise InputError(f"{path} holds another split (other seed or identities): delete it to deal again.")
    write_json(path, split)
    return split


def require_split(cfg: Config) -> None:
    """Raises InputError that names the groups without a split, if there are any."""
    missing = [name for name in cfg.ethnicities if not (cfg.split_dir / f"{name}.json").exists()]
    if missing:
        first = command_of_run(cfg, "baseline_data_split.py")
        raise InputError(f"{cfg.split_dir} has no split of {', '.join(missing)}: run first: {first}")


def read_quarter(cfg: Config, quarter: str, index: Index) -> list[str]:
    """Reads the identities ("<group>/<identity>") of one quarter, over all groups.

    Raises InputError if a group has no split, or if its split was made from other identities or for another number of
    quarters.
    """
    require_split(cfg)
    chosen = []
    for ethnicity in cfg.ethnicities:
        path = cfg.split_dir / f"{ethnicity}.json"
        split = read_json(path)
        dealt = sorted(name for names in split.values() for name in names)
        if dealt != sorted(index.identities_of(ethnicity)):
            changed = difference(dealt, index.identities_of(ethnicity))
            raise InputError(f"{path} was made when data held other identities ({changed}): delete it and split again.")
        if tuple(split) != cfg.quarters:
            raise InputError(f"{path} holds {len(split)} quarters, expected {len(cfg.quarters)}: split again.")
        chosen += split[quarter]
    return chosen
