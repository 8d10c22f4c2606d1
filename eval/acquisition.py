"""Table of failures to acquire: in which share of a group's images no face could be aligned."""

from pathlib import Path

from eval.intervals import Sampled
from utils.prepare.acquisition import FILE, read
from utils.tables import Rate, Table

NOTE = (
    "Images that utils.prepare align could not align, as a rate of all images of the group, with the Clopper-Pearson "
    "interval. They are in no pair: the other tables do not contain their errors. Fair: equal rates."
)


def table(folder: Path, groups: list[str], notes: tuple[str, ...]) -> Table | None:
    """Returns the failures of these groups from <folder>/acquisition.csv; None if it does not exist.

    Without a row, the last note says why.
    """
    path, rows, without = folder / FILE, [], []
    if not path.exists():
        return None
    found = read(path)
    for name in groups:
        images, failed = found.get(name, (0, 0))
        if images:
            rate = Rate(failed, images)
            rows.append((name, str(images), rate, Sampled(rate).estimate))
        else:
            without.append(name)
    header = ("Group", "Images", "Failure to acquire", "Interval")
    own = [NOTE]
    if not rows:
        own = [f"{FILE} counts images of {', '.join(filter(None, found)) or 'no group'}, not of these sets."]
    elif without:
        own = [f"{FILE} has no count of {', '.join(without)}.", NOTE]
    return Table("Failure to acquire", header, rows, 2, (*notes, *own), 4, is_printed=False)
