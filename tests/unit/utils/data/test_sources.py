"""Several data sets as one: names, rows, shares and flips."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from config.config import Config
from tests.conftest import write_images
from tests.runs import train
from utils.data.columns import Cached, Column, Joined
from utils.data.faces import FLIPS, ORDER, Faces
from utils.data.sources import Sources, join, shared
from utils.data.store import ImageStore
from utils.errors import InputError


@pytest.fixture
def two(cfg, tmp_path) -> Config:
    """The data set of `cfg` (A: a1, a2, a3; B: b1, b2) and another, which shares the name A/a1."""
    write_images(tmp_path / "more", {"A": {"a0": 2, "a1": 3}, "B": {"b9": 3}})
    return replace(cfg, data=f"{cfg.data},{tmp_path}/more")


def test_data_stays_one_path_and_may_hold_several(tmp_path, monkeypatch):
    assert Config(data="a").data_paths == ("a",)
    assert Config(data=("a", "b")).data == "a,b"
    assert Config(data="a, b").data_paths == ("a", "b")
    given = Config.from_args(["--data", "a,b", "--data_flip", "on,off", "--data_share", "0.7,0.3"])
    assert (given.data_flip, given.data_share) == (("on", "off"), (0.7, 0.3))
    assert Config.from_args(given.changed) == given
    monkeypatch.chdir(tmp_path)
    Path("x,y").mkdir()
    assert Config(data="x,y").data_paths == ("x,y",)
    for settings, sentence in (
        ({"data": "a,a"}, "different paths"),
        ({"data": "a,"}, "different paths"),
        ({"data": "a,./a/"}, "different paths"),
        ({"data": "a,b", "data_share": (0.5,)}, "as many values as data has paths, 2"),
        ({"data": "a,b", "data_share": (0.5, 1.5)}, "above 0, and at most 1"),
        ({"data": "a,b", "data_flip": ("on", "no")}, "on or off for each data set"),
    ):
        with pytest.raises(InputError, match=sentence):
            Config(**settings)


def test_equal_names_are_told_apart_unless_they_are_one_person(two):
    store = Sources(two)
    names = ("A/a0", "A/a1", "A/a1@2", "A/a2", "A/a3", "B/b1", "B/b2", "B/b9")
    assert store.index.identities == names
    faces = Faces(two)
    assert faces.identities == names
    labels = faces.columns["label"].arrays[0]
    assert np.bincount(labels).tolist() == [2, 4, 3, 4, 4, 4, 4, 3]
    assert store.index.paths[20:25] == ("A/a0/0.jpg", "A/a0/1.jpg", "A/a1@2/0.jpg", "A/a1@2/1.jpg", "A/a1@2/2.jpg")
    one = Faces(replace(two, same_names_are_one=True))
    assert one.identities == tuple(name for name in names if "@" not in name)
    assert np.bincount(one.columns["label"].arrays[0]).tolist() == [2, 7, 4, 4, 4, 4, 3]
    assert [*Faces(two, teacher="B").identities] == ["B/b1", "B/b2", "B/b9"]


def test_a_name_in_two_groups_is_no_one_person(cfg, tmp_path):
    write_images(tmp_path / "more", {"A": {"b1": 2}, "B": {"x": 1}})
    both = replace(cfg, data=f"{cfg.data},{tmp_path}/more")
    assert "A/b1" in Sources(both).index.identities
    with pytest.raises(InputError, match="Identity b1 is in A and in B: give the two different names, or leave"):
        Sources(replace(both, same_names_are_one=True))


def test_rows_are_those_of_the_data_sets_one_after_another(two):
    first, second = (ImageStore(replace(two, data=path)) for path in two.data_paths)
    column = Faces(two).columns["image"]
    rows = np.array([27, 0, 19, 20, 5])
    expected = np.stack([second.images[7], first.images[0], first.images[19], second.images[0], first.images[5]])
    assert np.array_equal(column.gather(rows, None).numpy(), expected)
    flips = np.array([True, False, False, True, False])
    flipped = [image[:, ::-1] if flip else image for image, flip in zip(expected, flips, strict=True)]
    assert np.array_equal(column.gather(rows, flips).numpy(), np.stack(flipped))
    kept = Cached(column, np.arange(28), torch.device("cpu"))
    assert np.array_equal(kept.gather(rows, None).numpy(), expected)
    joined = Joined((np.arange(3)[:, None], np.arange(10, 12)[:, None]))
    assert joined.take(np.array([4, 0, 3])).tolist() == [[11], [0], [10]]
    assert Column((joined,)).width == 1


def test_one_data_set_is_as_before(cfg):
    store, plain = Sources(cfg), ImageStore(cfg)
    assert store.digest == plain.digest
    assert store.index.paths == plain.index.paths
    assert store.index.digest == plain.index.digest
    assert store.images.filename == plain.images.filename


@pytest.mark.parametrize("kind", ["identities", "images"])
def test_a_share_is_the_same_of_every_group_and_depends_on_the_seed(cfg, tmp_path, kind):
    counts = {f"x{k}": 3 for k in range(10)}, {f"y{k}": 2 for k in range(20)}
    write_images(tmp_path / "more", {"A": counts[0], "B": counts[1]})
    both = replace(cfg, data=f"{cfg.data},{tmp_path}/more", data_share=(1.0, 0.3), share_of=kind)
    store = Sources(both)
    chosen = shared(both, store.index, store.source)
    assert chosen[store.source == 0].all()
    group = np.array([path.split("/")[0] for path in store.index.paths])
    own = chosen & (store.source == 1)
    if kind == "identities":
        kept = [{store.index.identity[row] for row in np.flatnonzero(own & (group == name))} for name in "AB"]
        assert [len(one) for one in kept] == [3, 6]
        for one in kept:  # whole identities
            for identity in one:
                assert chosen[store.index.identity == identity].all()
    else:
        assert [int((own & (group == name)).sum()) for name in "AB"] == [9, 12]
    assert np.array_equal(chosen, shared(both, store.index, store.source))
    assert not np.array_equal(chosen, shared(replace(both, seed=1), store.index, store.source))
    assert len(Faces(both)) == chosen.sum()


def test_only_the_data_sets_that_may_be_flipped_are(two):
    plain, some = Faces(two, flip=True), Faces(replace(two, data_flip=("on", "off")), flip=True)
    for (rows, flips), (others, fewer) in zip(plain.batches(1, 0), some.batches(1, 0), strict=True):
        assert np.array_equal(rows, others)
        assert np.array_equal(fewer, flips & (rows < 20))
    step = np.random.default_rng((FLIPS, 0, 1, 0)).random(4) < 0.5
    order = np.random.default_rng((ORDER, 0, 1)).permutation(28)
    first_rows, first_flips = next(some.batches(1, 0))
    assert np.array_equal(first_rows, order[:4])
    assert np.array_equal(first_flips, step & (order[:4] < 20))


def test_a_run_on_several_data_sets_is_refused_on_others(two):
    train(two, epochs=1)
    folder = two.teacher_dir("T")
    assert (folder / "identities.txt").read_text().splitlines()[2] == "A/a1@2"
    assert json.loads((folder / "config.json").read_text())["sources"]["images"] == Sources(two).digest
    with pytest.raises(InputError, match=r"\(data_flip was \[\], now \['on', 'off'\]\)"):
        train(replace(two, data_flip=("on", "off")), epochs=1)
    with pytest.raises(InputError, match=r"identities changed, 3 missing: A/a0, A/a1@2, B/b9; images changed"):
        train(replace(two, data=two.data_paths[0]), epochs=1)


def test_three_data_sets_with_one_name_have_three_names(cfg):
    index = ImageStore(cfg).index
    names = join([index, index, index], False).identities
    assert [name for name in names if name.startswith("A/a1")] == ["A/a1", "A/a1@2", "A/a1@3"]
