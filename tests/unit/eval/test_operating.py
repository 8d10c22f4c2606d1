"""Exact intervals and operating points: by hand, against plain searches, and how often the intervals hold the truth."""

import numpy as np
import pytest
from scipy.stats import binom

from eval.identities import Ends
from eval.intervals import Sampled
from eval.operating import Identified, at, check_reference, marked, points, reference_of
from eval.rates import error_rates
from utils.errors import InputError
from utils.tables import Rate


def test_clopper_pearson_bounds_are_those_at_which_the_tails_are_a_fortieth():
    for errors, of in ((0, 20), (1, 20), (3, 3000), (19, 20), (20, 20)):
        low, high = Sampled(Rate(errors, of)).interval
        assert (low == 0) == (errors == 0)
        assert (high == 1) == (errors == of)
        if errors:
            assert binom.sf(errors - 1, of, low) == pytest.approx(0.025)
        if errors < of:
            assert binom.cdf(errors, of, high) == pytest.approx(0.025)
    # Printed in textbooks: no event in 20 trials.
    assert Sampled(Rate(0, 20)).interval[1] == pytest.approx(0.1684, abs=1e-4)


def test_a_design_effect_divides_both_counts():
    assert Sampled(Rate(30, 3000), 3.0).interval == pytest.approx(Sampled(Rate(10, 1000)).interval)


def test_ratio_by_hand():
    """0.02 / 0.01 of 1,000 pairs each: the variance of the logarithm is 0.98 / 20 + 0.99 / 10."""
    found = Sampled(Rate(20, 1000)).over(Sampled(Rate(10, 1000)))
    width = np.exp(1.959964 * np.sqrt(0.98 / 20 + 0.99 / 10))
    assert (found.value, found.low, found.high) == pytest.approx((2, 2 / width, 2 * width))
    assert Sampled(Rate(2, 1000)).over(Sampled(Rate(10, 1000))) is None
    assert Sampled(Rate(20, 1000)).over(Sampled(Rate(0, 1000))) is None


def test_intervals_of_a_false_match_rate_with_shared_identities_hold_the_truth():
    """1,500 data sets of 3,000 impostor pairs of 300 identities, each of whom is alike to others or not; frozen."""
    random = np.random.default_rng(0)
    one = random.integers(300, size=3000)
    other = (one + random.integers(1, 300, size=3000)) % 300
    ends, held = Ends.of(np.stack([one, other], 1)), np.zeros(2)
    for _ in range(1500):
        alike = random.normal(size=300)
        wrong = (alike[one] + alike[other]) / 2 + random.normal(size=3000) / np.sqrt(2) > 1.644854  # 5 %
        for k, known in enumerate((ends, None)):
            low, high = Sampled.of(wrong, known).interval
            held[k] += low <= 0.05 <= high
    assert 0.93 <= held[0] / 1500 <= 0.97
    assert held[1] / 1500 < 0.85


def groups(seed=0, impostors=4000):
    random = np.random.default_rng(seed)
    found = {}
    for name, shift in (("A", 0.0), ("B", -0.1), ("C", 0.1)):
        same = np.arange(impostors + 500) < 500
        found[name] = (np.clip(random.normal(1.6 + shift, 0.2, len(same)) - 0.7 * same, 0.01, 4), same)
    return found


def test_thresholds_are_those_of_plain_searches():
    pairs = groups()
    found = {point.name: point.threshold for point in points(pairs, "A", 1.0)}
    impostors = {name: np.sort(distance[~same]) for name, (distance, same) in pairs.items()}
    together = np.sort(np.concatenate(list(impostors.values())))
    assert list(found) == [
        *(f"{who} at FMR {fmr}" for fmr in ("0.001", "0.0001") for who in ("all groups", "A", "worst group")),
        "given",
    ]
    assert found["A at FMR 0.001"] == impostors["A"][4]  # accepts four of 4,000
    assert found["all groups at FMR 0.001"] == together[12]
    assert found["worst group at FMR 0.001"] == min(values[4] for values in impostors.values())
    assert [found[f"{who} at FMR 0.0001"] for who in ("A", "all groups", "worst group")] == [None] * 3
    assert found["given"] == 1.0


def test_rates_at_a_point_are_the_plain_ones():
    pairs = groups()
    same = {name: labels for name, (_, labels) in pairs.items()}
    found, plain = at(pairs, 1.2, Identified(same, {})), error_rates(pairs, 1.2)
    for name in pairs:
        assert (found[name].fmr.rate, found[name].fnmr.rate) == (plain[name].fmr, plain[name].fnmr)
        assert (found[name].fmr.design_effect, found[name].fnmr.design_effect) == (1, 1)
    names = np.array(
        [[f"{k // 20}", f"{k // 20}" if label else f"{k // 20} other"] for k, label in enumerate(same["A"])]
    )
    distance = pairs["A"][0] - 0.3 * (np.arange(len(names)) // 20 % 2)
    known = at({"A": (distance, same["A"])}, 1.2, Identified({"A": same["A"]}, {"A": Ends.of(names)}))["A"]
    assert known.fmr.design_effect > 1 and known.fnmr.design_effect > 1


def test_bad_points_are_refused():
    with pytest.raises(InputError, match="threshold = 9 decides every pair alike: set it between the distances"):
        points(groups(), "A", 9)
    with pytest.raises(InputError, match="reference_group = 'D' is none of the groups: set it to one of A, B"):
        reference_of({"A": 90.0, "B": 91.0}, "D")
    assert reference_of({"A": 90.0, "B": 91.0}, None) == "B"
    assert reference_of({"A": 90.0, "B": 91.0}, "A") == "A"
    check_reference(["A"], None)
    with pytest.raises(InputError, match="reference_group = 'D': there is only A and nothing to compare: leave it out"):
        check_reference(["A"], "D")


def test_pictures_mark_the_thresholds_that_the_pairs_resolve():
    random = np.random.default_rng(0)
    same = np.arange(8000) % 2 == 0
    groups = {name: (random.normal(1.8 - same, 0.2), same) for name in ("A", "B")}
    own = next(point.threshold for point in points(groups, "B") if point.name == "B at FMR 0.001")
    found = marked({"FMR 0.01": 1.1, "FMR 0.001": None}, groups, "B", 1.25)
    assert found == {"FMR 0.01": 1.1, "B at FMR 0.001": own, "--threshold": 1.25}
    few = {name: (distance[:100], labels[:100]) for name, (distance, labels) in groups.items()}
    assert marked({"best accuracy": 1.2}, few, "B", None) == {"best accuracy": 1.2}
