"""Error rates at shared thresholds, and measures of fairness: by hand, and against plain loops."""

import tracemalloc
from itertools import product

import numpy as np
import pytest
import torch

from eval import rates
from eval.rates import (
    ErrorRates,
    error_rates,
    fdr,
    garbe,
    impostor_matrix,
    inequity_rate,
    max_fmr_over_geometric_mean,
    roc,
    threshold_at_fmr,
    threshold_of_best_accuracy,
)
from utils.errors import InputError
from utils.tables import Rate


def pairs(genuine, impostors):
    return np.array([*genuine, *impostors]), np.array([True] * len(genuine) + [False] * len(impostors))


def random_groups(seed, sizes=(40, 70, 25)):
    """Returns distances with two decimals, so that many are equal; genuine and impostors in random order."""
    random = np.random.default_rng(seed)
    groups = {}
    for name, size in zip("ABC", sizes, strict=True):
        same = random.permutation(np.arange(size) % 2 == 0)
        groups[name] = (random.normal(np.where(same, 0.8, 1.3), 0.2).clip(0, 4).round(2), same)
    return groups


def together(groups):
    return [np.concatenate(parts) for parts in zip(*groups.values(), strict=True)]


GROUPS = {"A": pairs([0.2, 0.5, 0.9], [0.5, 0.8, 0.8, 1.0]), "B": pairs([0.3, 1.1], [0.7, 0.9, 1.2, 1.3, 1.4, 1.5])}
"""The impostors of all groups: 0.5 0.7 0.8 0.8 0.9 1.0 1.2 1.3 1.4 1.5."""


# Thresholds and rates -------------------------------------------------------------------------------------------------


def test_threshold_at_fmr_by_hand():
    assert threshold_at_fmr(GROUPS, 0.4) == 0.9  # accepts 0.5, 0.7, 0.8 and 0.8: four of ten
    assert threshold_at_fmr(GROUPS, 0.49) == 0.9
    assert threshold_at_fmr(GROUPS, 0.5) == 1.0
    assert threshold_at_fmr(GROUPS, 0.3) == 0.8  # accepts two: the third and fourth are equal
    assert threshold_at_fmr(GROUPS, 0.29) is None


@pytest.mark.parametrize("fmr", [1e-2, 1e-3, 0.03, 0.3])
def test_rule_of_three_at_its_boundary(fmr):
    """3 / fmr impostors, over all groups, are enough; one fewer is not."""
    enough = round(3 / fmr)
    groups = {"A": pairs([0.1], np.arange(enough - 4) + 1.0), "B": pairs([0.1], [0.2, 0.4, 0.6, 0.8])}
    assert threshold_at_fmr(groups, fmr) == 0.8
    groups["B"] = pairs([0.1], [0.2, 0.4, 0.6])
    assert threshold_at_fmr(groups, fmr) is None


def test_rounding_does_not_reject_an_exactly_met_rate():
    """0.29 * 100 is 28.999999999999996, but 29 of 100 impostors are no more than 0.29."""
    for count in range(3, 100):
        assert threshold_at_fmr({"A": pairs([0.5], np.arange(100.0))}, count / 100) == count


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fmr", [0.05, 0.1, 0.25, 0.5, 0.99])
def test_threshold_at_fmr_equals_the_plain_search(seed, fmr):
    groups = random_groups(seed)
    distance, same = together(groups)
    impostors = distance[~same]

    def holds(threshold):
        return np.mean(impostors < threshold) <= fmr

    threshold = threshold_at_fmr(groups, fmr)
    assert threshold == max(value for value in impostors if holds(value))
    assert not holds(np.nextafter(threshold, np.inf))


def test_threshold_of_best_accuracy_by_hand():
    # Correct of 15 pairs: 10 at 0.2, 11 at 0.3, 12 at 0.5 and at 0.7: genuine 0.5 and impostor 0.5 cancel.
    assert threshold_of_best_accuracy(GROUPS) == (0.5, 12 / 15)
    assert threshold_of_best_accuracy({"A": pairs([0.5, 0.6], [0.4])})[1] == 2 / 3
    threshold, accuracy = threshold_of_best_accuracy({"A": pairs([0.5, 0.6, 0.6], [0.4])})
    assert accuracy == 0.75
    assert threshold == np.nextafter(0.6, 1)  # accepts all


@pytest.mark.parametrize("seed", range(10))
def test_best_accuracy_equals_the_plain_search(seed):
    groups = random_groups(seed)
    distance, same = together(groups)
    candidates = [*sorted(set(distance)), np.nextafter(distance.max(), np.inf)]
    right = [sum((d < threshold) == s for d, s in zip(distance, same, strict=True)) for threshold in candidates]
    best = int(np.argmax(right))
    assert threshold_of_best_accuracy(groups) == (candidates[best], right[best] / len(same))


@pytest.fixture
def no_denormals():
    """Flushes denormals to zero, as a process does that has called `utils.process.setup`."""
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def test_a_model_that_maps_all_faces_to_one_point_has_defined_thresholds_and_rates(no_denormals):
    groups = {"A": pairs([0.0] * 5, [0.0] * 10)}
    assert threshold_at_fmr(groups, 0.5) == 0
    assert threshold_of_best_accuracy(groups) == (0.0, 10 / 15)
    assert error_rates(groups, 0.0) == {"A": ErrorRates(Rate(0, 10), Rate(5, 5))}
    assert [list(part) for part in roc(*groups["A"])[1:]] == [[0, 1], [1, 0]]
    for seed in range(20):  # |a|^2 + |b|^2 - 2 ab of equal embeddings can be rounded to below zero
        point = units(1, seed, 64).repeat(3, 0)
        assert impostor_matrix({"A": point, "B": point}, {"A": np.zeros(3), "B": np.zeros(3)}, 0.0)[0][1] == Rate(0, 9)


def test_error_rates_by_hand():
    """A distance equal to the threshold is not accepted."""
    assert error_rates(GROUPS, 0.9) == {
        "A": ErrorRates(fmr=Rate(3, 4), fnmr=Rate(1, 3)),
        "B": ErrorRates(fmr=Rate(1, 6), fnmr=Rate(1, 2)),
    }


@pytest.mark.parametrize("seed", range(5))
def test_error_rates_and_roc_equal_the_plain_loop(seed):
    for name, (distance, same) in random_groups(seed).items():
        thresholds, fmr, fnmr = roc(distance, same)
        assert thresholds[:-1].tolist() == sorted(set(distance))
        assert thresholds[-1] == np.nextafter(distance.max(), np.inf)
        for k, threshold in enumerate(thresholds):
            matches = sum(d < threshold for d in distance[~same])
            non_matches = sum(not d < threshold for d in distance[same])
            assert fmr[k] == matches / sum(~same)
            assert fnmr[k] == non_matches / sum(same)
            expected = ErrorRates(Rate(matches, sum(~same)), Rate(non_matches, sum(same)))
            assert error_rates({name: (distance, same)}, threshold) == {name: expected}


def test_roc_by_hand_runs_from_no_pair_to_all_pairs_accepted():
    thresholds, fmr, fnmr = roc(*pairs([0.2, 0.5], [0.5, 0.5, 0.8, 1.0]))
    assert thresholds.tolist() == [0.2, 0.5, 0.8, 1.0, np.nextafter(1, 2)]
    assert fmr.tolist() == [0, 0, 0.5, 0.75, 1]
    assert fnmr.tolist() == [1, 0.5, 0, 0, 0]


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (Rate(123, 10_000), "0.0123"),
        (Rate(1, 3000), "< 0.001"),
        (Rate(2, 3000), "< 0.001"),
        (Rate(3, 3000), "0.00100"),
        (Rate(0, 2999), "< 0.0011"),  # 3 / 2999 = 0.0010003, rounded up: the bound must hold
        (Rate(3000, 3000), "1.00"),
        (Rate(7, 4_000_000), "1.75e-06"),
        (Rate(0, 4_000_000), "< 7.5e-07"),
        (Rate(2, 3), "< 1"),
        (Rate(2, 2), "unknown"),
    ],
)
def test_a_rate_that_its_pairs_cannot_resolve_is_printed_as_a_bound(rate, text):
    assert rate.text() == text
    assert rate.resolved == (rate.value >= 3 / rate.of)
    assert rate.resolved == (text[0] in "01")


# Measures -------------------------------------------------------------------------------------------------------------


def of(fmr, fnmr):
    """Returns groups with these numbers of errors in 1,000 impostor and 100 genuine pairs."""
    return {k: ErrorRates(Rate(a, 1000), Rate(b, 100)) for k, (a, b) in enumerate(zip(fmr, fnmr, strict=True))}


THREE = of((10, 40, 20), (9, 4, 36))
MEASURES = (fdr, inequity_rate, garbe, max_fmr_over_geometric_mean)


def test_measures_by_hand():
    """FMR 0.01, 0.04, 0.02 and FNMR 0.09, 0.04, 0.36.

    FDR: largest differences 0.03 and 0.32. Inequity: ratios 4 and 9. GARBE: the absolute differences, each counted
    twice, sum to 0.12 and 1.28, the means are 0.07 / 3 and 0.49 / 3, so that G is 3 / 2 * 0.12 / 0.42 = 3 / 7 and
    3 / 2 * 1.28 / 2.94 = 32 / 49. The geometric mean of FMR is the third root of 8e-6, 0.02.
    """
    assert fdr(THREE) == pytest.approx(1 - 0.5 * 0.03 - 0.5 * 0.32)
    assert inequity_rate(THREE) == pytest.approx(2 * 3)
    assert garbe(THREE) == pytest.approx(0.5 * 3 / 7 + 0.5 * 32 / 49)
    assert max_fmr_over_geometric_mean(THREE) == pytest.approx(0.04 / 0.02)


@pytest.mark.parametrize("others", [1, 3, 7])
def test_garbe_is_near_one_if_one_group_has_all_errors(others):
    """The factor n / (n - 1) makes this true for any number of groups."""
    some, all_of_them = Rate(3, 10**9), Rate(10**9, 10**9)
    groups = {"worst": ErrorRates(all_of_them, all_of_them)} | {k: ErrorRates(some, some) for k in range(others)}
    assert garbe(groups) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("errors", [0, 2])
def test_ratios_of_unresolved_rates_are_not_given(errors):
    """FDR uses differences, so it is still defined."""
    low_fmr = of((errors, 40, 20), (9, 4, 36))
    assert [measure(low_fmr) for measure in MEASURES[1:]] == [None] * 3
    assert fdr(low_fmr) == pytest.approx(1 - 0.5 * (0.04 - errors / 1000) - 0.5 * 0.32)
    low_fnmr = of((10, 40, 20), (9, errors, 36))
    assert [measure(low_fnmr) for measure in MEASURES[1:]] == [None, None, pytest.approx(2)]


def test_three_errors_are_resolved():
    assert inequity_rate(of((3, 12), (3, 27))) == pytest.approx(2 * 3)


# Impostor matrix ------------------------------------------------------------------------------------------------------


def units(count, seed, dimensions=4):
    x = np.random.default_rng(seed).normal(size=(count, dimensions))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_impostor_matrix_equals_the_plain_loop(block, monkeypatch):
    monkeypatch.setattr(rates, "BLOCK", block)
    embeddings = {"A": units(7, 0), "B": units(5, 1), "C": units(6, 2)}
    embeddings["B"][3] = 0  # the embedding of a feature of length zero: squared distance 1 to all others
    own = {name: np.array([0.5, 1.5, 1.5, 2.0]) for name in embeddings} | {"B": np.array([0.1, 3.0])}
    matrix = impostor_matrix(embeddings, own, 1.5)
    for (i, one), (j, other) in product(enumerate("ABC"), repeat=2):
        if i == j:
            continue
        distances = [np.sum((x - y) ** 2) for x in embeddings[one] for y in embeddings[other]]
        assert matrix[i][j] == Rate(sum(d < 1.5 for d in distances), len(distances))
        assert 0 < matrix[i][j].errors < matrix[i][j].of
    assert [matrix[k][k] for k in range(3)] == [Rate(1, 4), Rate(1, 2), Rate(1, 4)]


def test_impostor_matrix_by_hand():
    """Compares east and north with east, north-east and west: squared distances 0, 0.586, 4 and 2, 0.586, 2."""
    half = 0.5**0.5
    embeddings = {"A": np.array([[1.0, 0], [0, 1]]), "B": np.array([[1.0, 0], [half, half], [-1, 0]])}
    own = {"A": np.array([2.0]), "B": np.array([0.6, 4.0])}
    assert impostor_matrix(embeddings, own, 1.0) == [[Rate(0, 1), Rate(3, 6)], [Rate(3, 6), Rate(1, 2)]]


def test_impostor_matrix_needs_little_memory():
    embeddings = {name: units(2000, k, 512) for k, name in enumerate("AB")}
    tracemalloc.start()
    impostor_matrix(embeddings, {name: np.ones(10) for name in "AB"}, 1.5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (pairs([0.1, np.nan], [1.0]), "has distances that are NaN or infinite"),
        (pairs([0.1], [1.0, np.inf]), "has distances that are NaN or infinite"),
        (pairs([], [1.0]), "has no genuine pair"),
        (pairs([0.1], []), "has no impostor pair"),
        (pairs([], []), "has no genuine pair"),
        ((np.ones(2), np.array([True, False, False])), "has 2 distances for 3 pairs"),
    ],
)
def test_pairs_without_an_error_rate_are_refused(bad, sentence):
    groups = GROUPS | {"Bad": bad}
    for function in (threshold_of_best_accuracy, lambda g: threshold_at_fmr(g, 0.5), lambda g: error_rates(g, 1.0)):
        with pytest.raises(InputError, match=f"The set of Bad {sentence}"):
            function(groups)
    with pytest.raises(InputError, match=f"This set {sentence}"):
        roc(*bad)


@pytest.mark.parametrize("fmr", [0, 1, -0.1, 1e3, float("nan")])
def test_impossible_rates_are_refused(fmr):
    with pytest.raises(InputError, match="is not between 0 and 1"):
        threshold_at_fmr(GROUPS, fmr)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_groups_that_the_matrix_cannot_hold_are_refused(value):
    embeddings, own = {"A": units(3, 0), "B": units(3, 1)}, {"A": np.ones(2), "B": np.ones(2)}
    with pytest.raises(InputError, match="The set of B has impostor pairs with NaN or infinite values"):
        impostor_matrix(embeddings, own | {"B": np.array([1, value])}, 1.0)
    with pytest.raises(InputError, match="The set of B has no impostor pairs"):
        impostor_matrix(embeddings, own | {"B": np.empty(0)}, 1.0)
    with pytest.raises(InputError, match="The set of A has no images"):
        impostor_matrix(embeddings | {"A": np.empty((0, 4))}, own, 1.0)
    embeddings["B"][2, 1] = value
    with pytest.raises(InputError, match="The set of B has images with NaN or infinite values"):
        impostor_matrix(embeddings, own, 1.0)
