"""Corrections after training: fitted on nine folds, what they do to groups that are shifted, and plain equivalents."""

import numpy as np
import pytest

from eval import calibration
from eval.calibration import CORRECTIONS, Pooled, beta_calibration, cohort, evaluate
from eval.results import Results
from eval.scores import Scored
from utils.data.pairs import fold_of

PAIRS = 600


@pytest.fixture(autouse=True)
def few_clusters(monkeypatch):
    monkeypatch.setattr(calibration, "CLUSTERS", 4)


def two_groups(shift: float) -> Pooled:
    """Two groups whose scores differ by a shift, and whose embeddings lie in two corners."""
    random = np.random.default_rng(0)
    same = np.tile(np.arange(PAIRS) % 2 == 0, 2)
    group = np.repeat([0, 1], PAIRS)
    score = np.clip(random.normal(0.45 + 0.2 * same + shift * group, 0.08), 0.01, 0.99)
    embeddings = random.normal(size=(4 * PAIRS, 8)) / 4
    embeddings[np.arange(4 * PAIRS), np.repeat([0, 1], 2 * PAIRS)] += 1
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    fold = np.tile(fold_of(PAIRS), 2)
    return Pooled(score, same, group, fold, embeddings, np.arange(4 * PAIRS).reshape(-1, 2))


@pytest.mark.parametrize("name", ["per group", "clusters"])
def test_calibration_removes_the_shift_of_a_group(name):
    pairs = two_groups(0.1)
    before, after = evaluate(pairs, CORRECTIONS["none"]), evaluate(pairs, CORRECTIONS[name])
    assert after.accuracies.mean() > before.accuracies.mean() + 1
    assert before.fmr[0].errors == 0 and before.fmr[1].errors > 4  # only the shifted group is accepted falsely
    assert after.fmr[0].errors > 0 and abs(after.fmr[0].errors - after.fmr[1].errors) < 8


def test_none_is_the_plain_protocol_at_one_threshold():
    pairs = two_groups(0.05)
    right = np.zeros((10, 2))
    for fold in range(10):
        known = pairs.fold != fold
        tried = [*sorted(-pairs.score[known]), 0.0]
        counts = [np.sum((-pairs.score[known] < threshold) == pairs.same[known]) for threshold in tried]
        threshold = tried[int(np.argmax(counts))]
        for group in (0, 1):
            here = ~known & (pairs.group == group)
            right[fold, group] = np.mean((-pairs.score[here] < threshold) == pairs.same[here])
    assert evaluate(pairs, CORRECTIONS["none"]).accuracies == pytest.approx(100 * right.mean(0))


def test_a_false_match_rate_that_the_pairs_do_not_resolve_is_unknown():
    """Nine folds of two groups of 300 pairs hold 270 impostor pairs, fewer than 3 / 0.01."""
    pairs = two_groups(0.0)
    few = np.concatenate([np.arange(300), PAIRS + np.arange(300)])
    less = Pooled(pairs.score[few], pairs.same[few], pairs.group[few], np.tile(fold_of(300), 2))
    assert evaluate(less, CORRECTIONS["none"]).fmr is None
    assert [rate.of for rate in evaluate(pairs, CORRECTIONS["none"]).fmr] == [300, 300]
    same = {name: less.same[less.group == k] for k, name in enumerate("AB")}
    distances = {name: 4 - 4 * less.score[less.group == k] for k, name in enumerate("AB")}
    one = Scored("specialized", "iresnet34", "teacher", "Asian", distances, {}, (50.0, 50.0), ("",))
    found = calibration.table(Results([one], same, True), {})
    assert found.rows[0][-3:] == (None, None, None)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_labels_of_the_tenth_fold_are_not_used(name):
    pairs = two_groups(0.05)
    fitted = pairs.fold != 3
    other = Pooled(pairs.score, pairs.same ^ ~fitted, pairs.group, pairs.fold, pairs.embeddings, pairs.images)
    correction = CORRECTIONS[name]
    assert correction(pairs, fitted) == pytest.approx(correction(other, fitted))


def test_beta_calibration_recovers_its_own_model_and_keeps_the_order():
    random = np.random.default_rng(1)
    score = random.uniform(0.02, 0.98, 20_000)
    true = 1 / (1 + np.exp(-(1.5 * np.log(score) - 0.5 * np.log1p(-score) + 0.3)))
    found = beta_calibration(score, random.random(20_000) < true)(np.array([0.1, 0.5, 0.9]))
    expected = [1 / (1 + np.exp(-(1.5 * np.log(s) - 0.5 * np.log1p(-s) + 0.3))) for s in (0.1, 0.5, 0.9)]
    assert found == pytest.approx(expected, abs=0.03)
    values = np.linspace(0.01, 0.99, 99)
    steep = beta_calibration(np.array([0.2, 0.3, 0.4, 0.9, 0.95, 0.35]), np.array([0, 0, 1, 1, 0, 0], bool))
    assert (np.diff(steep(values)) >= 0).all()
    assert beta_calibration(score, np.ones(20_000, bool))(values) is values


def test_cohort_equals_the_plain_loop(monkeypatch):
    monkeypatch.setattr(calibration, "COHORT", 5)
    pairs = two_groups(0.0)
    fitted = pairs.fold != 0
    seen = sorted({int(row) for row in pairs.images[fitted].ravel()})
    others = [pairs.embeddings[seen[int(k)]] for k in np.linspace(0, len(seen) - 1, 5)]
    for k in (0, 7, 900):
        parts = []
        for row in pairs.images[k]:
            scores = [(1 + pairs.embeddings[row] @ other) / 2 for other in others]
            parts.append((pairs.score[k] - np.mean(scores)) / np.std(scores))
        assert cohort(pairs, fitted)[k] == pytest.approx(np.mean(parts))
