"""Error rates of groups by any attribute of the people, and by crossings of attributes."""

from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np

from eval.identities import Ends
from eval.indices import LEAST_PAIRS
from eval.intervals import Sampled
from eval.results import BEST, NAMES, Results, names_of
from utils.data.attributes import ATTRIBUTES, MIXED
from utils.tables import Table

HEADER = (*NAMES, "Threshold", "Attribute", "Group", "Genuine pairs", "Impostor pairs", "FMR", "FNMR")
NAMED = len(HEADER) - 2  # columns of names
POINTS = ("FMR 0.01", BEST)  # shared thresholds, the first that the pairs resolve


def table(results: Results, attributes: Mapping[str, Mapping[str, np.ndarray]]) -> Table | None:
    """Returns FMR and FNMR of each group by attribute and crossing; None if no set has an attribute.

    `attributes` holds for each set the values (P,) of its pairs by attribute. Without a row, the last note says why.
    """
    if not any(attributes.values()):
        return None
    names = [name for name in ATTRIBUTES if all(name in attributes.get(key, {}) for key in results.same)]
    if not names:
        note = f"No attribute is known for all of {', '.join(results.same)}: add it to the tables of the others."
        return Table("Groups by attributes", HEADER, [], NAMED, (*results.notes, note), 4, is_printed=False)
    values = {name: np.concatenate([attributes[key][name] for key in results.same]) for name in names}
    same = np.concatenate(list(results.same.values()))
    groups = dict(_groups(values))
    sizes = {key: (int(np.sum(which & same)), int(np.sum(which & ~same))) for key, which in groups.items()}
    large = [key for key, counts in sizes.items() if min(counts) >= LEAST_PAIRS]
    known = [ends for ends in results.ends.values() if ends]
    ends, rows = Ends.joined(known) if len(known) == len(results.ends) else None, []
    for one, shared in zip(results.models, results.shared, strict=True):
        point = next(name for name in POINTS if shared[name] is not None)
        accepted = np.concatenate([one.distances[key] for key in results.same]) < shared[point]
        for key in large:
            genuine, impostor = groups[key] & same, groups[key] & ~same
            fmr = Sampled.of(accepted[impostor], ends and ends[impostor]).estimate
            fnmr = Sampled.of(~accepted[genuine], ends and ends[genuine]).estimate
            rows.append((*names_of(one), point, *key, *map(str, sizes[key]), fmr, fnmr))
    notes = (*results.notes, *_of_no_group(values, same), *_notes(sizes, large, ends is not None))
    return Table("Groups by attributes", HEADER, rows, NAMED, notes, 4, is_printed=False)


def _groups(values: Mapping[str, np.ndarray]) -> Iterator[tuple[tuple[str, str], np.ndarray]]:
    """Yields (attribute or crossing, value) and the pairs (P,) bool of each group."""
    for count in range(1, len(values) + 1):
        for names in combinations(values, count):
            joined = np.array(
                [" / ".join(map(str, row)) for row in zip(*(values[n] for n in names), strict=True)], object
            )
            known = np.all([values[name] != MIXED for name in names], axis=0)
            for value in sorted(set(joined[known].tolist())):
                yield (" x ".join(names), value), known & (joined == value)


def _of_no_group(values: Mapping[str, np.ndarray], same: np.ndarray) -> list[str]:
    """Returns a note for each attribute that some genuine pairs have no value of; impostor pairs may well differ."""
    counts = {name: int(np.sum(same & (of_pairs == MIXED))) for name, of_pairs in values.items()}
    return [
        f"{count:,} of {int(same.sum()):,} genuine pairs have no {name}, or two: they are in no group of it."
        for name, count in counts.items()
        if count
    ]


def _notes(
    sizes: Mapping[tuple[str, str], tuple[int, int]], large: list[tuple[str, str]], by_identity: bool
) -> list[str]:
    design = "; identities that pairs share lower the effective numbers" if by_identity else " of independent pairs"
    notes = [
        "A pair belongs to a group if both of its ends do. One threshold for all pairs. "
        f"Clopper-Pearson intervals{design}. "
        f"A group with fewer than {LEAST_PAIRS} genuine or impostor pairs is not reported."
    ]
    if sizes:
        (attribute, value), counts = min(sizes.items(), key=lambda item: min(item[1]))
        notes.append(f"Smallest group: {attribute} {value}, {counts[0]:,} genuine and {counts[1]:,} impostor pairs.")
    if left_out := len(sizes) - len(large):
        notes.append(
            f"Too small to be reported (below {LEAST_PAIRS} pairs of a kind): {left_out} of {len(sizes)} groups."
        )
    return notes
