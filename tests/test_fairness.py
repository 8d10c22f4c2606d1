"""STD and SER on published rows (FACTS 4.1: accuracies and printed or recomputed ddof-0 figures)."""

import pytest

from eval.fairness import summary

ROWS = {
    # African, Asian, Caucasian, Indian: average, STD (ddof 0), SER. DebFace and GAC print exactly these.
    "DebFace-R34": ((93.67, 94.33, 95.95, 94.78), 94.68, 0.83, 1.56),
    "GAC-R34": ((94.65, 94.93, 96.23, 95.12), 95.23, 0.60, 1.42),
    "ArcFace-R34": ((93.98, 93.72, 96.18, 94.67), 94.64, 0.96, 1.64),
    "PFE-R34": ((95.17, 94.27, 96.38, 94.60), 95.11, 0.80, 1.58),
    "CIFP-R50": ((96.47, 95.75, 97.08, 96.77), 96.52, 0.49, 1.46),
    "ArcFace-R100": ((96.43, 94.98, 97.37, 96.17), 96.24, 0.85, 1.91),
}


@pytest.mark.parametrize("name", ROWS)
def test_published_rows(name):
    accuracies, *printed = ROWS[name]
    assert summary(accuracies) == pytest.approx(printed, abs=0.0051)


def test_perfect_groups_have_a_defined_error_ratio():
    assert summary((100, 100)) == (100.0, 0.0, 1.0)
    assert summary((100, 99))[2] == float("inf")
