"""Columns: rows, labels and targets of a stage, and the refusal of embeddings with another provenance."""

import dataclasses
import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from config.config import Config
from tests.conftest import encode, noise
from tests.runs import write_embeddings, write_targets
from utils.data.columns import Cached, Column, cache, cut, stream, to_network
from utils.data.embeddings import mean_distance, say_if_collapsed
from utils.data.faces import Faces
from utils.data.split import write_split
from utils.errors import InputError
from utils.storage import arrays
from utils.storage.tensors import save


def test_labels_number_the_identities_of_the_set(cfg):
    assert Faces(cfg).num_classes == 5
    faces = Faces(cfg, teacher="B")
    assert faces.identities == ("B/b1", "B/b2")
    labels = faces.columns["label"].arrays[0]
    assert labels.tolist() == [-1] * 12 + [0] * 4 + [1] * 4
    assert faces.rows.tolist() == list(range(12, 20))


def test_a_quarter_holds_its_share_of_every_group(cfg):
    cfg = replace(cfg, is_teacher_baseline=True)
    splits = [write_split(cfg, "A", ["A/a1", "A/a2", "A/a3"]), write_split(cfg, "B", ["B/b1", "B/b2"])]
    for quarter in cfg.teachers:
        faces = Faces(cfg, teacher=quarter)
        assert sorted(faces.identities) == sorted(splits[0][quarter] + splits[1][quarter])
        assert len(faces) == 4 * faces.num_classes


def test_a_bad_image_is_in_no_set(cfg, monkeypatch):
    for k in range(4):
        (Path(cfg.data) / "A" / "a2" / f"{k}.jpg").write_bytes(b"")
    monkeypatch.setattr("utils.data.store.MAX_BAD_SHARE", 0.5)
    faces = Faces(replace(cfg, skip_bad_images=True))
    assert faces.identities == ("A/a1", "A/a3", "B/b1", "B/b2")
    assert faces.rows.tolist() == [0, 1, 2, 3, *range(8, 20)]
    assert faces.columns["label"].arrays[0][faces.rows].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_each_epoch_has_another_order_and_drops_the_incomplete_batch(cfg):
    faces = Faces(replace(cfg, batch_size=6), flip=True)
    first, again, second = (list(faces.batches(epoch, 0)) for epoch in (0, 0, 1))
    rows = [np.concatenate([batch[0] for batch in epoch]) for epoch in (first, again, second)]
    assert [len(batch[0]) for batch in first] == [6, 6, 6]
    assert len(set(rows[0].tolist())) == 18
    assert np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])
    resumed = list(faces.batches(0, 2))
    assert np.array_equal(resumed[0][0], first[2][0])
    assert np.array_equal(resumed[0][1], first[2][1])
    flips = np.concatenate([batch[1] for e in range(60) for batch in faces.batches(e, 0)])
    assert flips.mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("size", [2, 6, 20])
def test_repeats_are_those_of_the_batch_with_the_most(cfg, size):
    faces = Faces(replace(cfg, batch_size=size))
    label = faces.columns["label"].arrays[0]
    for epoch in range(5):
        counts = [np.unique(label[rows], return_counts=True)[1].max() for rows, _ in faces.batches(epoch, 0)]
        assert faces.repeats(epoch) == max(counts)


def test_images_are_normalised_and_flipped_as_published():
    images = np.stack([noise(k) for k in range(3)])
    flips = np.array([False, True, False])
    ours = to_network(Column((images,)).gather(np.arange(3), flips))
    wanted = (torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.5
    wanted[1] = wanted[1].flip(-1)
    assert torch.allclose(ours.double(), wanted, rtol=0, atol=2e-7)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_teachers_are_concatenated_in_the_order_of_the_config(cfg):
    values = {name: write_embeddings(cfg, name) for name in ("A", "B")}
    cfg = replace(cfg, ethnicities=("B", "A"), cache=cfg.cache)
    assert cfg.teachers == ("B", "A")
    faces = Faces(cfg, inputs=cfg.teachers)
    batch = next(stream({"embedding": faces.columns["embedding"]}, [(np.arange(20), None)], torch.device("cpu")))
    assert np.array_equal(batch["embedding"].numpy(), np.concatenate([values["B"], values["A"]], 1))


def test_a_flipped_image_gets_the_flipped_target():
    plain, mirrored = np.zeros((4, 2), np.float32), np.ones((4, 2), np.float32)
    column = Column((plain,), (mirrored,))
    rows, flips = np.array([2, 0, 3]), np.array([True, False, True])
    assert column.gather(rows, flips)[:, 0].tolist() == [1, 0, 1]
    assert column.gather(rows, None).sum() == 0
    assert Column((plain,)).gather(rows, flips).sum() == 0  # as published: the target of the unflipped image


def test_image_and_target_have_the_same_view():
    images = np.stack([noise(k) for k in range(6)])
    plain, mirrored = np.arange(6, dtype=np.float32)[:, None], np.arange(6, dtype=np.float32)[:, None] + 100
    columns = {"image": Column((images,)), "target": Column((plain,), (mirrored,))}
    rows, flips = np.array([3, 1, 5, 0]), np.array([True, False, False, True])
    batch = next(stream(columns, [(rows, flips)], torch.device("cpu")))
    assert batch["target"][:, 0].tolist() == [103, 1, 5, 100]
    for image, row, flipped in zip(batch["image"], rows, flips, strict=True):
        seen = images[row][:, ::-1] if flipped else images[row]
        assert torch.equal(image, to_network(torch.from_numpy(seen.copy()[None]))[0])


def test_the_reader_yields_every_batch_in_order_and_passes_errors_on():
    column = Column((np.arange(100, dtype=np.int64),))
    batches = [(np.asarray(rows), None) for rows in cut(range(100), 7)]
    seen = [batch["label"].tolist() for batch in stream({"label": column}, batches, torch.device("cpu"))]
    assert [len(batch) for batch in seen] == [7] * 14 + [2]
    assert [row for batch in seen for row in batch] == list(range(100))
    with pytest.raises(IndexError):
        list(stream({"label": column}, [(np.array([1000]), None)], torch.device("cpu")))


def test_missing_embeddings_are_all_named(cfg):
    write_embeddings(cfg, "A")
    with pytest.raises(InputError, match=r"Missing: .*B.npy. Run first: python extract_all.py --data"):
        Faces(cfg, inputs=cfg.teachers)
    with pytest.raises(InputError, match=r"SL/embeddings.npy. Run first: python fc_EArc.py"):
        Faces(cfg, target=True)
    with pytest.raises(InputError, match=r"embeddings.npy. Run first: python dual_layer_EAF-Fusion.py"):
        Faces(replace(cfg, is_dual_layer=True), target=True)
    write_embeddings(cfg, "B")
    with pytest.raises(
        InputError, match=r"A_flipped.npy.*B_flipped.npy. Run first: python extract_all.py .*--flip_targets True"
    ):
        Faces(replace(cfg, flip_targets=True), inputs=cfg.teachers)


def test_the_command_that_is_missing_has_the_settings_of_its_run(cfg):
    """The run of the adaptor was started with other settings than the student's script is called with."""
    caller = replace(cfg, num_epoch=7, loss_lambda=3.0, num_epoch_fc=9, is_dual_layer=True, has_dropout=True)
    with pytest.raises(InputError) as error:
        Faces(caller, target=True)
    assert "dual_layer_EAF-Fusion.py" in str(error.value) and "--num_epoch_fc 9" in str(error.value)
    assert not any(name in str(error.value) for name in ("loss_lambda", "--num_epoch 7"))
    started = replace(caller, num_epoch_fc=3, lr_fc=0.5, data="/elsewhere", seed=5)
    folder = cfg.adaptor_dir("DLDPO")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"kind": "DLDPO", "all settings": {**dataclasses.asdict(started), "gone": 1}})
    )
    with pytest.raises(InputError) as error:
        Faces(caller, target=True)
    words = shlex.split(str(error.value).split("Run first: ")[1])
    assert words[:2] == ["python", "dual_layer_EAF-Fusion.py"]
    found = Config.from_args(words[2:])
    assert (found.num_epoch_fc, found.lr_fc, found.seed, found.data) == (3, 0.5, 5, cfg.data)
    assert found.decisive("DLDPO") == started.decisive("DLDPO")


def test_embeddings_of_other_images_are_refused(cfg):
    for name in ("A", "B"):
        write_embeddings(cfg, name)
    Faces(cfg, inputs=cfg.teachers)
    (Path(cfg.data) / "A" / "a1" / "0.jpg").write_bytes(encode(noise(77)))
    with pytest.raises(
        InputError, match="was made for other images than data holds now. Run again: python extract_all.py"
    ):
        Faces(cfg, inputs=cfg.teachers)


def test_embeddings_of_other_weights_are_refused(cfg):
    for name in ("A", "B"):
        write_embeddings(cfg, name)
    save(cfg.teacher_dir("A") / "best_backbone.pth", {"other": torch.zeros(1)})
    with pytest.raises(InputError, match=r"A.npy was made by other weights than .*best_backbone.pth"):
        Faces(cfg, inputs=cfg.teachers)


def test_embeddings_have_the_size_of_their_teacher_and_are_refused_if_cut_short(cfg):
    for name in ("A", "B"):
        write_embeddings(cfg, name)
    assert Faces(replace(cfg, embedding_size=32), inputs=cfg.teachers).columns["embedding"].width == 32
    path = cfg.teacher_embeddings("B")
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(InputError, match=r"B.npy is damaged \(.*\). Run again: python extract_all.py"):
        Faces(cfg, inputs=cfg.teachers)


def test_targets_of_retrained_teachers_are_refused(cfg):
    for name in ("A", "B"):
        write_embeddings(cfg, name)
    faces = Faces(cfg, inputs=cfg.teachers)
    write_targets(cfg, {name: faces.origins[cfg.teacher_embeddings(name)] for name in cfg.teachers})
    assert "target" in Faces(cfg, target=True).columns
    with pytest.raises(InputError, match=r"was made from the teachers A, B, in this order: set ethnicities so"):
        Faces(replace(cfg, ethnicities=("B", "A"), cache=cfg.cache), target=True)
    save(cfg.teacher_dir("B") / "best_backbone.pth", {"other": torch.zeros(1)})
    with pytest.raises(InputError, match=r"SL/embeddings.npy was made by other weights than .*B/best_backbone.pth"):
        Faces(cfg, target=True)


def test_missing_files_are_reported_before_an_image_is_decoded(cfg):
    for refused in (
        {"inputs": cfg.teachers},
        {"target": "DLDPO"},
    ):
        with pytest.raises(InputError, match="Missing"):
            Faces(cfg, **refused)
    assert not cfg.cache_dir.exists()


def test_two_weights_in_one_folder_are_refused(cfg):
    for name in ("A", "B"):
        write_embeddings(cfg, name)
    save(cfg.teacher_dir("A") / "1000backbone.pth", {})
    with pytest.raises(InputError, match=r"holds 1000backbone.pth, best_backbone.pth: keep the one"):
        Faces(cfg, inputs=cfg.teachers)


# Columns in the memory of the device ----------------------------------------------------------------------------------


def columns_of_every_kind():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 112, 112, 3), np.uint8)
    embeddings = [random.normal(size=(40, 4)).astype(np.float32) for _ in range(4)]
    return {
        "image": Column((images,)),
        "label": Column((np.arange(40),)),
        "embedding": Column(tuple(embeddings[:2]), tuple(embeddings[2:])),
        "target": Column((embeddings[3],), (embeddings[0],)),
    }


@pytest.mark.parametrize("workers", [0, 3])
def test_cached_and_streamed_columns_give_equal_batches(monkeypatch, workers):
    monkeypatch.setattr("utils.data.columns.PART", 7 * 112 * 112 * 3)  # seven images at once
    device, columns, random = torch.device("cpu"), columns_of_every_kind(), np.random.default_rng(1)
    rows = np.sort(random.permutation(40)[:30])
    cached = cache(columns, rows, device, 1.0)
    assert all(isinstance(column, Cached) for column in cached.values())
    batches = [(random.permutation(rows)[:8], flips) for flips in (None, random.random(8) < 0.5, np.ones(8, bool))]
    for one, other in zip(
        stream(columns, batches, device, workers), stream(cached, batches, device, workers), strict=True
    ):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_cache_takes_half_of_the_free_gpu_memory_by_default(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5000, 80_000))
    for name in ("memory_reserved", "memory_allocated"):  # other tests may have used a GPU
        monkeypatch.setattr(torch.cuda, name, lambda _: 0)
    loaded = []
    monkeypatch.setattr(
        "utils.data.columns.Cached", lambda column, rows, device: loaded.append(column.row_bytes * len(rows))
    )
    cache(columns_of_every_kind(), np.arange(40), torch.device("cuda"), None)
    assert loaded == [320, 1280]
    assert capsys.readouterr().out == ""


def test_the_widest_columns_are_streamed_if_the_cache_is_too_small(capsys):
    columns, rows = columns_of_every_kind(), np.arange(40)
    kept = cache(columns, rows, torch.device("cpu"), 3e-6)  # 3,000 bytes: labels take 320, targets 1,280
    assert [name for name, column in kept.items() if isinstance(column, Cached)] == ["label", "target"]
    assert cache(columns, rows, torch.device("cpu"), None) == columns  # nothing is cached on a CPU
    assert capsys.readouterr().out == ""
    kept = cache(columns, rows, torch.device("cpu"), 1e9)
    assert "device_cache_gb = 1e+09 is more than is free:" in capsys.readouterr().out
    assert all(isinstance(column, Cached) for column in kept.values())


def test_listed_identities_and_images_are_left_out(cfg, tmp_path):
    listed = tmp_path / "leave_out.txt"
    listed.write_text("A/a2\n\nB/b1/3.jpg\nB/b1/0.jpg\n")
    one, whole = Faces(replace(cfg, leave_out=str(listed))), Faces(cfg)
    assert one.identities == ("A/a1", "A/a3", "B/b1", "B/b2")
    left = [whole.store.index.paths[row] for row in whole.rows if row not in one.rows]
    assert left == [*(f"A/a2/{k}.jpg" for k in range(4)), "B/b1/0.jpg", "B/b1/3.jpg"]
    labels = one.columns["label"].arrays[0]
    assert np.bincount(labels[one.rows]).tolist() == [4, 4, 2, 4]
    assert (np.delete(labels, one.rows) == -1).all()
    assert (
        one.sources["left out"] != Faces(replace(cfg, leave_out=str(write_list(listed, "A/a2\n")))).sources["left out"]
    )
    with pytest.raises(InputError, match=r"names 'A/a9', which .* does not hold \(1 of 2 lines\)"):
        Faces(replace(cfg, leave_out=str(write_list(listed, "A/a2\nA/a9\n"))))
    cold = replace(cfg, cache=str(tmp_path / "cold"), leave_out=str(write_list(listed, "A/a9\n")))
    with pytest.raises(InputError, match="names 'A/a9'"):
        Faces(cold)
    assert not list((tmp_path / "cold").rglob("images*"))  # refused before the images were decoded
    everything = "\n".join(whole.store.index.identities)
    with pytest.raises(InputError, match="leaves out every image of .*: shorten it"):
        Faces(replace(cfg, leave_out=str(write_list(listed, everything))))
    with pytest.raises(InputError, match=r"nowhere.txt cannot be read \(No such file or directory\): set leave_out"):
        Faces(replace(cfg, leave_out="nowhere.txt"))


def write_list(path, text):
    path.write_text(text)
    return path


def test_collapsed_embeddings_are_said_where_they_are_written_and_read(cfg, tmp_path, capsys):
    random = np.random.default_rng(0)
    apart = random.normal(size=(500, 16)).astype(np.float32)
    apart /= np.linalg.norm(apart, axis=1, keepdims=True)
    pairs = np.square(apart[:, None] - apart[None]).sum(2)
    assert mean_distance(apart) == pytest.approx(pairs.mean(), rel=1e-5)
    near = 5 * (apart[:1] + 0.01 * apart)
    say_if_collapsed(tmp_path / "a.npy", apart)
    assert capsys.readouterr().out == ""
    say_if_collapsed(tmp_path / "b.npy", near)
    said = f"b.npy is collapsed: the mean squared distance of two images is {mean_distance(near):.2g}, of"
    assert said in capsys.readouterr().out
    assert mean_distance(near) < 0.001
    inputs = {}
    for name in cfg.teachers:
        write_embeddings(cfg, name)
        inputs[name] = arrays.about(cfg.teacher_embeddings(name))["made from"]
    write_targets(cfg, inputs)  # all ones
    capsys.readouterr()
    Faces(cfg, target=True)
    assert "SL/embeddings.npy is collapsed: the mean squared distance of two images is" in capsys.readouterr().out
