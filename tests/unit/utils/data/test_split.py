"""The baseline's split: published sizes, seeded, independent of the order of the file system."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from utils.data.index import scan
from utils.data.split import deal, read_quarter, write_split
from utils.errors import InputError


@pytest.mark.parametrize(
    ("count", "sizes"), [(7000, [1750] * 4), (6997, [1750, 1749, 1749, 1749]), (3, [1, 1, 1, 0]), (5, [2, 1, 1, 1])]
)
def test_sizes(count, sizes):
    names = [f"m.{k:05}" for k in range(count)]
    parts = deal(names, 4, np.random.default_rng(0))
    assert [len(part) for part in parts] == sizes
    assert sorted(name for part in parts for name in part) == names


def test_the_split_is_random_seeded_and_independent_of_the_input_order():
    names = [f"m.{k}" for k in range(100)]
    one = deal(names, 4, np.random.default_rng(0))
    assert one == deal(names[::-1], 4, np.random.default_rng(0))
    assert one != deal(names, 4, np.random.default_rng(1))
    assert one[0] != sorted(names)[:25]


def test_one_group_at_a_time_equals_all_at_once(cfg):
    index = scan(Path(cfg.data), cfg.ethnicities)
    names = {g: [n for n in index.identities if n.startswith(g)] for g in "AB"}
    together = {g: write_split(cfg, g, names[g]) for g in "AB"}
    alone = replace(cfg, output=cfg.output + "2")
    assert {g: write_split(alone, g, names[g]) for g in "BA"} == together


def test_an_existing_split_of_another_seed_is_not_overwritten(cfg):
    names = [f"A/{k}" for k in range(40)]
    first = write_split(cfg, "A", names)
    assert write_split(cfg, "A", names) == first
    before = (cfg.split_dir / "A.json").read_text()
    with pytest.raises(InputError, match=r"A.json holds another split"):
        write_split(replace(cfg, seed=1), "A", names)
    assert (cfg.split_dir / "A.json").read_text() == before


def test_later_stages_name_the_groups_that_are_missing(cfg):
    index = scan(Path(cfg.data), cfg.ethnicities)
    write_split(cfg, "A", ["A/a1", "A/a2", "A/a3"])
    with pytest.raises(InputError, match="no split of B: run first: python baseline_data_split.py --data"):
        read_quarter(cfg, "quarter1", index)
    write_split(cfg, "B", ["B/b1", "B/b3"])
    with pytest.raises(InputError, match=r"B.json was made when data held other identities"):
        read_quarter(cfg, "quarter1", index)


def test_a_split_cannot_name_files_outside_the_data_folder(cfg):
    cfg = replace(cfg, is_teacher_baseline=True)
    index = scan(Path(cfg.data), cfg.ethnicities)
    for group in cfg.ethnicities:
        write_split(cfg, group, index.identities_of(group))
    path = cfg.split_dir / "A.json"
    path.write_text(path.read_text().replace("A/a1", "A/../../secret"))
    with pytest.raises(InputError, match="A.json was made when data held other identities"):
        read_quarter(cfg, "quarter1", index)
