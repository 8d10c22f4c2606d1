"""The file of identities beside a .bin: read back as written, and refused where it does not fit."""

import json
from pathlib import Path

import numpy as np
import pytest

from utils.data.identities import in_two_groups, read_identities, sidecar_of, write_identities
from utils.data.pairs import load_pairs
from utils.errors import InputError

SAME = np.array([True, False])
NAMES = [("a", "a"), ('b "\udce9', "c")]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "A_test.bin"


def test_identities_are_read_as_written(path):
    assert read_identities(path, SAME, "0") is None
    write_identities(path, "0", NAMES)
    assert list(map(tuple, read_identities(path, SAME, "0"))) == NAMES
    assert json.loads(sidecar_of(path).read_text())["sha256"] == "0"


@pytest.mark.parametrize(
    ("content", "digest", "sentence"),
    [
        ('{"sha256": "1", "identities": []}', "0", "belongs to another A_test.bin"),
        ('{"sha256": "0", "identities": [["a", "a"]]}', "0", "names 1 pairs, but there are 2"),
        (
            '{"sha256": "0", "identities": [["a", "b"], ["a", "b"]]}',
            "0",
            "pair 0 is genuine, but has the identities a and b",
        ),
        ('{"sha256": "0", "identities": [["a", "a"], ["a", 1]]}', "0", "must hold a list of two names per pair"),
        ('{"sha256": "0"}', "0", "must hold a list of two names per pair"),
        ("{", "0", "cannot be read"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(path, content, digest, sentence):
    sidecar_of(path).write_text(content)
    with pytest.raises(InputError, match=sentence):
        read_identities(path, SAME, digest)


def test_sets_are_loaded_with_their_identities(cfg):
    assert [pairs.identities for pairs in load_pairs(cfg).values()] == [None, None]
    pairs = load_pairs(cfg)["A"]
    names = [("a", "a") if same else ("a", "b") for same in pairs.same]
    write_identities(cfg.pairs_file("A"), pairs.digest, names)
    assert load_pairs(cfg)["A"].identities.tolist() == [list(pair) for pair in names]
    write_identities(cfg.pairs_file("B"), pairs.digest, names)
    with pytest.raises(InputError, match="B_test_identities.json belongs to another B_test.bin"):
        load_pairs(cfg)


def test_identities_in_two_groups_are_told_in_one_sentence():
    names = {"A": np.array([["a", "b"]]), "B": np.array([["b", "c"]]), "C": None}
    assert in_two_groups(names) == "Identities in two groups: 1, drawn as different ones: b (A, B)."
    assert in_two_groups({"A": names["A"], "C": None}) == ""
