"""Conversion of a folder to train.rec and back: equal bytes, equal labels, a list of all files that are left out."""

import argparse
import csv
import os
from pathlib import Path

import numpy as np
import pytest

from config.config import Config
from tests.conftest import encode, full_disk, full_disk_at, noise, write_images
from utils.data.index import scan
from utils.data.recordio import MAGIC_BYTES, image_of, read_index, write_records
from utils.data.store import ImageStore
from utils.errors import InputError, NotWritten
from utils.prepare import rec

COUNTS = {"African": {"m.2": 2, "m.10": 3}, "Caucasian": {"m.1": 1, "m.3": 2}}


def run(*words, processes: int = 1) -> None:
    parser = argparse.ArgumentParser()
    rec.add_arguments(parser)
    rec.run(parser.parse_args([*map(str, words), "--processes", str(processes)]))


@pytest.fixture
def tree(tmp_path) -> Path:
    write_images(tmp_path / "tree", COUNTS)
    return tmp_path / "tree"


@pytest.fixture
def packed(tree, tmp_path) -> Path:
    run("--folder", tree, "--ethnicities", "Caucasian,African", "--output", tmp_path / "rec")
    return tmp_path / "rec"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def failures(folder: Path) -> list[list[str]]:
    with open(folder / "failures.csv", newline="") as file:
        return [*csv.reader(file)][1:]


def records(folder: Path) -> list[tuple[bytes, int, int]]:
    found, data = read_index(folder), (folder / "train.rec").read_bytes()
    images = [
        image_of(data[begin : begin + length]) for begin, length in zip(found.offsets, found.lengths, strict=True)
    ]
    return [*zip(images, found.identity.tolist(), found.group.tolist(), strict=True)]


def settings(data: Path, groups: tuple[str, ...]) -> Config:
    return Config(data=str(data), cache=str(data.parent / "cache"), ethnicities=groups)


# Folder to train.rec --------------------------------------------------------------------------------------------------


def test_records_are_the_files_sorted_by_name(tree, tmp_path, capsys):
    packed = tmp_path / "rec"
    run("--folder", tree, "--ethnicities", "Caucasian,African", "--output", packed)
    names = ["African/m.10", "African/m.2", "Caucasian/m.1", "Caucasian/m.3"]
    expected = [
        ((tree / name / f"{k}.jpg").read_bytes(), number, 3 if name.startswith("African") else 0)
        for number, (name, count) in enumerate(zip(names, (3, 2, 1, 2), strict=True))
        for k in range(count)
    ]
    assert records(packed) == expected
    assert (packed / "property").read_text() == "4,112,112\n"
    assert (packed / "identities.txt").read_text() == "".join(f"{k}\t{name}\n" for k, name in enumerate(names))
    assert not (packed / "failures.csv").exists()
    said = capsys.readouterr().out
    assert "8 images of 4 identities" in said
    assert f"--data {packed}" in said


def test_stages_read_the_same_data_from_records_and_folder(tree, packed):
    groups = ("African", "Caucasian")
    one, other = (ImageStore(settings(data, groups)) for data in (tree, packed))
    assert np.array_equal(one.images, other.images)
    assert np.array_equal(one.index.identity, other.index.identity)
    assert [name.split("/")[0] for name in one.index.identities] == [n.split("/")[0] for n in other.index.identities]


def test_a_folder_without_groups(tmp_path):
    write_images(tmp_path, {"faces": {"b": 2, "a": 1}})
    run("--folder", tmp_path / "faces", "--output", tmp_path / "rec")
    assert [(identity, group) for _, identity, group in records(tmp_path / "rec")] == [(0, -1), (1, -1), (1, -1)]
    assert (tmp_path / "rec" / "identities.txt").read_text() == "0\ta\n1\tb\n"


def test_bad_images_are_left_out_and_listed(tree, tmp_path, capsys):
    (tree / "African/m.10/1.jpg").write_bytes(b"")
    (tree / "African/m.2/0.jpg").write_bytes(encode(noise(1))[:-500])
    (tree / "Caucasian/m.1/0.jpg").write_bytes(encode(noise(1, 100)))
    (tree / "Caucasian/m.3/gone.jpg").symlink_to("nowhere.jpg")
    run("--folder", tree, "--ethnicities", "African,Caucasian", "--output", tmp_path / "rec")
    assert failures(tmp_path / "rec") == [
        ["African/m.10/1.jpg", "is empty"],
        ["African/m.2/0.jpg", "is a truncated JPEG"],
        ["Caucasian/m.1/0.jpg", "is 100 x 100, not 112 x 112"],
        ["Caucasian/m.3/gone.jpg", "cannot be read (No such file or directory)"],
    ]
    assert [identity for _, identity, _ in records(tmp_path / "rec")] == [0, 0, 1, 3, 3]
    assert (tmp_path / "rec" / "property").read_text() == "4,112,112\n"
    assert "4 images are left out" in capsys.readouterr().out


def test_misplaced_images_are_listed(tree, tmp_path, capsys):
    (tree / "African" / "portrait.jpg").write_bytes(encode(noise(1)))
    (tree / "African" / "m.2" / "scan.tiff").write_bytes(encode(noise(1), ".tiff"))
    (tree / "Caucasian" / "other.jpg").write_bytes(encode(noise(1)))  # a group that is not packed
    run("--folder", tree, "--ethnicities", "African", "--output", tmp_path / "rec")
    assert failures(tmp_path / "rec") == [
        ["African/m.2/scan.tiff", "is passed over, as by stages"],
        ["African/portrait.jpg", "is passed over, as by stages"],
    ]
    assert len(records(tmp_path / "rec")) == 5
    said = capsys.readouterr().out
    assert "5 images of 2 identities" in said
    assert "2 images are left out" in said


def test_several_processes_give_the_same(tmp_path):
    """Uses more images than one chunk of a process, one of them bad."""
    write_images(tmp_path, {"faces": {"a": 50, "b": 50}})
    (tmp_path / "faces" / "b" / "7.jpg").write_bytes(b"")
    for processes in (1, 2):
        run("--folder", tmp_path / "faces", "--output", tmp_path / f"rec{processes}", processes=processes)
        run("--rec", tmp_path / f"rec{processes}", "--output", tmp_path / f"back{processes}", processes=processes)
    for name in ("rec", "back"):
        one, two = (contents(tmp_path / f"{name}{processes}") for processes in (1, 2))
        for found in (one, two):
            found.pop("rec.json", None)  # contains the source folder
        assert one == two
        assert len(one) >= (99 if name == "back" else 4)


def test_an_output_with_other_files_is_refused(tree, packed, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "new", target_is_directory=True)
    (tmp_path / "new").mkdir()
    given = ("--folder", tree, "--ethnicities", "African")
    with pytest.raises(InputError, match=r"mine holds thesis\.txt, which is not of this command"):
        run(*given, "--output", tmp_path / "mine")
    with pytest.raises(InputError, match=r"tree lies in .*tree: set --output"):
        run(*given, "--output", tree)
    with pytest.raises(InputError, match="must be different names"):
        run("--folder", tree, "--ethnicities", "African,African", "--output", tmp_path / "x")
    run("--rec", packed, "--output", tmp_path / "link")  # the target of the link
    assert len([*(tmp_path / "new").rglob("*.jpg")]) == 8


def test_without_a_usable_image_there_are_no_records(tmp_path):
    write_images(tmp_path, {"faces": {"a": 1}})
    (tmp_path / "faces/a/0.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"None of the 1 images .*failures.csv says why"):
        run("--folder", tmp_path / "faces", "--output", tmp_path / "rec")
    assert failures(tmp_path / "rec") == [["a/0.jpg", "is no JPEG, PNG or WebP image"]]
    assert not (tmp_path / "rec" / "train.rec").exists()


def test_bad_arguments_for_packing_are_refused(tree, packed, tmp_path):
    new = tmp_path / "new"
    for words, reason in (
        (("--folder", tree, "--ethnicities", "African,Martian", "--output", new), "not for Martian: leave"),
        (("--folder", tree, "--ethnicities", "African,Asian", "--output", new), "no folder for Asian"),
        (("--folder", tmp_path / "nowhere", "--output", new), "There is no folder"),
        (("--folder", packed, "--output", new), "holds a train.rec already"),
        (("--folder", tree, "--ethnicities", "African", "--output", packed), "train.rec in .* already: delete it"),
        (("--folder", tree, "--groups", "--output", new), "--groups goes with --rec"),
        (("--rec", packed, "--ethnicities", "African", "--output", new), "--ethnicities goes with --folder"),
    ):
        before = contents(packed)
        with pytest.raises(InputError, match=reason):
            run(*words)
        assert contents(packed) == before
        assert not new.exists()


def test_a_full_disk_leaves_no_records(tree, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.data.recordio._record", full_disk)
    with pytest.raises(NotWritten, match=r"train.rec could not be written \(No space left"):
        run("--folder", tree, "--ethnicities", "African", "--output", tmp_path / "rec")
    assert [*contents(tmp_path / "rec")] == ["identities.txt"]


# train.rec to folder --------------------------------------------------------------------------------------------------


def test_unpacked_images_equal_the_originals(tree, packed, tmp_path):
    run("--rec", packed, "--groups", "--output", tmp_path / "back")
    names = [f"{group}/{number:08}/{key:08}" for _, number, key, group in _keys(packed)]
    expected = {f"{name}.jpg": image for name, (image, *_) in zip(names, records(packed), strict=True)}
    found = contents(tmp_path / "back")
    del found["rec.json"]
    assert found == expected
    assert "African/00000000/00000001.jpg" in found
    assert [*scan(tmp_path / "back", COUNTS).identity] == [*scan(tree, COUNTS).identity]


def _keys(folder: Path) -> list[tuple]:
    found = read_index(folder)
    groups = ["Caucasian" if group == 0 else "African" for group in found.group]
    return [*zip(found.offsets, found.identity, found.keys, groups, strict=True)]


def test_packing_unpacked_records_gives_equal_records(tmp_path):
    """Uses keys of one and two digits, which would change their order as text without padding."""
    tree, packed = tmp_path / "tree", tmp_path / "rec"
    write_images(tmp_path, {"tree": {"African/m.2": 12, "Caucasian/m.1": 3}})
    run("--folder", tree, "--ethnicities", "African,Caucasian", "--output", packed)
    run("--rec", packed, "--groups", "--output", tmp_path / "back")
    run("--folder", tmp_path / "back", "--ethnicities", "African,Caucasian", "--output", tmp_path / "again")
    for name in ("train.rec", "train.idx", "property"):
        assert (tmp_path / "again" / name).read_bytes() == (packed / name).read_bytes()


def test_without_groups_and_without_an_index(packed, tmp_path):
    (packed / "train.idx").unlink()
    run("--rec", packed, "--output", tmp_path / "back")
    assert len([*(tmp_path / "back").glob("0000000?/*.jpg")]) == 8


def with_magic(image: bytes) -> bytes:
    """Adds a comment with the magic number at every alignment."""
    text = b"".join(MAGIC_BYTES + b"x" * (1 + k) for k in range(8))
    return image[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + image[2:]


def test_pngs_and_images_with_the_magic_number_are_unpacked(tmp_path):
    images = [with_magic(encode(noise(1))), encode(noise(2), ".png"), encode(noise(3, 300))]
    write_records(tmp_path / "rec", [(image, k, -1) for k, image in enumerate(images)], 3)
    run("--rec", tmp_path / "rec", "--output", tmp_path / "back")
    found = contents(tmp_path / "back")
    names = [f"{k:08}/{k + 1:08}{ending}" for k, ending in enumerate((".jpg", ".png", ".jpg"))]
    assert [found[name] for name in names] == images


def test_records_without_an_image_are_listed(tmp_path, capsys):
    images = [encode(noise(1)), b"", b"no image", encode(noise(2))[:-500], encode(noise(4), ".webp")]
    write_records(tmp_path / "rec", [(image, 0, -1) for image in images], 1)
    run("--rec", tmp_path / "rec", "--output", tmp_path / "back")
    assert failures(tmp_path / "back") == [
        ["00000000/00000002", "is empty"],
        ["00000000/00000003", "is no JPEG, PNG or WebP image"],
        ["00000000/00000004", "is a truncated JPEG"],
    ]
    assert sorted(path.name for path in (tmp_path / "back").glob("*/*")) == ["00000001.jpg", "00000005.webp"]
    assert "3 images are left out" in capsys.readouterr().out
    write_records(tmp_path / "none", [(b"no image", 0, -1)], 1)
    with pytest.raises(InputError, match="None of the 1 records"):
        run("--rec", tmp_path / "none", "--output", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_bad_arguments_for_unpacking_are_refused(packed, tmp_path):
    new = tmp_path / "new"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    write_records(tmp_path / "five", [(encode(noise(1)), 0, 5)], 1)
    write_records(tmp_path / "none", [(encode(noise(1)), 0, -1)], 1)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "train.rec").write_bytes((packed / "train.rec").read_bytes()[:-100])
    for words, reason in (
        (("--rec", tmp_path, "--output", new), "There is no file .*train.rec"),
        (("--rec", tmp_path / "cut", "--output", new), "is a truncated record"),
        (("--rec", packed, "--output", tmp_path / "full"), "full is there already"),
        (("--rec", tmp_path / "five", "--groups", "--output", new), "key 1 has the group 5, and names are known for 0"),
        (("--rec", tmp_path / "none", "--groups", "--output", new), "key 1 has no group"),
    ):
        with pytest.raises(InputError, match=reason):
            run(*words)
        assert not new.exists()
        assert not new.with_name("new.partial").exists()


class Killed(BaseException):
    pass


def killed_after(images: int, monkeypatch) -> None:
    replaced, left = os.replace, [images]

    def stop(source, target):
        is_image = str(target).endswith(".jpg")
        if is_image and not left[0]:
            raise Killed
        replaced(source, target)
        left[0] -= is_image

    monkeypatch.setattr(rec.os, "replace", stop)


def test_an_interrupted_folder_is_hidden_and_resumed(packed, tmp_path, monkeypatch):
    whole, back = tmp_path / "whole", tmp_path / "back"
    run("--rec", packed, "--groups", "--output", whole)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(5, patch)
        run("--rec", packed, "--groups", "--output", back)
    assert not back.exists()
    partial = tmp_path / "back.partial"
    done = sorted(partial.rglob("*.jpg"))
    assert len(done) == 5
    assert len([*partial.glob("*.partial")]) == 1
    cut = done[0].read_bytes()
    done[0].write_bytes(cut[:100])  # as after a power cut
    untouched = {path: path.stat().st_mtime_ns for path in done[1:]}
    run("--rec", packed, "--groups", "--output", back)
    assert contents(back) == contents(whole)
    assert not partial.exists()
    assert {partial / path.relative_to(back): path.stat().st_mtime_ns for path in back.rglob("*.jpg")}.items() >= (
        untouched.items()
    )


def test_a_folder_is_not_resumed_with_other_records(tree, packed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(2, patch)
        run("--rec", packed, "--groups", "--output", tmp_path / "back")
    run("--folder", tree, "--ethnicities", "African", "--output", tmp_path / "other")
    for words in (("--rec", tmp_path / "other", "--groups"), ("--rec", packed)):
        with pytest.raises(InputError, match=r"back.partial is not filled from this train.rec in this way: delete it"):
            run(*words, "--output", tmp_path / "back")
    run("--rec", packed, "--groups", "--output", tmp_path / "back")


def test_a_full_disk_is_reported_with_the_file(packed, tmp_path, monkeypatch):
    with (
        monkeypatch.context() as patch,
        pytest.raises(NotWritten, match=r"2.jpg could not be written \(No space left"),
    ):
        patch.setattr(rec.os, "replace", full_disk_at("00000000/00000002.jpg"))
        run("--rec", packed, "--output", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    run("--rec", packed, "--output", tmp_path / "back")
    assert len([*(tmp_path / "back").rglob("*.jpg")]) == 8
