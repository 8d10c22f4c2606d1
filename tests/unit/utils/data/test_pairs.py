"""Verification sets: all variants of .bin files, and the cache of their decoded images."""

import pickle
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.verification import validator
from tests.conftest import encode, full_disk, noise, write_pairs
from utils.data import store
from utils.data.pairs import Pairs, _DType, _latin1, load_bin, load_pairs
from utils.errors import InputError

IMAGES = [encode(noise(k)) for k in range(4)]
SAME = [True, False]
ARRAYS = [np.frombuffer(image, np.uint8) for image in IMAGES]


def test_a_bad_image_is_named_by_its_index_in_the_file(tmp_path):
    images = [IMAGES[0], IMAGES[0], IMAGES[1], b"x"]
    (tmp_path / "x.bin").write_bytes(pickle.dumps((images, SAME)))
    with pytest.raises(InputError, match="image 3 is no JPEG, PNG or WebP image"):
        load_bin(tmp_path / "x.bin")


def python2_pickle(images: list[bytes], same: list[bool]) -> bytes:
    """Returns the pickle that Python 2 writes with protocol 2 for a tuple of a list of str and a list of bool."""

    def string(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    flags = b"".join(b"\x88" if value else b"\x89" for value in same)
    return b"\x80\x02(" + b"](" + b"".join(map(string, images)) + b"e" + b"](" + flags + b"e" + b"t."


@pytest.mark.parametrize(
    "content",
    [
        *(pickle.dumps((IMAGES, SAME), protocol=protocol) for protocol in range(6)),
        python2_pickle(IMAGES, SAME),
        *(pickle.dumps((IMAGES, np.array(SAME)), protocol=protocol) for protocol in range(2, 6)),
        *(pickle.dumps((ARRAYS, list(map(np.bool_, SAME))), protocol=protocol) for protocol in range(2, 6)),
    ],
)
def test_bin_files_of_every_protocol_are_read(content, tmp_path):
    (tmp_path / "x.bin").write_bytes(content)
    pairs = load_bin(tmp_path / "x.bin")
    assert isinstance(pairs, Pairs)
    assert pairs.images.shape == (4, 112, 112, 3)
    assert pairs.images.dtype == np.uint8
    assert pairs.same.tolist() == SAME
    png = pickle.dumps(([encode(noise(k), ".png") for k in range(4)], SAME))
    (tmp_path / "png.bin").write_bytes(png)
    assert np.array_equal(load_bin(tmp_path / "png.bin").images[3], noise(3)[..., ::-1])


class Gadget:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "gadget",
    [
        Gadget(Path.touch, Path("executed")),
        Gadget(eval, "open('executed', 'w')"),
        Gadget(exec, "open('executed', 'w')"),
        Gadget(__import__("os").system, "touch executed"),
        Gadget(getattr, __import__("os"), "system"),
        Gadget(np.load, "executed", "r"),
        Gadget(np.ndarray, (4,), np.dtype("O"), b"A" * 32),  # arbitrary pointers
        np.array([Path("x")], dtype=object),
    ],
    ids=["touch", "eval", "exec", "system", "getattr", "numpy", "ndarray", "objects"],
)
def test_a_bin_file_cannot_run_code(gadget, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        content = pickle.dumps(([gadget, *IMAGES[1:]], SAME), protocol=2)
    except (pickle.PicklingError, TypeError):  # a module cannot be pickled: write its name
        content = b"cos\nsystem\n(S'touch executed'\ntR."
    Path("x.bin").write_bytes(content)
    with pytest.raises(InputError, match="x.bin is damaged or no set of pairs"):
        load_bin("x.bin")
    assert not Path("executed").exists()


def test_a_bin_file_cannot_change_the_reader(tmp_path):
    """The opcode BUILD sets attributes of the object on the stack: here, of a function that the reader allows."""
    before = (_latin1.__doc__, _latin1.__defaults__, vars(_latin1).copy())
    for name in (b"c_codecs\nencode\n", b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\nscalar\n"):
        changed = name + b"(N}V__doc__\nVchanged\nsV__defaults__\n(VO\ntstb"
        (tmp_path / "x.bin").write_bytes(b"\x80\x02((l" + changed + b"a(l\x88at.")
        with pytest.raises(InputError, match="x.bin"):
            load_bin(tmp_path / "x.bin")
    assert (_latin1.__doc__, _latin1.__defaults__, vars(_latin1)) == before
    assert _DType.__init__.__defaults__ is None
    assert _DType.__doc__ != "changed"


@pytest.mark.parametrize(
    "content", [b"\x80\x02]r" + struct.pack("<I", 1 << 24) + b".", b"\x80\x05\x96" + struct.pack("<Q", 1 << 28) + b"."]
)
def test_a_small_file_takes_little_memory(content, tmp_path):
    """The file has a few bytes, with a very large index into the memo, or the header of a large bytearray."""
    (tmp_path / "x.bin").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="no set of pairs"):
            load_bin(tmp_path / "x.bin")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (pickle.dumps((IMAGES, SAME))[:-100], "damaged or no set of pairs"),
        (b"", "x.bin is empty: get it again"),
        (b"\n<!doctype html><html>Sign in</html>", "x.bin is a web page instead, perhaps one that asks to log in"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "x.bin is a pointer of Git LFS"),
        (b"/annex/objects/MD5E-s9--0.bin\n", "x.bin is a pointer of git-annex"),
        (b"PK\3\4" + bytes(99), "x.bin is a zip archive: unpack it"),
        (b"\x1f\x8b" + bytes(99), "x.bin is a gzip archive: unpack it"),
        (b"hello", "damaged or no set of pairs"),
        (pickle.dumps([IMAGES, SAME, 1]), r"expected \(images, same or not\)"),
        (pickle.dumps((1, 2)), "expected two lists"),
        (pickle.dumps((np.array(1), SAME)), "expected two lists"),
        (pickle.dumps(([], [])), "holds 0 images for 0 pairs"),
        (pickle.dumps((IMAGES[:3], SAME)), "holds 3 images for 2 pairs"),
        (pickle.dumps((IMAGES, [True])), "holds 4 images for 1 pairs"),
        (pickle.dumps((IMAGES, [True, 7])), "must be True or False"),
        (pickle.dumps(([*IMAGES[:3], b"x"], SAME)), "image 3 is no JPEG, PNG or WebP image"),
        (pickle.dumps(([*IMAGES[:3], 5], SAME)), "image 3 is no bytes, but int"),
        (
            pickle.dumps(([encode(noise(0, 96)), *IMAGES[1:]], SAME)),
            "image 0 is 96 x 96, not 112 x 112. Align the faces to 112",
        ),
    ],
)
def test_other_files_are_refused(content, sentence, tmp_path):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        load_bin(tmp_path / "x.bin")


def test_too_few_pairs_are_found_before_training(cfg):
    write_pairs(cfg.pairs_file("B"), pairs=9)
    with pytest.raises(InputError, match=r"B_test.bin holds 9 pairs, too few for 10 folds"):
        load_pairs(cfg)


def test_a_set_without_both_kinds_in_every_fold_is_said_and_refused_alone(cfg, capsys):
    def write(kinds: list[bool]) -> None:
        cfg.pairs_file("B").write_bytes(pickle.dumps(([IMAGES[0]] * 2 * len(kinds), kinds), protocol=2))

    write([True] * 20)
    assert [*load_pairs(cfg)] == ["A", "B"]
    line = (
        f"{cfg.pairs_file('B')}: 10 of 10 folds hold no impostor pair: its accuracy is left out of averages, and choos"
    )
    assert line in capsys.readouterr().out
    write([True, True, *[True, False] * 9])
    load_pairs(cfg)
    assert "1 of 10 folds hold no impostor pair" in capsys.readouterr().out
    alone = replace(cfg, pairs_sets=("B_test",))
    with pytest.raises(InputError, match=r"B_test.bin: 1 of 10 folds hold no impostor pair: give each tenth"):
        load_pairs(alone)
    write([True, False] * 10)
    load_pairs(alone)
    assert "folds" not in capsys.readouterr().out


def test_the_average_is_that_of_sets_of_both_kinds(cfg):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 112 * 112, 8))
    whole, _ = validator(network, load_pairs(cfg), cfg)()
    cfg.pairs_file("B").write_bytes(pickle.dumps(([IMAGES[0]] * 40, [True] * 20), protocol=2))
    scores, value = validator(network, load_pairs(cfg), cfg, best_on="B")()
    assert scores["B"] == 100 and value == scores["average"] == scores["A"] == whole["A"]


def test_the_usual_sets_that_are_there_are_named(cfg):
    for name in ("lfw", "cfp_fp", "agedb_30"):
        write_pairs(Path(cfg.pairs) / f"{name}.bin")
    with pytest.raises(InputError, match=r"Missing: .*calfw.bin, .*cplfw.bin\. .* --pairs_sets lfw,cfp_fp,agedb_30$"):
        load_pairs(replace(cfg, ethnicities=()))


def test_all_missing_bin_files_are_named(cfg):
    for path in (cfg.pairs_file("A"), cfg.pairs_file("B")):
        path.unlink()
    with pytest.raises(InputError, match=r"Missing: .*A_test.bin, .*B_test.bin"):
        load_pairs(cfg)


def test_pairs_are_decoded_once_into_the_cache(tmp_path, monkeypatch, capsys):
    path, cache = tmp_path / "x.bin", tmp_path / "cache"
    path.write_bytes(pickle.dumps(([encode(noise(k), ".png") for k in range(600)], [True, False] * 150)))
    plain = load_bin(path)
    assert isinstance(load_bin(path, cache).distinct, np.memmap)
    stored = next(cache.glob("*.npy"))
    with open(stored, "r+b") as file:  # damages the last of three blocks
        file.seek(-1000, 2)
        file.write(bytes(100))
    decoded = []
    whole = store.decode
    monkeypatch.setattr("utils.data.pairs.decode", lambda content: decoded.append(1) or whole(content))
    mended, again = load_bin(path, cache), load_bin(path, cache)
    assert len(decoded) == 600 - 512
    assert f"{stored} is damaged" in capsys.readouterr().out
    for pairs in (mended, again):
        assert np.array_equal(pairs.images, plain.images)
        assert (pairs.same.tolist(), pairs.digest) == (plain.same.tolist(), plain.digest)
    path.write_bytes(pickle.dumps((IMAGES, SAME)))
    assert np.array_equal(load_bin(path, cache).images, load_bin(path).images)
    assert [*cache.glob("*.npy")] == [stored]


def test_pairs_are_kept_in_memory_if_the_disk_is_full(tmp_path, monkeypatch, capsys):
    path, cache = tmp_path / "x.bin", tmp_path / "cache"
    path.write_bytes(pickle.dumps((IMAGES, SAME)))
    cache.write_text("a file where the folder should be")
    assert load_bin(path, cache).images.shape == (4, 112, 112, 3)
    said = f"could not be written (File exists). The images of {path} are decoded into memory instead, each time."
    assert said in capsys.readouterr().out

    monkeypatch.setattr("utils.storage.arrays._take_room", full_disk)
    pairs = load_bin(path, tmp_path / "full")
    assert "(No space left on device). The images" in capsys.readouterr().out
    assert np.array_equal(pairs.images, load_bin(path).images)
    assert not list((tmp_path / "full").iterdir())


def test_a_bad_image_leaves_no_file_in_the_cache(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps(([*IMAGES[:3], b"x"], SAME)))
    with pytest.raises(InputError, match="image 3 is no JPEG, PNG or WebP image"):
        load_bin(tmp_path / "x.bin", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
