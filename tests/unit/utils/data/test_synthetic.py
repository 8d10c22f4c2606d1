"""Generated faces: equal for equal seeds; groups differ only in the attributes that define identity."""

import numpy as np
import pytest

from utils.data.identities import read_identities
from utils.data.index import scan
from utils.data.pairs import load_bin
from utils.data.synthetic import ATTRIBUTES, MARKER, NAMES, draw_face, generate, identity_parameters, is_generated
from utils.errors import InputError


def test_each_group_has_four_identity_attributes_and_none_is_shared():
    assert len(NAMES) == len(set(NAMES)) == 16
    for group, attributes in enumerate(ATTRIBUTES):
        people = [identity_parameters(group, np.random.default_rng(k)) for k in range(300)]
        between = np.std([mean for mean, _ in people], 0)
        within = np.mean([spread for _, spread in people], 0)
        carries = np.isin(NAMES, attributes)
        assert carries.sum() == 4
        assert (between[carries] > 4 * within[carries]).all()
        assert (between[~carries] < 0.5 * within[~carries]).all()


def test_a_face_depends_on_its_seed():
    parameters = identity_parameters(0, np.random.default_rng(1))
    one, again, other = (draw_face(*parameters, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert one.shape == (112, 112, 3)
    assert one.dtype == np.uint8
    assert np.array_equal(one, again)
    assert np.abs(one.astype(int) - other).mean() > 5
    assert 20 < one.mean() < 235


def test_equal_seeds_write_equal_files_and_other_seeds_others(tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        generate(tmp_path / name, ("A", "B"), identities=2, images=2, pairs=20, seed=seed)

    def contents(name):
        folder = tmp_path / name
        files = (path for path in folder.rglob("*") if path.suffix in (".jpg", ".bin"))
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    assert len(contents("one")) == 2 * 2 * 2 + 2
    assert contents("one") == contents("again")
    assert contents("one").keys() == contents("other").keys()
    assert all(content != contents("other")[name] for name, content in contents("one").items())


def test_the_stages_can_read_the_files(tmp_path):
    generate(tmp_path / "x", ("A", "B"), identities=3, images=2, pairs=40)
    index = scan(tmp_path / "x" / "train", ("A", "B"))
    assert len(index.paths) == 12
    assert len(index.identities) == 6
    path = tmp_path / "x" / "pairs" / "B_test.bin"
    pairs = load_bin(path)
    assert pairs.same.tolist() == ([True] * 2 + [False] * 2) * 10
    identities = read_identities(path, pairs.same, pairs.digest)
    assert ((identities[:, 0] == identities[:, 1]) == pairs.same).all()
    assert len(np.unique(identities.astype(str))) == 20 + 2 * 20  # no two pairs share one
    assert is_generated(tmp_path / "x" / "train")
    assert "generated" in (tmp_path / "x" / "pairs" / MARKER).read_text()


def test_a_folder_is_generated_once_and_another_folder_is_not_overwritten(tmp_path):
    generate(tmp_path / "x", ("A",), identities=2, images=2, pairs=20)
    image = next((tmp_path / "x").rglob("*.jpg"))
    time = image.stat().st_mtime_ns
    generate(tmp_path / "x", ("A",), identities=2, images=2, pairs=20)
    assert image.stat().st_mtime_ns == time
    generate(tmp_path / "x", ("A",), identities=3, images=2, pairs=20)
    assert len(list((tmp_path / "x" / "train" / "A").iterdir())) == 3

    (tmp_path / "photographs").mkdir()
    with pytest.raises(InputError, match="does not hold generated faces"):
        generate(tmp_path / "photographs", ("A",), identities=2, images=2, pairs=20)
    with pytest.raises(InputError, match="one to four groups"):
        generate(tmp_path / "y", tuple("ABCDE"))
