"""One table of definitions: what each column of an evaluation's tables means, its fair value, and its source."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from eval.indices import INDICES, MASSEY


@dataclass(frozen=True)
class Definition:
    """What a number means. `fair` is its value for equally treated groups, empty if there is none."""

    text: str
    fair: str = ""
    source: str = ""


ISO = "ISO/IEC 19795-1:2021"
CLOPPER_PEARSON = "Clopper and Pearson, Biometrika 26(4), 1934"
MST_KD = "Caldeira et al., MST-KD, ECCV 2024 workshops"

DEFINITIONS: dict[str, Definition] = {
    "Accuracy": Definition(
        "Share of pairs, in percent, that are decided correctly: mean of ten folds, each decided at the threshold that "
        "is best on the nine others, per verification set.",
        "equal in all groups",
        "Huang et al., Labeled Faces in the Wild, 2007",
    ),
    "Group": Definition("The people whose pairs these are, as the folders or tables of the data set name them."),
    "Attribute": Definition("What the people of a group have in common; x joins the attributes of a crossing."),
    "Genuine pairs": Definition("Number of pairs of two images of one person.", "", ISO),
    "Impostor pairs": Definition("Number of pairs of images of two persons.", "", ISO),
    "All pairs": Definition(
        "Share of the pairs of all groups together, in percent, that are decided correctly at the threshold. A group "
        "with more pairs weighs more."
    ),
    "Average": Definition("Mean of the accuracies of all verification sets, each with the same weight.", "", MST_KD),
    "STD": Definition(
        "Standard deviation of the groups' accuracies in percentage points, with divisor G - 1 for G groups (ddof 1).",
        "0, but see STD by chance",
        MST_KD,
    ),
    "SER": Definition(
        "Skewed error ratio: errors of the worst group divided by errors of the best group, (100 - lowest accuracy) / "
        "(100 - highest accuracy).",
        "1",
        f"{MST_KD}, Eq. 7; Wang and Deng, CVPR 2020",
    ),
    "Within chance": Definition(
        "Yes if neither STD nor SER is above the value that 95 of 100 perfectly fair models of the same average do not "
        "exceed on as many pairs: these pairs then show no unfairness.",
        "yes",
        "simulation in eval/uncertainty.py",
    ),
    "STD by chance": Definition(
        "STD that perfectly fair models of the same average show on as many pairs, on average: the number of correct "
        "decisions of each group is binomial with the same probability.",
        "",
        "simulation in eval/uncertainty.py",
    ),
    "STD 95 of 100": Definition(
        "STD that 95 of 100 perfectly fair models of the same average do not exceed on as many pairs.",
        "",
        "simulation in eval/uncertainty.py",
    ),
    "SER 95 of 100": Definition(
        "SER that 95 of 100 perfectly fair models of the same average do not exceed on as many pairs.",
        "",
        "simulation in eval/uncertainty.py",
    ),
    "AVG - STD": Definition("Average minus STD: one number for accuracy and fairness.", "high"),
    "95 % interval": Definition(
        "The range [low, high] that holds the middle 95 % of the results on resampled pairs; the note under a table "
        "says what is resampled.",
        "",
        "Efron and Tibshirani, An Introduction to the Bootstrap, 1993",
    ),
    "Sure": Definition("Yes if zero is outside the 95 % interval of the difference.", "", "docs/evaluation.md"),
    "STD sure": Definition(
        "Yes if zero is outside the 95 % interval of the difference in STD.", "", "docs/evaluation.md"
    ),
    "Threshold": Definition(
        "A pair is accepted as the same person if its squared distance is below the threshold. Embeddings have unit "
        "length: the squared distance is 2 - 2 x cosine, between 0 and 4."
    ),
    "Threshold from": Definition(
        "The impostor pairs that set the threshold: the largest one at which their FMR is at most the FMR named. Worst "
        "group: the largest one at which this holds for every group. Given: set by --threshold.",
        "",
        "docs/evaluation.md, Operating points",
    ),
    "FMR": Definition(
        "False match rate: share of impostor pairs, of two persons, that are accepted at the threshold. With fewer "
        "than three errors it is given as less than 3 / pairs.",
        "equal in all groups",
        ISO,
    ),
    "FNMR": Definition(
        "False non-match rate: share of genuine pairs, of one person, that are rejected at the threshold. With fewer "
        "than three errors it is given as less than 3 / pairs.",
        "equal in all groups",
        ISO,
    ),
    "FMR / reference": Definition("FMR of the group divided by that of the reference group.", "1"),
    "FNMR / reference": Definition("FNMR of the group divided by that of the reference group.", "1"),
    "d'": Definition(
        "Difference of the mean scores of genuine and impostor pairs, divided by the root of their mean variance.",
        "equal in all groups",
    ),
    "Genuine mean": Definition("Mean score of the genuine pairs.", "equal in all groups"),
    "Genuine sd": Definition("Standard deviation (ddof 1) of the scores of the genuine pairs.", "equal in all groups"),
    "Impostor mean": Definition("Mean score of the impostor pairs.", "equal in all groups"),
    "Impostor sd": Definition(
        "Standard deviation (ddof 1) of the scores of the impostor pairs.", "equal in all groups"
    ),
    "Images": Definition("Number of images of the group, those without an aligned face included."),
    "Failure to acquire": Definition("Share of images in which no face could be aligned.", "equal in all groups", ISO),
    "Interval": Definition("The share with its 95 % interval, exact for independent images.", "", CLOPPER_PEARSON),
    "Correction": Definition(
        "How scores are changed after training, fitted on nine folds and applied to the tenth. None: not at all. Per "
        "group: calibrated by group. Clusters: calibrated by clusters of embeddings (FairCal). Cohort: normalised by "
        "the scores with other images.",
        "",
        "docs/evaluation.md, What can be done after training",
    ),
    "Figure": Definition(
        "Printed: as in the paper. Here: measured. Difference: here minus printed. In standard errors: divided by the "
        "standard error of the difference of two accuracies. Agrees: at most 1.96 standard errors."
    ),
    "Printed": Definition("Whether the conclusion holds in the numbers that the paper prints.", "", "eval/published"),
    "Here": Definition("Whether the conclusion holds in the numbers measured here."),
}
for _name, _index in INDICES.items():
    _text = f"{_index.definition[0].upper()}{_index.definition[1:]}. Given from: {_index.least}."
    DEFINITIONS[_name] = Definition(_text, _index.fair, _index.source)
for _kind in ("genuine", "impostor"):
    DEFINITIONS[f"Reference KS {_kind}"] = Definition(
        f"Kolmogorov-Smirnov distance of the group's {_kind} scores to those of the reference group.",
        "0",
        MASSEY,
    )
"""Definitions by term, which is a column's header or its first words: "FMR" defines "FMR African"."""


def defined(header: str, terms: Iterable[str]) -> str | None:
    """Returns the longest of `terms` that the header is or starts with, as whole words; None if there is none."""
    fitting = [term for term in terms if header == term or header.startswith(f"{term} ")]
    return max(fitting, key=len, default=None)


def anchor(term: str) -> str:
    """Returns the id of a term's definition in a page."""
    return "definition-" + "".join(c if c.isalnum() else "-" for c in term.lower())


def anchors(header: Iterable[str], sets: Iterable[str], terms: Mapping[str, Definition]) -> dict[str, str]:
    """Returns the id of the definition of each column that has one; a column named as one of `sets` is an accuracy."""
    found = {}
    for name in header:
        term = "Accuracy" if name.removesuffix(" *") in sets else defined(name, terms)
        if term in terms:
            found[name] = anchor(term)
    return found
