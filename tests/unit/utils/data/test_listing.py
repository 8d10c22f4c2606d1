"""Hidden and system entries belong to no data set, and images that are passed over are counted and named."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import encode, noise, put, write_images
from tests.runs import train
from utils.data import images, index
from utils.data.index import find_images, scan
from utils.data.listing import described, is_hidden
from utils.data.split import read_quarter, write_split
from utils.data.store import ImageStore
from utils.errors import InputError
from utils.prepare.contents import list_images, passed_over
from utils.prepare.overlap import read_pairs
from utils.prepare.rec import pack

JPEG = encode(noise(1))
FOLDERS = [".ipynb_checkpoints", "@eaDir", ".Trash-1000", "__MACOSX", "lost+found", "$RECYCLE.BIN", ".@__thumb"]
FOLDERS += ["@Recycle", "#recycle", "#snapshot", "~snapshot", "System Volume Information", ".git", "__pycache__"]


@pytest.mark.parametrize("name", [*FOLDERS, ".DS_Store", "._1.jpg", "Thumbs.db", "THUMBS.DB", "desktop.ini", "Icon\r"])
def test_names_of_systems_are_hidden(name):
    assert is_hidden(name)


@pytest.mark.parametrize("name", ["m.0123", "n000001", "@handle", "_a", "a.b", "John Doe", "$x", "#1", "lost"])
def test_names_of_identities_are_not_hidden(name):
    assert not is_hidden(name)


def clutter(data: Path) -> None:
    """Puts every system folder, with an image in it, below a group and an identity, and files of macOS beside images.

    They are in the data folder and in subfolders of `A`, and of its identity a1.
    """
    for name in FOLDERS:
        put(data / "A" / name / "1.jpg", JPEG)
        put(data / "A" / "a1" / name / "1.jpg" / "thumbnail.jpg", JPEG)
    for k in range(4):
        put(data / "A" / "a1" / f"._{k}.jpg", b"\0\5\x16\7")
    for folder in ("A", "A/a1"):
        for name in (".DS_Store", "Thumbs.db"):
            put(data / folder / name, b"\0")


HIDDEN = 2 * len(FOLDERS) + 4 + 4


def test_hidden_entries_change_no_index_and_are_counted_in_a_line(cfg, capsys):
    data = Path(cfg.data)
    clean = scan(data, cfg.ethnicities)
    assert clean.notes(data) == []
    clutter(data)
    found = scan(data, cfg.ethnicities)
    assert (found.digest, found.paths, found.identities) == (clean.digest, clean.paths, clean.identities)
    assert len(found.hidden) == HIDDEN and found.passed == found.empty == ()
    (note,) = found.notes(data)
    assert note.startswith(f"{HIDDEN} hidden or system entries in {data} are passed over (4 ._*, ")
    capsys.readouterr()
    assert ImageStore(cfg).digest == ImageStore(cfg).digest
    assert capsys.readouterr().out.count(note) == 2  # also when the index is read from the cache


def test_every_command_passes_the_same_entries_over(cfg, tmp_path, capsys):
    data = Path(cfg.data)
    clean = images.find(data)[0]
    clutter(data)
    assert images.find(data)[0] == clean
    assert passed_over(data, cfg.ethnicities, clean) == []
    contents = list_images(data, None)
    assert contents.groups == ("A", "B") and contents.paths == tuple(clean)
    assert contents.hidden == described(scan(data, cfg.ethnicities).hidden, data)
    for group in "AB":  # records name no group but those of BUPT-BalancedFace
        pack(data / group, (), tmp_path / f"rec {group}", processes=1)
    out = capsys.readouterr().out
    assert "12 images of 3 identities" in out and "8 images of 2 identities" in out
    assert f"{HIDDEN} hidden or system entries in {data / 'A'} are passed over" in out
    shutil.copy(Path(cfg.pairs) / "A_test.bin", Path(cfg.pairs) / "._B_test.bin")
    assert {path.name for path, _ in read_pairs(Path(cfg.pairs)).places} == {"A_test.bin", "B_test.bin"}


@pytest.fixture
def nested(cfg):
    """Moves half of the images of a1 and all of b1 into subfolders; `A` also holds images where stages read none."""
    data = Path(cfg.data)
    for source, target in {"A/a1": "A/a1/session/2", "B/b1": "B/b1/video"}.items():
        (data / target).mkdir(parents=True)
        for k in range(2 if "a1" in source else 0, 4):
            (data / source / f"{k}.jpg").rename(data / target / f"{k}.jpg")
    put(data / "A" / "loose.jpg", JPEG)
    put(data / "A" / "a2" / "9.bmp", b"BM")
    (data / "A" / "a4").mkdir()
    return cfg


def test_images_that_are_passed_over_are_counted_by_reason(nested):
    data = Path(nested.data)
    found = scan(data, nested.ethnicities)
    assert found.notes(data) == [
        f"8 images in {data} are passed over: "
        "1 outside of the folders of identities, such as A/loose.jpg; "
        "6 in subfolders of identities (nested_images reads them), such as A/a1/session/2/2.jpg; "
        "1 in a format that is not read (.bmp), such as A/a2/9.bmp. "
        f"2 identities in {data} have no image: A/a4, B/b1."
    ]
    assert len(found.paths) == 14 and found.identities == ("A/a1", "A/a2", "A/a3", "B/b2")


def test_nested_images_are_read_where_asked_for(nested, monkeypatch):
    monkeypatch.setattr(index, "SETTLED", 0.0)
    data, deep = Path(nested.data), replace(nested, nested_images=True)
    found = find_images(deep)
    assert found.identities == ("A/a1", "A/a2", "A/a3", "B/b1", "B/b2")
    assert np.bincount(found.identity).tolist() == [4] * 5
    assert found.paths[:4] == ("A/a1/0.jpg", "A/a1/1.jpg", "A/a1/session/2/2.jpg", "A/a1/session/2/3.jpg")
    assert found.passed == ("A/loose.jpg", "A/a2/9.bmp")
    assert len(find_images(nested).paths) == 14  # the two do not share an index
    assert find_images(deep).digest == found.digest
    put(data / "A/a1/session/2/new.jpg", JPEG)
    assert len(find_images(deep).paths) == len(found.paths) + 1
    assert len(ImageStore(deep).images) == len(found.paths) + 1
    assert list_images(data, ("A", "B"), nested=True).paths == find_images(deep).paths


def test_links_in_a_circle_are_left(cfg):
    data = Path(cfg.data)
    (data / "A/a1/again").symlink_to("..", target_is_directory=True)
    (data / "A/a2/self").symlink_to(".", target_is_directory=True)
    found = scan(data, cfg.ethnicities, nested=True)
    assert len(found.paths) >= 20 and "A/a2/self/0.jpg" not in found.paths


def test_a_group_whose_images_are_all_nested_names_the_setting(tmp_path):
    write_images(tmp_path, {"A/a1": {"video": 2}, "A/a2": {"video": 1}})
    with pytest.raises(InputError, match=r"A holds no image.* 3 images in .* \(nested_images reads them\)"):
        scan(tmp_path, ("A",))
    assert len(scan(tmp_path, ("A",), nested=True).paths) == 3


def test_identities_that_changed_are_named_when_a_run_or_a_split_is_refused(cfg):
    train(cfg, epochs=1)
    write_split(cfg, "A", ["A/a1", "A/a2", "A/a3"])
    write_split(cfg, "B", ["B/b1", "B/b2"])
    write_images(Path(cfg.data), {"A": {f"new{k}": 1 for k in range(4)}})
    shutil.rmtree(Path(cfg.data) / "A" / "a2")
    changed = r"4 added: A/new0, A/new1, A/new2, \.\.\.; 1 missing: A/a2"
    with pytest.raises(InputError, match=rf"identities changed, {changed}; images changed"):
        train(cfg, epochs=1)
    with pytest.raises(InputError, match=rf"held other identities \({changed}\)"):
        read_quarter(replace(cfg, is_teacher_baseline=True), "quarter1", find_images(cfg))
