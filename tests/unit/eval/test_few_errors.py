"""Intervals of nearly perfect models: against published bounds, and how often they hold the true value."""

import numpy as np
import pytest

from eval.fairness import std
from eval.few_errors import FEW_ERRORS, FewErrors
from eval.identities import Ends
from eval.intervals import Sampled, mean_of, minus
from eval.uncertainty import interval, stds
from utils.tables import Rate

DATA_SETS, RESAMPLES = 400, 200


def wrong(errors, pairs, first=0):
    """Returns (pairs,) bool, True for so many pairs from the place `first` on."""
    place = np.arange(pairs)
    return (place >= first) & (place < first + errors)


def few_errors(*models, pairs=6000):
    """Two models with unequal errors share the pairs that the better one decides wrongly."""
    return FewErrors([[wrong(errors, pairs) for errors in one] for one in models], [None] * len(models[0]))


def a_data_set(random, pairs, rates):
    """Returns the wrong decisions of two models and their accuracies (RESAMPLES, 2, G) on resampled pairs.

    Half of the first model's errors are those of both; the other model has three times as many of its own.
    """
    both, one, other = random.binomial(pairs, [rates / 2, rates / 2, 1.5 * rates])
    masks = [[], []]
    for n, b, x, y in zip(pairs, both, one, other, strict=True):
        masks[0].append(wrong(b + x, n))
        masks[1].append(wrong(b, n) | wrong(y, n, b + x))
    b, x, y = random.poisson([both, one, other], (RESAMPLES, 3, len(pairs))).transpose(1, 0, 2)
    return masks, 100 - 100 * np.stack([b + x, b + y], 1) / pairs


def percentiles(samples):
    one, other = samples.transpose(1, 0, 2)
    return {
        "set": interval(one[:, -1]),
        "average": interval(one.mean(1)),
        "gap": interval(one[:, 0] - one[:, -1]),
        "difference": interval((one - other).mean(1)),
        "STD": interval(stds(one)),
        "difference of STD": interval(stds(one) - stds(other)),
    }


def holds(bounds, value):
    return bounds[0] - 1e-9 <= value <= bounds[1] + 1e-9


@pytest.mark.parametrize(
    ("pairs", "rate", "worst", "short"),
    [
        ((6000, 6000), 1e-4, 1, {"set", "average", "difference"}),
        ((6000,) * 4, 3e-4, 1, {"set"}),
        ((6000,) * 4, 1e-3, 4, set()),
        ((6000, 600, 6000, 600), 3e-4, 4, {"set", "average", "gap", "difference", "STD"}),
    ],
)
def test_intervals_of_nearly_perfect_models_hold_the_true_value(pairs, rate, worst, short):
    """The last group has `worst` times the errors; percentiles alone are too narrow for what `short` names."""
    random, pairs, rates = np.random.default_rng(0), np.array(pairs), np.full(len(pairs), rate)
    rates[-1] *= worst
    sets, last = range(len(pairs)), len(pairs) - 1
    true = {"set": 1 - rates[-1], "average": 1 - rates.mean(), "gap": rates[-1] - rates[0], "difference": rates.mean()}
    true |= {"STD": std(rates), "difference of STD": -std(rates)}
    held, alone = dict.fromkeys(true, 0), dict.fromkeys(true, 0)
    for _ in range(DATA_SETS):
        masks, samples = a_data_set(random, pairs, rates)
        few, narrow = FewErrors(masks, [None] * len(pairs)), percentiles(samples)
        wide = percentiles(few.smoothed(samples))
        wide["set"] = few.accuracy(0, last, wide["set"])
        wide["average"] = few.average(0, sets, wide["average"])
        wide["gap"] = few.gap(0, last, 0, wide["gap"])
        wide["difference"] = few.difference(0, 1, sets, wide["difference"])
        for name, value in true.items():
            held[name] += holds(wide[name], 100 * value)
            alone[name] += holds(narrow[name], 100 * value)
        errors = np.array([one.mean() for one in masks[0]])
        assert holds(wide["average"], 100 - 100 * errors.mean())
        assert holds(wide["STD"], 100 * std(errors))
    assert min(held.values()) >= 0.93 * DATA_SETS, held
    assert all(alone[name] < 0.93 * DATA_SETS for name in short), alone


def test_the_mean_of_rates_has_the_published_gamma_interval():
    """Down syndrome per 100,000 births in Michigan, birth order 5 and later: Table II of Fay and Feuer (1997)."""
    cases, births = [0, 8, 63, 112, 262, 295], [327, 30666, 123419, 149919, 104088, 34392]
    standard = np.array([319933, 931318, 786511, 488235, 237863, 61313])
    share = len(standard) * standard / standard.sum()
    found = mean_of([Sampled(Rate(c, b / s)) for c, b, s in zip(cases, births, share, strict=True)])
    rates = np.array([found.value, found.low, found.high]) * 1e5
    assert rates == pytest.approx([75.52901, 67.70212, 188.30017], abs=1e-5)  # CRAN package dsrTest 1.0.0


def test_the_mean_of_sets_of_equal_size_has_the_exact_interval_of_a_poisson_number():
    assert mean_of([Sampled(Rate(0, 6000))] * 4).high == pytest.approx(3.6888795 / 24_000)
    found = mean_of([Sampled(Rate(errors, 6000)) for errors in (1, 2, 3, 4)])
    assert (found.low, found.high) == pytest.approx((4.7953887 / 24_000, 18.3903560 / 24_000))
    assert mean_of([Sampled(Rate(3, 3))]).high == 1


def test_a_difference_of_two_poisson_numbers_excludes_zero_as_the_exact_test_does():
    """Two-sided sign test: p = 0.0625 for 5 against 0, 0.031 for 6 against 0; 0.070 for 1 against 7, 0.039 for 8."""
    rates = {errors: mean_of([Sampled(Rate(errors, 100_000))]) for errors in (0, 1, 5, 6, 7, 8)}
    assert minus(rates[5], rates[0])[0] < 0 < minus(rates[6], rates[0])[0]
    assert minus(rates[1], rates[8])[1] < 0 < minus(rates[1], rates[7])[1]
    low, high = minus(rates[0], rates[0])
    assert -low == high == pytest.approx(3.6888795e-5)


def test_shared_identities_widen_the_interval_by_their_design_effect():
    """Three errors in pairs of the same identity count as one of a third of the pairs."""
    errors = [wrong(3, 3000)]
    names = np.repeat(np.arange(1000), 3)
    ends = Ends.of(np.stack([names, names], 1))
    alone, shared = (FewErrors([errors], [known]).average(0, [0], (99.9, 99.9)) for known in (None, ends))
    one = mean_of([Sampled(Rate(1, 1000))])
    assert shared == pytest.approx((100 - 100 * one.high, 100 - 100 * one.low), rel=1e-4)
    assert shared[0] < alone[0] < alone[1] < shared[1]


def test_intervals_of_many_errors_stay_as_they_are():
    few = few_errors([FEW_ERRORS, FEW_ERRORS], [2 * FEW_ERRORS, 2 * FEW_ERRORS])
    samples, bounds = np.random.default_rng(0).normal(99, 0.1, (20, 2, 2)), (99.0, 99.1)
    assert (few.smoothed(samples) == samples).all()
    assert few.accuracy(0, 0, bounds) == few.average(0, [0, 1], bounds) == few.gap(0, 0, 1, bounds) == bounds
    assert few.difference(0, 1, [0, 1], bounds) == bounds


def test_one_set_with_few_errors_widens_its_own_interval_and_those_it_is_part_of():
    few = few_errors([FEW_ERRORS, 0], [2 * FEW_ERRORS, 0])
    samples, bounds = np.full((1000, 2, 2), 99.0), (99.0, 99.0)
    smoothed = few.smoothed(samples)
    assert (smoothed[..., 0] == 99).all()
    assert 99 - smoothed[..., 1].mean() == pytest.approx(100 * 0.5 / 6000, rel=0.1)
    assert few.accuracy(0, 0, bounds) == bounds
    assert few.accuracy(0, 1, bounds)[1] == 100
    for low, high in (few.average(0, [0, 1], bounds), few.gap(0, 0, 1, bounds), few.difference(0, 1, [0, 1], bounds)):
        assert high > low
    assert few.average(0, [0], bounds) == few.difference(0, 1, [0], bounds) == bounds
