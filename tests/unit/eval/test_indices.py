"""Indices of fairness: golden values by hand, plain implementations, and the page that prints their definitions."""

from math import log2

import numpy as np
import pytest
from scipy.stats import ks_2samp

from eval.indices import (
    BINS,
    INDICES,
    compactness,
    d_prime,
    definitions,
    distribution,
    enough,
    ks_distance,
    mape,
    scores_of,
    sedg,
    separation,
    werm,
)
from tests.runs import ROOT
from tests.unit.eval.test_rates import THREE, of

TWO = {"A": (np.array([0.8, 0.9]), np.array([0.1, 0.3])), "B": (np.array([0.6, 0.8]), np.array([0.2, 0.4]))}


def test_indices_of_scores_by_hand():
    """Separations 0.65 and 0.4, mean 0.525; standard deviations 0.05 + 0.1 and 0.1 + 0.1, mean 0.175."""
    assert separation(TWO) == pytest.approx(1 - 2 * 0.125)
    assert compactness(TWO) == pytest.approx(1 - 2 * 0.025)
    # Histograms in bins of 0.01: each group has four bins of 1/4 of its own but one that both share (0.8).
    divergence = 3 * 0.25 * log2(2) + 0.25 * log2(0.25 / 0.25)
    assert distribution(TWO) == pytest.approx(1 - 2 * divergence / (2 * log2(2)))
    same = {"A": TWO["A"], "B": TWO["A"]}
    assert (separation(same), compactness(same), distribution(same)) == (1, 1, 1)


def test_d_prime_by_hand():
    assert d_prime(np.array([0.8, 1.0]), np.array([0.1, 0.3])) == pytest.approx(0.7 / np.sqrt(0.02))
    assert d_prime(np.array([0.8, 0.8]), np.array([0.1, 0.1])) is None


def test_indices_of_rates_by_hand():
    """FMR 0.01, 0.04, 0.02 (geometric mean 0.02), FNMR 0.09, 0.04, 0.36 (product 0.001296)."""
    assert werm(THREE) == pytest.approx(np.sqrt(2 * 0.36 / 0.001296 ** (1 / 3)))
    fmr, fnmr = 0.07 / 3, 0.49 / 3
    expected = [abs(1 - a / fmr) + abs(1 - b / fnmr) for a, b in ((0.01, 0.09), (0.04, 0.04), (0.02, 0.36))]
    assert sedg(THREE) == pytest.approx(expected)
    assert INDICES["SEDG"].of_rates(THREE, None) == pytest.approx(np.mean(expected))
    assert INDICES["SEDG sd"].of_rates(THREE, None) == pytest.approx(np.std(expected))
    assert mape(THREE, 0.02) == pytest.approx(100 * (0.5 + 1 + 0) / 3)
    assert mape(THREE, None) is None


def test_sedg_of_two_groups_has_no_standard_deviation():
    """Both rates of two groups are equally far from their mean, however unfair."""
    two = of((10, 40), (9, 36))
    assert sedg(two) == pytest.approx([1.2, 1.2])
    assert INDICES["SEDG"].of_rates(two, None) == pytest.approx(1.2)
    assert INDICES["SEDG sd"].of_rates(two, None) is None


def test_fair_values_are_those_of_equal_groups():
    equal = of((10, 10, 10), (9, 9, 9))
    scores = dict.fromkeys("AB", TWO["A"])
    for name, index in INDICES.items():
        given = [value for value in (index.of_scores(scores), index.of_rates(equal, 0.01)) if value is not None]
        assert given == [pytest.approx(float(index.fair))], name


def test_indices_of_few_errors_or_pairs_are_not_given():
    for few in (of((2, 40, 20), (9, 4, 36)), of((10,), (9,))):
        for name, index in INDICES.items():
            if name != "FDR" or len(few) == 1:
                assert index.of_rates(few, 0.01) is None, name
    assert not enough(TWO)
    many = np.full(100, 0.5)
    assert enough({"A": (many, many), "B": (many, many)})
    assert not enough({"A": (many, many), "B": (many[1:], many)})
    assert not enough({"A": (many, many)})


def test_scores_indices_equal_plain_loops():
    random = np.random.default_rng(0)
    groups = {
        name: (scores_of(random.normal(0.9, 0.2, 150)), scores_of(random.normal(1.6 + shift, 0.1, 200)))
        for name, shift in (("A", 0), ("B", 0.1), ("C", -0.2))
    }
    histograms = []
    for genuine, impostor in groups.values():
        counts = [0] * BINS
        for score in (*genuine, *impostor):
            counts[int(score * BINS)] += 1
        histograms.append([count / 350 for count in counts])
    mean = [sum(column) / 3 for column in zip(*histograms, strict=True)]
    total = sum(p * log2(p / q) for one in histograms for p, q in zip(one, mean, strict=True) if p)
    assert distribution(groups) == pytest.approx(1 - total / (3 * log2(3)))
    for kind, name in enumerate(("KS genuine", "KS impostor")):
        parts = [kinds[kind] for kinds in groups.values()]
        expected = [ks_2samp(one, other).statistic for k, one in enumerate(parts) for other in parts[:k]]
        assert INDICES[name].of_scores(groups) == pytest.approx(max(expected))
    assert ks_distance(np.array([1.0, 1.0]), np.array([1.0, 2.0])) == 0.5


def test_docs_print_the_table_of_indices():
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = [line for line in definitions().markdown().splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {6}, "a | inside a cell divides it"
    assert all(row in page for row in rows), "paste the output of python -m eval.indices"
