"""Bootstrap over identities: against plain loops, and how often its intervals hold the true accuracy."""

import numpy as np
import pytest

from eval.identities import Ends, resampled
from eval.uncertainty import METHOD, METHOD_OF_IDENTITIES, interval, method
from eval.uncertainty import resampled as by_pairs
from eval.verification import THRESHOLDS, ten_fold_of
from utils.data.pairs import fold_of

PAIRS, IDENTITIES = 600, 120
SAME = np.arange(PAIRS) // 30 % 2 == 0  # ten folds of 30 genuine and 30 impostor pairs


def some_pairs(seed):
    """Names (P, 2): one identity for a genuine pair, two for an impostor pair."""
    random = np.random.default_rng(seed)
    one = random.integers(IDENTITIES, size=PAIRS)
    other = np.where(SAME, one, (one + random.integers(1, IDENTITIES, size=PAIRS)) % IDENTITIES)
    return np.stack([one, other], 1)


def distances(random, identities, shared):
    """Distances whose variance is by the share `shared` a matter of the identities."""
    genuine, impostor = random.normal(size=(2, IDENTITIES))
    one, other = identities.T
    effect = np.where(SAME, genuine[one], (impostor[one] + impostor[other]) / np.sqrt(2))
    noise = random.normal(size=PAIRS)
    return np.clip(1.6 - 0.6 * SAME + 0.25 * (np.sqrt(shared) * effect + np.sqrt(1 - shared) * noise), 0, 3.99)


def test_variances_equal_the_plain_loops():
    random = np.random.default_rng(0)
    names = np.array([["a", "a"], ["a", "b"], ["b", "a"], ["b", "c"], ["c", "c"], ["c", "c"], ["d", "a"]])
    error = random.normal(size=len(names))
    alone = sum(value**2 for value in error)
    shared = drawn = 0.0
    for p, (one, other) in enumerate(names):
        for q, (third, fourth) in enumerate(names):
            common = {one, other} & {third, fourth}
            shared += error[p] * error[q] * bool(common)
            # Counts n have mean and variance 1: E[n_a n_b n_a n_c] - 1 = 1, E[n_a^2 n_b^2] - 1 = 3.
            drawn += error[p] * error[q] * (3 if len(common) == 2 else len(common))
    assert Ends.of(names).variances(error) == pytest.approx((alone, shared, drawn))
    assert Ends.of(names).design_effect(error) == pytest.approx(max(1, shared / alone))
    assert Ends.of(names).design_effect(np.zeros(len(names))) == 1


def test_a_pair_counts_as_often_as_its_identities_are_drawn():
    ends = Ends.of(np.array([["a", "a"], ["a", "b"], ["c", "b"]]))
    drawn = np.random.default_rng(1).integers(3, size=(50, 3)).tolist()
    expected = [(a, a * b, c * b) for a, b, c in ([of.count(k) for k in range(3)] for of in drawn)]
    assert ends.weights(np.random.default_rng(1), 50).tolist() == [[float(x) for x in row] for row in expected]


def test_sets_are_joined_without_a_common_identity():
    sets = [np.array([["a", "b"], ["a", "a"]]), np.array([["c", "a"], ["b", "c"], ["b", "b"]])]
    joined = Ends.joined([Ends.of(names) for names in sets])
    expected = Ends.of(np.array([[f"{k} {name}" for name in row] for k, names in enumerate(sets) for row in names]))
    assert (joined.one.tolist(), joined.other.tolist()) == (expected.one.tolist(), expected.other.tolist())
    assert joined.count == expected.count == 5


def test_draws_equal_a_plain_weighted_protocol():
    identities, distance = some_pairs(0), distances(np.random.default_rng(1), some_pairs(0), 0.5)
    weights = Ends.of(identities).weights(np.random.default_rng(2), 4)
    fold, accuracies = fold_of(PAIRS), []
    for weight in weights:
        for f in range(10):
            for label in (True, False):
                stratum = (fold == f) & (label == SAME)
                weight[stratum] *= stratum.sum() / weight[stratum].sum()
        weight[:] = np.round(weight * 2**20) / 2**20
        right = np.array([(distance < threshold) == SAME for threshold in THRESHOLDS]) * weight
        rates = []
        for f in range(10):
            best = np.argmax(right[:, fold != f].sum(1))
            rates.append(right[best, fold == f].sum() / (fold == f).sum())
        accuracies.append(100 * np.mean(rates))
    found = resampled([distance], SAME, Ends.of(identities), np.random.default_rng(2), 4)[:, 0]
    center = 100 * ten_fold_of(distance, SAME).accuracy.mean()
    ratio = (found - center) / (np.array(accuracies) - np.mean(accuracies))
    assert found.mean() == pytest.approx(center)
    assert ratio == pytest.approx(np.full(4, ratio[0]), rel=1e-4)
    assert 0.5 < ratio[0] < 1


def test_intervals_by_identities_hold_the_true_accuracy_where_those_by_pairs_do_not():
    """80 data sets of 600 pairs of 120 identities; frozen. 1,000 data sets: see docs/evaluation.md."""
    identities, random = some_pairs(1), np.random.default_rng(2)
    ends = Ends.of(identities)
    true = np.mean([100 * ten_fold_of(distances(random, identities, 0.6), SAME).accuracy.mean() for _ in range(400)])
    held = np.zeros(2)
    for k in range(80):
        distance = distances(random, identities, 0.6)
        draws = resampled([distance], SAME, ends, np.random.default_rng(k), 80)[:, 0]
        pairs = by_pairs([{"A": distance}], {"A": SAME}, seed=k, resamples=80)[:, 0, 0]
        for j, values in enumerate((draws, pairs)):
            low, high = interval(values)
            held[j] += low <= true <= high
    by_identities, alone = held / 80
    assert 0.93 <= by_identities <= 0.97
    assert alone < 0.91


def test_pairs_that_share_no_identity_have_the_spread_of_independent_pairs():
    identities = np.stack([np.arange(PAIRS), np.where(SAME, np.arange(PAIRS), PAIRS + np.arange(PAIRS))], 1)
    distance = distances(np.random.default_rng(0), some_pairs(0), 0)
    draws = resampled([distance], SAME, Ends.of(identities), np.random.default_rng(0), 400)
    share = ten_fold_of(distance, SAME).accuracy.mean()
    at_fixed_thresholds = 100 * np.sqrt(share * (1 - share) / PAIRS)
    assert at_fixed_thresholds < draws.std() < by_pairs([{"A": distance}], {"A": SAME}, resamples=400).std()


def test_draws_are_shared_by_models_and_differ_between_sets():
    identities, distance = some_pairs(0), distances(np.random.default_rng(1), some_pairs(0), 0.5)
    models, same = [{"A": distance, "B": distance}] * 2, {"A": SAME, "B": SAME}
    ends = Ends.of(identities)
    found = by_pairs(models, same, resamples=20, ends={"A": ends, "B": ends})
    assert (found[:, 0] == found[:, 1]).all()
    assert (found[:, 0, 0] != found[:, 0, 1]).any()
    mixed = by_pairs(models, same, resamples=20, ends={"A": ends, "B": None})
    assert (mixed[..., 0] == found[..., 0]).all()
    assert (mixed[..., 1] == by_pairs(models, same, resamples=20)[..., 1]).all()


def test_the_note_says_what_is_drawn():
    ends = Ends.of(some_pairs(0))
    assert method({"A": None, "B": None}) == METHOD
    assert method({"A": ends, "B": ends}) == METHOD_OF_IDENTITIES
    assert method({"A": ends, "B": None}).endswith("Pairs instead of identities for B.")
