"""Intervals against plain resampling, and the spread by chance against an independent simulation."""

import warnings

import numpy as np
import pytest

from eval.uncertainty import by_chance, difference, fewest, interval, is_within_chance, resampled, stds
from eval.verification import ten_fold_of
from utils.data.pairs import fold_of

SAME = np.arange(600) // 30 % 2 == 0  # ten folds of 30 genuine and 30 impostor pairs


def distances(seed, apart):
    random = np.random.default_rng(seed)
    return np.clip(random.normal(1.2, 0.3, 600) - apart * SAME, 0, 4)


def test_resampling_is_ten_fold_verification_of_pairs_drawn_within_fold_and_label():
    models, labels = [{"A": distances(1, 0.5)}, {"A": distances(2, 0.8)}], {"A": SAME}
    samples = resampled(models, labels, seed=3, resamples=5)
    assert samples.shape == (5, 2, 1)
    uniform = np.random.default_rng((3, 0)).random((5, 600))
    fold = fold_of(600)
    strata = [np.flatnonzero((fold == f) & (label == SAME)) for f in range(10) for label in (False, True)]
    for r in range(5):
        part = iter(uniform[r])
        drawn = [members[int(next(part) * len(members))] for members in strata for _ in members]
        for m, model in enumerate(models):
            # In the order of the folds, as in `ten_fold_of`.
            wanted = 100 * ten_fold_of(model["A"][drawn], SAME[drawn]).accuracy.mean()
            assert samples[r, m, 0] == pytest.approx(wanted, abs=1e-9)
    assert fewest(SAME) == 30
    assert fewest(np.arange(40) % 4 == 0) == 1


def test_sets_whose_size_the_folds_do_not_divide_are_resampled_within_their_folds():
    same = np.random.default_rng(0).random(107) < 0.4
    sure = np.where(same, 0.5, 2.0)
    assert (resampled([{"A": sure}], {"A": same}, resamples=20) == 100).all()


def test_an_interval_has_the_width_of_a_binomial_share():
    """Accuracy about 0.8 on 600 pairs: a standard error of 1.6 points."""
    one = {"A": distances(1, 0.5)}
    samples = resampled([one], {"A": SAME}, resamples=400)[:, 0, 0]
    low, high = interval(samples)
    share = ten_fold_of(one["A"], SAME).accuracy.mean()
    wanted = 2 * 1.96 * 100 * np.sqrt(share * (1 - share) / 600)
    assert high - low == pytest.approx(wanted, rel=0.25)
    assert low < 100 * share < high


def test_differences_are_paired():
    """A model does not differ from itself; models with errors on the same pairs have a narrower interval."""
    labels = {"A": SAME, "B": SAME}
    first = {"A": distances(1, 0.6), "B": distances(2, 0.6)}
    alike = {name: values + np.where(np.arange(600) % 50 == 0, 0.2, 0.0) for name, values in first.items()}
    apart = {"A": distances(3, 0.6), "B": distances(4, 0.6)}
    models = [first, first, alike, apart]
    accuracies = np.array([[100 * ten_fold_of(one[k], SAME).accuracy.mean() for k in labels] for one in models])
    samples = resampled(models, labels, resamples=200)
    itself = difference(0, 1, accuracies, samples)
    assert (itself.average, itself.average_interval, itself.std, itself.std_interval) == (0, (0, 0), 0, (0, 0))
    paired, unpaired = (difference(0, k, accuracies, samples) for k in (2, 3))
    width = np.diff
    assert width(paired.average_interval) < 0.6 * width(unpaired.average_interval)
    assert unpaired.average == pytest.approx(accuracies[0].mean() - accuracies[3].mean())
    assert unpaired.std == pytest.approx(accuracies[0].std(ddof=1) - accuracies[3].std(ddof=1))


def test_the_variance_that_resampling_adds_is_subtracted():
    """With a true STD of 2 and noise of standard deviations 0.5 to 3, the corrected variance is 4 on average."""
    random = np.random.default_rng(0)
    apart = np.array([-1.0, 1.0, -1.0, 1.0]) * np.sqrt(3)
    assert apart.std(ddof=1) == pytest.approx(2)
    samples = apart + random.normal(0, (0.5, 1.0, 0.5, 3.0), (20_000, 4))
    added = np.square((0.5, 1.0, 0.5, 3.0)).mean()
    assert samples.var(1, ddof=1).mean() == pytest.approx(4 + added, rel=0.02)
    assert np.square(stds(samples + 90)).mean() == pytest.approx(4, abs=0.1)


def test_a_single_set_has_no_std_and_gives_no_warning():
    random = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = difference(0, 1, np.array([[95.0], [94.0]]), random.normal(95, 1, (200, 2, 1)))
    assert found.average == 1
    assert np.isnan([found.std, *found.std_interval]).all()


def test_std_and_ser_by_chance_equal_an_independent_simulation():
    """Expected: 200,000 simulations of four groups of 6,000 pairs. Errors: 0.005 by rounding, 0.001 by simulation."""
    at_95, at_90 = by_chance(95.0, (6000,) * 4), by_chance(90.0, (6000,) * 4)
    assert (at_95.std_mean, at_95.std_95) == pytest.approx((0.26, 0.45), abs=0.006)
    assert at_95.ser_95 == pytest.approx(1.23, abs=0.006)
    assert (at_90.std_mean, at_90.std_95) == pytest.approx((0.36, 0.63), abs=0.006)
    assert at_90.ser_95 == pytest.approx(1.15, abs=0.006)


def test_within_chance_needs_std_and_ser_below_their_limits():
    assert is_within_chance((95.2, 94.8, 95.1, 95.0), (6000,) * 4)
    assert not is_within_chance((96.2, 93.8, 95.1, 95.0), (6000,) * 4)
    assert is_within_chance((96.2, 93.8, 95.1, 95.0), (300,) * 4)
    assert is_within_chance((100.0, 100.0), (50, 50))


def test_one_error_of_a_nearly_perfect_model_is_within_chance():
    """The average of 99.9958 must not be rounded to 100, whose models have no errors at all."""
    one_error = 100 - 100 / 6000
    assert is_within_chance((100.0, 100.0, 100.0, one_error), (6000,) * 4)
    assert not is_within_chance((100.0, 100.0, 100.0, 100 - 7 * 100 / 6000), (6000,) * 4)


def test_an_infinite_ser_is_within_chance_if_a_group_may_have_no_error():
    assert by_chance(99.0, (300,) * 4).ser_95 == np.inf
    assert is_within_chance((99.0, 99.0, 99.0, 99.0), (300,) * 4)
    assert is_within_chance((100.0, 98.7, 99.0, 98.3), (300,) * 4)
    assert not is_within_chance((100.0, 100.0, 100.0, 96.0), (300,) * 4)


@pytest.mark.parametrize("others", [95.0, 80.0])
def test_the_difference_in_std_of_fair_models_is_rarely_sure(others):
    """Draws from normal distributions instead of pairs: 400 times two fair models, four groups of 6,000 pairs."""
    random = np.random.default_rng(0)
    spread = [100 * np.sqrt(share * (1 - share) / 6000) for share in (0.95, others / 100)]
    sure = 0
    for _ in range(400):
        accuracies = np.stack([random.normal(mean, s, 4) for mean, s in zip((95.0, others), spread, strict=True)])
        drawn = accuracies + random.normal(0, np.array(spread)[:, None], (1000, 2, 4))
        low, high = difference(0, 1, accuracies, drawn).std_interval
        sure += low > 0 or high < 0
    assert sure / 400 < 0.08
