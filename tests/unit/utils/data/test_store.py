"""Index and decoded images: labels from names, detection of changed files, a list of all bad images."""

import os
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.conftest import encode, noise, write_images
from utils.data import index, recordio, store
from utils.data.index import find_images, scan
from utils.data.store import ImageStore, decode
from utils.errors import InputError


def test_the_index_is_sorted_for_any_listing_order(tmp_path, monkeypatch):
    write_images(tmp_path, {"B": {"b": 2}, "A": {"z": 1, "a10": 1, "a2": 12}})
    plain = scan(tmp_path, ("B", "A"))
    assert plain.identities == ("A/a10", "A/a2", "A/z", "B/b")
    assert list(plain.paths) == sorted(plain.paths)
    assert plain.identity.tolist() == [0] + [1] * 12 + [2, 3, 3]

    listed = os.scandir

    class Reversed(list):
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    monkeypatch.setattr(os, "scandir", lambda path: Reversed(list(listed(path))[::-1]))
    assert scan(tmp_path, ("A", "B")).paths == plain.paths


def test_images_are_decoded_as_opencv_decodes_them(cfg):
    store = ImageStore(cfg)
    for row, path in enumerate(store.index.paths):
        bgr = cv2.imread(str(Path(cfg.data) / path))
        assert np.array_equal(store.images[row], bgr[..., ::-1])
    assert store.images.shape == (20, 112, 112, 3)
    assert store.usable.all()


def test_grey_and_png_images_are_read(cfg):
    folder = Path(cfg.data) / "A" / "a1"
    (folder / "grey.jpg").write_bytes(encode(noise(0)[..., 0]))
    (folder / "x.PNG").write_bytes(encode(noise(1), ".png"))
    store = ImageStore(cfg)
    rows = {Path(path).name: row for row, path in enumerate(store.index.paths)}
    grey, png = store.images[rows["grey.jpg"]], store.images[rows["x.PNG"]]
    assert np.array_equal(grey[..., 0], grey[..., 2])
    assert np.array_equal(png, noise(1)[..., ::-1])


def test_an_unchanged_folder_is_not_decoded_again(cfg, capsys):
    first = ImageStore(cfg)
    assert "Decoding 20 images" in capsys.readouterr().out
    second = ImageStore(cfg)
    assert capsys.readouterr().out == ""
    assert second.digest == first.digest
    assert np.array_equal(second.images, first.images)


def test_the_disk_space_is_printed_before_decoding(cfg, capsys):
    ImageStore(cfg)
    assert "once: 0.8 MB in" in capsys.readouterr().out


def image_of(cfg, name="A/a1/0.jpg"):
    return Path(cfg.data) / name


def change_content(cfg):
    image_of(cfg).write_bytes(encode(noise(99)))


def change_content_but_not_size(cfg):
    content = bytearray(image_of(cfg).read_bytes())
    content[len(content) // 2] ^= 1
    image_of(cfg).write_bytes(content)


def add(cfg):
    image_of(cfg, "A/a1/new.jpg").write_bytes(encode(noise(99)))


def remove(cfg):
    image_of(cfg).unlink()


def rename(cfg):
    image_of(cfg).rename(image_of(cfg, "A/a1/z.jpg"))


def damage_the_array(cfg):
    path = cfg.cache_dir / "images.npy"
    path.write_bytes(path.read_bytes()[:-500])


def damage_one_image(cfg):
    with open(cfg.cache_dir / "images.npy", "rb+") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"x")


def damage_the_sidecar(cfg):
    path = cfg.cache_dir / "images.json"
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    "change",
    [
        change_content,
        change_content_but_not_size,
        add,
        remove,
        rename,
        damage_the_array,
        damage_one_image,
        damage_the_sidecar,
    ],
    ids=lambda change: change.__name__,
)
def test_a_cache_that_no_longer_matches_is_made_again(cfg, capsys, change):
    first = ImageStore(cfg)
    first_digest = first.digest
    capsys.readouterr()
    change(cfg)
    second = ImageStore(cfg)
    assert "Decoding" in capsys.readouterr().out
    assert (second.digest == first_digest) == change.__name__.startswith("damage")
    for row, path in enumerate(second.index.paths):
        assert np.array_equal(second.images[row], cv2.imread(str(Path(cfg.data) / path))[..., ::-1])


def test_the_digest_depends_on_contents_and_names_but_not_on_place_or_time(cfg, tmp_path):
    first = ImageStore(cfg).digest
    Path(cfg.data).rename(tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("*.jpg"):
        os.utime(path, (1, 1))
    assert ImageStore(replace(cfg, data=str(tmp_path / "moved"))).digest == first


def spoil(cfg):
    data = Path(cfg.data)
    (data / "A/a1/1.jpg").write_bytes(b"")
    (data / "A/a2/1.jpg").write_bytes(b"not an image")
    (data / "A/a3/1.jpg").write_bytes((data / "A/a3/0.jpg").read_bytes()[:-800])
    (data / "B/b1/1.jpg").write_bytes(encode(noise(5, 100)))


def test_all_bad_images_are_named(cfg):
    spoil(cfg)
    with pytest.raises(InputError) as error:
        ImageStore(cfg)
    text = str(error.value)
    assert "4 of 20 images" in text
    for name, reason in (
        ("A/a1/1.jpg", "is empty"),
        ("A/a2/1.jpg", "is no JPEG, PNG or WebP image"),
        ("A/a3/1.jpg", "is a truncated JPEG"),
        ("B/b1/1.jpg", "is 100 x 100, not 112 x 112"),
    ):
        assert f"{Path(cfg.data) / name} {reason}" in text
        assert f"{name} {reason}" in (cfg.cache_dir / "bad_images.txt").read_text()
    with pytest.raises(InputError, match="4 of 20 images"):  # the cached result is the same
        ImageStore(cfg)


def test_bad_images_are_skipped_only_if_they_are_few(cfg, monkeypatch, capsys):
    spoil(cfg)
    with pytest.raises(InputError, match=r"more than 0\.1%"):
        ImageStore(replace(cfg, skip_bad_images=True))
    monkeypatch.setattr("utils.data.store.MAX_BAD_SHARE", 0.2)
    store = ImageStore(replace(cfg, skip_bad_images=True))
    assert store.usable.sum() == 16
    assert [store.index.paths[row] for row in np.flatnonzero(~store.usable)] == [
        "A/a1/1.jpg",
        "A/a2/1.jpg",
        "A/a3/1.jpg",
        "B/b1/1.jpg",
    ]
    assert "4 of 20 images" in capsys.readouterr().err


def test_images_of_another_size_are_to_be_aligned(cfg):
    image_of(cfg, "A/a1/0.jpg").write_bytes(encode(noise(1, 160)))
    image_of(cfg, "A/a1/1.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    advice = "Repair or remove the others. 1 of them are of another size. " + store.ALIGN
    with pytest.raises(InputError, match=f"1.jpg is a pointer of Git LFS.*\n{advice}$"):
        ImageStore(cfg)
    for path in Path(cfg.data).rglob("*.jpg"):
        path.write_bytes(encode(noise(1, 160)))
    for skips in (False, True):
        with pytest.raises(InputError, match="\n(That is .* )?All images are 160 x 160: crops .*prepare align"):
            ImageStore(replace(cfg, skip_bad_images=skips))


def test_records_of_another_name_are_named(cfg):
    (Path(cfg.data) / "ms1m.rec").write_bytes(b"")
    empty = Path(cfg.data) / "E"
    empty.mkdir()
    (empty / "faces.rec").write_bytes(b"")
    for data, groups, name in ((cfg.data, ("C",), "ms1m.rec"), (str(empty), (), "faces.rec")):
        with pytest.raises(InputError, match=f"It holds {name}: name it train.rec, and its index train.idx"):
            scan(Path(data), groups)
    with pytest.raises(InputError, match=r"There is no file .*train.rec: .* It holds faces.rec: name it train.rec"):
        recordio.read_index(empty)
    (empty / "train.rec").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(InputError, match=r"train.rec is a web page instead"):
        scan(empty, ())


def test_a_truncated_png_is_refused():
    content = encode(noise(0), ".png")
    assert decode(content).shape == (112, 112, 3)
    with pytest.raises(ValueError, match="is a truncated PNG"):
        decode(content[:-2000])


def test_a_full_disk_is_detected_before_decoding(cfg, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("utils.data.store.shutil.disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"0.0 MB free of 0.8 MB: set cache to a larger disk"):
        ImageStore(cfg)


def test_missing_and_empty_folders_are_refused(cfg):
    data = Path(cfg.data)
    with pytest.raises(InputError, match="There is no folder .*nowhere"):
        scan(data / "nowhere", ("A",))
    with pytest.raises(InputError, match="has no folder for C, D"):
        scan(data, ("A", "C", "D"))
    (data / "C" / "nobody").mkdir(parents=True)
    (data / "C" / "nobody" / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match="C holds no image"):
        scan(data, ("A", "C"))


def test_a_broken_link_is_a_bad_image(cfg):
    (Path(cfg.data) / "A" / "a1" / "zz.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(InputError, match=r"zz.jpg cannot be read \(No such file or directory\)"):
        ImageStore(cfg)


def test_file_names_need_not_be_valid_unicode(cfg):
    folder = Path(cfg.data) / "A" / "a1"
    (folder / "0.jpg").rename(folder / os.fsdecode(b"\xff \n.jpg"))
    first = ImageStore(cfg)
    assert len(first.index.paths) == 20
    assert ImageStore(cfg).digest == first.digest


def test_an_impossible_size_in_a_header_is_a_bad_image(cfg):
    content = bytearray(encode(noise(0), ".png"))
    content[16:24] = (60000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (Path(cfg.data) / "A" / "a1" / "0.jpg").write_bytes(content)
    with pytest.raises(InputError, match="1 of 20 images"):
        ImageStore(cfg)


def test_two_processes_share_one_cache(cfg):
    """Two teachers are trained in parallel: the second process waits, then reads the cache of the first."""
    code = (
        f"from config.config import Config; from utils.data.store import ImageStore; print(ImageStore({cfg!r}).digest)"
    )
    start = {"cwd": Path(__file__).parents[4], "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], **start) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in both]
    assert outputs[0][-1] == outputs[1][-1] == ImageStore(cfg).digest
    assert sum("Decoding" in line for lines in outputs for line in lines) == 1


def test_interrupted_decoding_resumes(cfg, monkeypatch, capsys):
    whole = ImageStore(cfg)
    images, digest = np.array(whole.images), whole.digest
    monkeypatch.setattr("utils.data.store.BLOCK", 4)
    monkeypatch.setattr("utils.storage.arrays.NOTED_EVERY", 0.0)
    decode_into, decoded = store._decode_into, []

    def killed(out, row, *given):
        decoded.append(row)
        if len(decoded) == 15:
            raise KeyboardInterrupt
        return decode_into(out, row, *given)

    cfg = replace(cfg, cache=cfg.cache + "2")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "_decode_into", killed)
        patch.setattr(store, "ThreadPoolExecutor", lambda: ThreadPoolExecutor(1))
        ImageStore(cfg)
    assert not (cfg.cache_dir / "images.npy").exists()
    with open(cfg.cache_dir / "images.npy.partial", "rb+") as file:
        file.seek(1000)
        file.write(b"x" * 9)  # damages the first block
    again = ImageStore(cfg)
    assert "Decoding 12 of 20 images" in capsys.readouterr().out
    assert np.array_equal(again.images, images)
    assert sorted(path.name for path in cfg.cache_dir.iterdir()) == ["images.json", "images.npy"]
    assert ImageStore(replace(cfg, cache=cfg.cache + "3")).digest == again.digest
    monkeypatch.undo()
    assert ImageStore(replace(cfg, cache=cfg.cache + "4")).digest == digest


def test_a_saved_index_is_used_until_something_changes(cfg, monkeypatch):
    scans, plain = [], index.scan
    monkeypatch.setattr(index, "scan", lambda *given, **named: scans.append(1) or plain(*given, **named))
    first = find_images(cfg)
    assert not (cfg.cache_dir / "index.npz").exists()  # the folders are too recent
    monkeypatch.setattr(index, "SETTLED", 0.0)
    find_images(cfg)
    (Path(cfg.data) / "A" / "empty").mkdir()

    def is_read_back() -> bool:
        scans.clear()
        found, again = find_images(cfg), plain(Path(cfg.data), cfg.ethnicities)
        for name, value in vars(again).items():
            assert np.array_equal(getattr(found, name), value), name
        return not scans

    assert not is_read_back()
    assert is_read_back()
    assert find_images(cfg).digest == first.digest  # an empty folder changes no image
    monkeypatch.setattr(index, "EXTENSIONS", (*index.EXTENSIONS, ".bmp"))  # as a later version might
    assert not is_read_back()
    assert is_read_back()
    for change in (
        lambda: image_of(cfg, "A/a1/new.jpg").write_bytes(encode(noise(9))),
        lambda: image_of(cfg, "A/empty/first.jpg").write_bytes(encode(noise(9))),
        lambda: image_of(cfg, "A/a1/new.jpg").unlink(),
        lambda: image_of(cfg, "A/a2/0.jpg").rename(image_of(cfg, "A/a2/00.jpg")),
        lambda: image_of(cfg, "B/b1/0.jpg").write_bytes(encode(noise(8))),  # overwritten in place
        lambda: os.utime(image_of(cfg, "B/b1/0.jpg"), (1, 1)),
        lambda: image_of(cfg, "B/b3").mkdir(),
        lambda: image_of(cfg, "B/b1/gone.jpg").symlink_to("nowhere.jpg"),
    ):
        change()
        assert not is_read_back()
        assert is_read_back()
    with pytest.raises(InputError, match="has no folder for C"):
        find_images(replace(cfg, ethnicities=("A", "B", "C")))


def test_a_replaced_image_is_detected_among_many(cfg, monkeypatch):
    """The image is overwritten in place, and only a few files are checked."""
    monkeypatch.setattr(index, "SETTLED", 0.0)
    monkeypatch.setattr(index, "LOOKED_AT", 2)
    bad = image_of(cfg, "A/a2/1.jpg")
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-500])
    with pytest.raises(InputError, match="1 of 20 images"):
        ImageStore(cfg)
    bad.write_bytes(whole)
    assert ImageStore(cfg).usable.all()


def test_an_index_that_cannot_be_saved_is_not_an_error(cfg, monkeypatch):
    monkeypatch.setattr(index, "SETTLED", 0.0)

    def read_only(*_):
        raise InputError("index.npz could not be written (Read-only file system).")

    monkeypatch.setattr(index, "_write_cache", read_only)
    assert len(find_images(cfg).paths) == 20


def test_a_damaged_index_is_made_again(cfg, monkeypatch, capsys):
    monkeypatch.setattr(index, "SETTLED", 0.0)
    first = find_images(cfg)
    path = cfg.cache_dir / "index.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    assert find_images(cfg).paths == first.paths
    assert "index.npz is damaged (its SHA-256 does not match)" in capsys.readouterr().out
    assert find_images(cfg).paths == first.paths
    assert capsys.readouterr().out == ""


def test_an_identity_in_two_groups_is_refused(cfg):
    write_images(Path(cfg.data), {"C": {"a2": 1}})
    with pytest.raises(InputError, match="Identity a2 is in both A and C"):
        scan(Path(cfg.data), ("A", "B", "C"))
