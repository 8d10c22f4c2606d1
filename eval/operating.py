"""Operating points as deployers set them: a threshold from one group, from all, from the worst, or a given number."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from eval import rates
from eval.identities import Ends
from eval.intervals import Sampled
from utils.errors import InputError
from utils.tables import RULE_OF_THREE

FMRS = (1e-3, 1e-4)
FMR_OF_FEW = 1e-2  # given too where the impostor pairs of the reference group are too few for the first of FMRS
RATIO_NOTE = (
    "The ratios are to the reference group, with the interval of the ratio of two independent rates; none where either "
    "rate has fewer than three errors."
)
THRESHOLD_NOTE = "All intervals are at the threshold given: its own uncertainty is not in them."


@dataclass(frozen=True)
class Point:
    """An operating point of one model."""

    name: str  # where the threshold is from
    threshold: float | None  # squared distance; None if the pairs do not resolve it


@dataclass(frozen=True)
class At:
    """FMR and FNMR of a group at an operating point."""

    fmr: Sampled
    fnmr: Sampled


class Identified:
    """The identities of the genuine and of the impostor pairs of each group; None where they are not known."""

    def __init__(self, same: Mapping[str, np.ndarray], ends: Mapping[str, Ends | None]):
        self._ends = {}
        for name, labels in same.items():
            known = ends.get(name)
            self._ends[name] = {kind: known and known[labels == kind] for kind in (False, True)}

    def of(self, group: str, genuine: bool) -> Ends | None:
        """Returns the ends of a group's genuine or impostor pairs."""
        return self._ends[group][genuine]


def points(groups: rates.Groups, reference: str, given: float | None = None) -> list[Point]:
    """Returns the operating points of a model whose distances and labels by group are `groups`.

    At each of FMRS, and at FMR_OF_FEW if the reference group does not resolve them: the largest threshold at which the
    FMR of the reference group, of all groups together, or of every single group is at most this; a single set has one
    such threshold. `given` is a further threshold; raises InputError if it decides every pair alike.
    """
    found = []
    has_few = rates.threshold_at_fmr({reference: groups[reference]}, FMRS[0]) is None
    for fmr in (FMR_OF_FEW, *FMRS) if has_few else FMRS:
        together = rates.threshold_at_fmr(groups, fmr)
        if len(groups) == 1:
            found.append(Point(f"FMR {fmr:g}", together))
        else:
            found.append(Point(f"all groups at FMR {fmr:g}", together))
            single = {name: rates.threshold_at_fmr({name: pairs}, fmr) for name, pairs in groups.items()}
            worst = None if None in single.values() else min(single.values())
            found.append(Point(f"{reference} at FMR {fmr:g}", single[reference]))
            found.append(Point(f"worst group at FMR {fmr:g}", worst))
    if given is not None:
        every = np.concatenate([distance for distance, _ in groups.values()])
        if not every.min() < given <= every.max():
            raise InputError(
                f"threshold = {given:g} decides every pair alike: set it between the distances {every.min():.4g} and "
                f"{every.max():.4g}, on the squared distance."
            )
        found.append(Point("given", given))
    return found


def marked(
    shared: Mapping[str, float | None], groups: rates.Groups, reference: str, given: float | None
) -> dict[str, float]:
    """Returns the thresholds that pictures mark, by name: those that the pairs resolve.

    They are the `shared` ones, that of the reference group at the first of FMRS, and the `given` one. The worst group
    and lower rates are left out: too many marks hide each other.
    """
    own = rates.threshold_at_fmr({reference: groups[reference]}, FMRS[0])
    every = {**shared, f"{reference} at FMR {FMRS[0]:g}": own, "--threshold": given}
    return {name: threshold for name, threshold in every.items() if threshold is not None}


def at(groups: rates.Groups, threshold: float, identified: Identified) -> dict[str, At]:
    """Returns the error rates of each group at a threshold on the squared distance."""
    found = {}
    for name, (distance, same) in groups.items():
        accepted = distance < threshold
        found[name] = At(
            Sampled.of(accepted[~same], identified.of(name, False)),
            Sampled.of(~accepted[same], identified.of(name, True)),
        )
    return found


def too_few(missing: Collection[str], impostors: int | None) -> str:
    """Returns the note on the points that the pairs do not resolve; `impostors` is their number if none is resolved."""
    fmrs = [fmr for fmr in (FMR_OF_FEW, *FMRS) if any(name.endswith(f"FMR {fmr:g}") for name in missing)]
    counts = ", ".join(f"{RULE_OF_THREE / fmr:,.0f} for FMR {fmr:g}" for fmr in fmrs)
    needed = f"The impostor pairs needed for a threshold are {counts}"
    if impostors is None:
        return f"Too few impostor pairs for: {', '.join(missing)}. {needed}."
    return f"{needed}; there are {impostors:,}: give one with --threshold."


def reference_of(accuracies: Mapping[str, float], wanted: str | None) -> str:
    """Returns `wanted`, or the group with the best accuracy if None. Raises InputError if it is none of the groups."""
    if wanted is None:
        return max(accuracies, key=accuracies.__getitem__)
    check_reference([*accuracies], wanted)
    return wanted


def check_reference(names: list[str], wanted: str | None) -> None:
    """Raises InputError if the reference group is none of the groups."""
    if wanted is not None and wanted not in names:
        if len(names) == 1:
            raise InputError(
                f"reference_group = {wanted!r}: there is only {names[0]} and nothing to compare: leave it out."
            )
        raise InputError(f"reference_group = {wanted!r} is none of the groups: set it to one of {', '.join(names)}.")
