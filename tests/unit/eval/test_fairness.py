"""Average, STD and SER of published rows and in edge cases."""

import warnings

import numpy as np
import pytest

from eval.fairness import std, summary

PAPER = {
    # MST-KD, arXiv 2408.16563v1, Tables 1 to 3: African, Asian, Caucasian, Indian; average, STD, SER as printed.
    "1, specialized teacher African": ((89.82, 78.32, 86.87, 86.00), 85.25, 4.90, 2.13),
    "1, specialized teacher Caucasian": ((74.97, 78.23, 92.77, 84.47), 82.61, 7.84, 3.46),
    "1, baseline teacher BT-2": ((85.37, 87.30, 90.40, 88.23), 87.83, 2.09, 1.52),
    "1, baseline teacher BT-4": ((84.57, 86.77, 90.38, 88.75), 87.62, 2.51, 1.60),
    "2, specialized a-KD SL": ((88.60, 90.67, 92.98, 91.58), 90.96, 1.84, 1.62),
    "2, baseline a-KD DLDPO": ((87.55, 88.42, 91.63, 89.58), 89.30, 1.76, 1.49),
    "3, specialized EAF-KD SL": ((92.12, 93.07, 95.33, 93.93), 93.61, 1.36, 1.69),
    "3, specialized EAF-KD DuL": ((91.80, 91.33, 95.42, 92.68), 92.81, 1.83, 1.89),
    "3, baseline EAF-KD SL": ((91.43, 92.68, 95.10, 93.53), 93.19, 1.54, 1.75),
}
DDOF_1 = {
    # CIFP, CVPR 2021, Table 3: STD as printed; averages and SER computed from the printed accuracies.
    "CosFace-R34": ((92.93, 92.98, 95.12, 93.93), 93.74, 1.03, 1.45),
    "PFE-R34": ((95.17, 94.27, 96.38, 94.60), 95.11, 0.93, 1.58),
    "CIFP-R34": ((95.95, 95.17, 96.78, 96.38), 96.07, 0.69, 1.50),
    "ArcFace-R50": ((95.55, 94.95, 96.68, 95.47), 95.66, 0.73, 1.52),
    "CIFP-R50": ((96.47, 95.75, 97.08, 96.77), 96.52, 0.57, 1.46),
    "ArcFace-R100": ((96.43, 94.98, 97.37, 96.17), 96.24, 0.98, 1.91),
    "CIFP-R100": ((97.03, 95.65, 97.60, 96.82), 96.78, 0.82, 1.81),
}
DDOF_0 = {
    # STD as printed. The same table mixes both conventions: these two rows have ddof 0.
    "DebFace-R34": ((93.67, 94.33, 95.95, 94.78), 0.83),
    "GAC-R34": ((94.65, 94.93, 96.23, 95.12), 0.60),
    # FairnessOCFR, later code of MST-KD's laboratory.
    "Balanced-R34": ((92.48, 92.67, 95.18, 93.63), 1.07),
    "Balanced-R50": ((93.52, 93.07, 95.63, 94.57), 0.99),
}


@pytest.mark.parametrize("name", [*PAPER, *DDOF_1])
def test_published_rows(name):
    accuracies, *printed = (PAPER | DDOF_1)[name]
    assert summary(accuracies) == pytest.approx(printed, abs=0.0051)


@pytest.mark.parametrize("name", DDOF_0)
def test_a_factor_converts_rows_printed_with_ddof_0(name):
    """Checks the factor that docs/evaluation.md gives for four groups."""
    accuracies, printed = DDOF_0[name]
    assert summary(accuracies)[1] == pytest.approx(1.1547 * printed, abs=0.0061)
    assert summary(accuracies)[1] > printed + 0.05


def test_std_runs_along_an_axis():
    values = np.random.default_rng(0).normal(90, 2, (3, 4, 5))
    for axis in (-1, 1):
        wanted = np.apply_along_axis(
            lambda row: np.sqrt(np.square(row - row.mean()).sum() / (len(row) - 1)), axis, values
        )
        assert np.allclose(std(values, axis), wanted)


def test_a_single_group_has_no_std_and_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        average, spread, ser = summary((93.5,))
        assert std(np.ones((6, 1))).shape == (6,)
    assert (average, ser) == (93.5, 1.0)
    assert np.isnan(spread)


def test_groups_without_errors_have_a_defined_ser():
    assert summary((100, 100)) == (100.0, 0.0, 1.0)
    assert summary((100, 99))[2] == float("inf")
