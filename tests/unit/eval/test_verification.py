"""Ten-fold verification against the plain published loop, and sets with repeated images."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.model_selection import KFold

from config.config import Config
from eval.models import Model
from eval.scores import Scores, fuse
from eval.verification import (
    THRESHOLDS,
    accuracy,
    collapsed,
    embed,
    pair_distances,
    squared_distances,
    ten_fold,
    validator,
    views,
)
from tests.conftest import encode, noise, put
from utils.data import store
from utils.data.pairs import load_bin, load_pairs
from utils.data.store import BLOCK
from utils.errors import InputError
from utils.storage.arrays import write


def plain_loop(embeddings, same, folds=10):
    """Computes the published protocol in plain loops: all pairs for every threshold of every fold."""
    return plain_loop_of(np.sum(np.square(embeddings[0::2] - embeddings[1::2]), 1), same, folds)


def plain_loop_of(distance, same, folds=10):
    thresholds = np.arange(0, 4, 0.01)
    accuracy, chosen, tpr, fpr = [], [], [], []
    for train, test in KFold(folds, shuffle=False).split(distance):
        right = [np.mean((distance[train] < t) == same[train]) for t in thresholds]
        best = int(np.argmax(right))
        chosen.append(thresholds[best])
        accuracy.append(np.mean((distance[test] < thresholds[best]) == same[test]))
        genuine, impostors = max(1, same[test].sum()), max(1, (~same[test]).sum())
        tpr.append([np.sum((distance[test] < t) & same[test]) / genuine for t in thresholds])
        fpr.append([np.sum((distance[test] < t) & ~same[test]) / impostors for t in thresholds])
    return accuracy, chosen, np.mean(tpr, 0), np.mean(fpr, 0)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(("pairs", "noise_level"), [(600, 0.5), (600, 2.0), (107, 1.0), (10, 1.0)])
def test_ten_fold_equals_the_plain_loop(pairs, noise_level):
    random = np.random.default_rng(pairs)
    same = np.arange(pairs) // max(1, pairs // 20) % 2 == 0
    one = random.normal(size=(pairs, 8))
    other = np.where(same[:, None], one, random.normal(size=(pairs, 8))) + noise_level * random.normal(size=(pairs, 8))
    embeddings = unit(np.stack([one, other], 1).reshape(2 * pairs, 8))
    result, (accuracy, threshold, tpr, fpr) = ten_fold(embeddings, same), plain_loop(embeddings, same)
    assert result.accuracy.tolist() == accuracy
    assert result.threshold.tolist() == threshold
    assert np.allclose(result.tpr, tpr, rtol=0, atol=1e-12)
    assert np.allclose(result.fpr, fpr, rtol=0, atol=1e-12)


def test_a_distance_equal_to_a_threshold_is_not_accepted():
    """A distance of 1.0 is accepted at threshold 1.01 and above: `distance < threshold`."""
    embeddings = np.zeros((40, 2))
    embeddings[0::2, 0] = 1  # squared distance exactly 1 for all 20 pairs
    same = np.ones(20, bool)
    result = ten_fold(embeddings, same)
    assert result.tpr[100] == 0
    assert result.tpr[101] == 1
    assert THRESHOLDS[101] == pytest.approx(1.01)
    assert result.threshold.tolist() == plain_loop(embeddings, same)[1]


def test_ten_fold_computed_by_hand():
    """Ten folds of a genuine and an impostor pair, at distances 0 and 2; in the first fold, they are swapped."""
    east, north = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    pairs = [(east, east), (east, north)] * 10
    pairs[0], pairs[1] = (east, north), (east, east)  # both of the first fold are decided wrongly
    result = ten_fold(np.array(pairs).reshape(40, 2), np.arange(20) % 2 == 0)
    assert result.accuracy.tolist() == [0.0] + [1.0] * 9
    assert result.threshold.tolist() == [0.01] * 10
    assert result.tpr[[0, 1, 200, 201]].tolist() == pytest.approx([0, 0.9, 0.9, 1.0])
    assert result.fpr[[0, 1, 200, 201]].tolist() == pytest.approx([0, 0.1, 0.1, 1.0])


def test_a_model_that_maps_all_faces_to_one_point_scores_one_half():
    result = ten_fold(np.tile([1.0, 0.0], (400, 1)), np.arange(200) // 10 % 2 == 0)
    assert result.accuracy.mean() == 0.5


def test_embeddings_that_cannot_be_scored_are_refused():
    same = np.arange(20) % 2 == 0
    with pytest.raises(InputError, match="not finite"):
        ten_fold(np.full((40, 2), np.nan), same)
    with pytest.raises(InputError, match="39 embeddings do not make pairs"):
        ten_fold(np.zeros((39, 2)), same)
    with pytest.raises(InputError, match="19 distances are not those of 20 pairs"):
        ten_fold(np.zeros((38, 2)), same)
    with pytest.raises(InputError, match="9 pairs cannot be cut into 10 folds"):
        ten_fold(np.zeros((18, 2)), same[:9])


def test_both_views_are_summed_and_scaled_to_unit_length():
    features = np.array([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 1.0], [-1.0, -1.0]]])
    assert np.allclose(embed(features), [[0.6, 0.8], [0.0, 0.0]])


def test_views_are_the_features_of_the_image_and_its_mirror_image():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 112 * 112, 4))
    images = np.stack([noise(k) for k in range(5)])
    result = views(network, images, Config(device="cpu", infer_batch_size=2), "test")
    assert result.shape == (5, 2, 4)
    for view, seen in enumerate((images, images[:, :, ::-1])):
        x = (torch.from_numpy(seen.copy()).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        assert np.allclose(result[:, view], network(x).detach().numpy(), atol=1e-4)


def test_the_best_epoch_is_decided_by_one_group_or_by_the_average(cfg):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 112 * 112, 4))
    sets = load_pairs(cfg)
    scores, value = validator(network, sets, cfg)()
    assert value == scores["average"] == pytest.approx((scores["A"] + scores["B"]) / 2)
    assert validator(network, sets, cfg, best_on="B")()[1] == scores["B"]
    assert network.training


# Sets with repeated images --------------------------------------------------------------------------------------------

PLACES = [0, 1, 2, 0, 3, 3, 1, 4, 5, 0] * 8
"""The distinct image at each of 80 places: one is paired with itself, others are in several pairs."""


class Counting(torch.nn.Module):
    """A small network that counts its input images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 9, 8), torch.nn.Flatten(), torch.nn.Linear(676, 16))
        self.seen = 0

    def forward(self, image):
        self.seen += len(image)
        return self.layers(image)


@pytest.fixture
def repeated(cfg) -> tuple[Config, Path]:
    """Writes a set of 40 pairs from 6 distinct images, the only set of the settings."""
    cfg = replace(cfg, ethnicities=("A",), infer_batch_size=4)
    same = [k // 2 % 2 == 0 for k in range(len(PLACES) // 2)]
    path = put(cfg.pairs_file("A"), pickle.dumps(([encode(noise(place)) for place in PLACES], same), protocol=2))
    return cfg, path


def test_an_image_in_several_pairs_is_stored_once(repeated, monkeypatch):
    cfg, path = repeated
    decoded = []
    plain = store.decode
    monkeypatch.setattr("utils.data.pairs.decode", lambda content: decoded.append(1) or plain(content))
    for pairs in (load_bin(path), load_bin(path, Path(cfg.cache)), load_bin(path, Path(cfg.cache))):
        assert pairs.distinct.shape == (6, 112, 112, 3)
        assert pairs.rows.tolist() == PLACES
        assert np.array_equal(pairs.images, np.stack([plain(encode(noise(place))) for place in PLACES]))
    assert len(decoded) == 2 * 6


def test_repeated_images_are_embedded_once_with_equal_results(repeated):
    cfg, path = repeated
    network, pairs = Counting(), load_bin(path)
    each = squared_distances(embed(views(network, pairs.images, cfg, "each")))
    network.seen = 0
    once = pair_distances(views(network, pairs.distinct, cfg, "once"), pairs.rows)
    assert network.seen == 2 * 6  # both views
    assert np.allclose(once, each, rtol=0, atol=1e-6)
    assert once[2] == 0  # an image paired with itself
    assert accuracy(once, pairs.same) == accuracy(each, pairs.same)
    network.seen = 0
    scores, value = validator(network, load_pairs(cfg), cfg)()
    assert network.seen == 2 * 6
    assert scores["A"] == value == round(accuracy(each, pairs.same), 4)


def test_scores_are_those_of_all_images_and_samples_of_distinct_ones(repeated, tmp_path):
    """An image in several pairs is in the sample once, for a network and for an adaptor."""
    cfg, _ = repeated
    cfg = replace(cfg, embedding_size=16)
    network, pairs = Counting(), load_pairs(cfg)
    assert len(pairs["A"].rows) > 6
    adaptor = torch.nn.Linear(32, 16)
    models = [
        Model("teacher", "x", ("1",), (network,)),
        Model("adaptor", "SL", ("2", "1", "1"), (network, network), adaptor),
    ]
    found = Scores(cfg, pairs, tmp_path / "kept").of(models)
    assert network.seen == 2 * 6
    features = views(network, pairs["A"].images, cfg, "each")
    for one, each in zip(found, (features, fuse(adaptor, [features, features], cfg)), strict=True):
        assert np.allclose(one.distances["A"], squared_distances(embed(each)), rtol=0, atol=1e-6)
        assert one.samples["A"].shape == (6, 16)
        assert np.allclose(one.samples["A"][pairs["A"].rows], embed(each), rtol=0, atol=1e-6)
        assert one.accuracies == (accuracy(squared_distances(embed(each)), pairs["A"].same),)


def test_without_repetitions_nothing_changes(cfg):
    path, network = cfg.pairs_file("A"), Counting()
    pairs = load_bin(path)
    assert pairs.rows.tolist() == [*range(40)]
    assert np.array_equal(pairs.images, pairs.distinct)
    features = views(network, pairs.distinct, cfg, "test")
    assert pair_distances(features, pairs.rows).tolist() == squared_distances(embed(features)).tolist()


def test_an_old_cache_of_all_images_is_used_only_without_repetitions(repeated, cfg, capsys):
    """Earlier versions cached all 2P images of a set under its digest."""
    for path in (repeated[1], cfg.pairs_file("B")):
        plain, cache = load_bin(path), Path(cfg.cache)
        load_bin(path, cache)
        (stored,) = cache.glob(f"{path.stem}-*.npy")
        write(stored, plain.images, {"pairs": plain.digest}, BLOCK)
        before = stored.stat().st_ino
        capsys.readouterr()
        again = load_bin(path, cache)
        assert np.array_equal(again.images, plain.images)
        assert again.distinct.shape == plain.distinct.shape
        has_repetitions = len(plain.distinct) < len(plain.rows)
        assert (stored.stat().st_ino != before) == has_repetitions
        assert ("was made from something else" in capsys.readouterr().out) == has_repetitions


def test_a_collapsed_network_is_said_with_the_accuracy_at_the_exact_threshold(cfg, capsys):
    """All distances under one step of the grid: half of the pairs are right by the protocol, all at 0.002."""
    same = np.arange(200) % 2 == 0
    near = np.where(same, 0.001, 0.003) * np.random.default_rng(0).uniform(0.9, 1.1, 200)
    assert accuracy(near, same) == 50
    said = collapsed({"A": near, "B": 400 * near}, {"A": same, "B": same})
    assert said.startswith("is collapsed, its distances are closer together than the protocol's thresholds")
    assert said.endswith("A: distances 0.00092 to 0.0033, accuracy 50.00, 100.00).")
    assert collapsed({"B": 400 * near}, {"B": same}) == ""
    assert collapsed({"A": near}, {"A": np.ones(200, bool)}).endswith("accuracy 100.00, 100.00).")  # of one kind

    class Point(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(1, 1)

        def forward(self, image):
            return torch.nn.functional.pad(image.mean((1, 2, 3))[:, None] / 1e3, (0, 3), value=1.0)

    scores, _ = validator(Point(), load_pairs(cfg), cfg)()
    assert scores["average"] == 50
    said = capsys.readouterr().out
    assert said.startswith("The network is collapsed")
    assert "A: distances" in said
    assert "B: distances" in said
