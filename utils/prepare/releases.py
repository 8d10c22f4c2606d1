"""Compares the counts of a data folder with those of the known releases of BUPT-BalancedFace and RFW."""

from dataclasses import dataclass
from typing import NamedTuple


class Count(NamedTuple):
    """Holds the counts of one group."""

    images: tuple[int, ...]  # several if the source does not tell which count belongs to which group
    identities: int


RELEASES = {
    "BUPT-BalancedFace, JPG": {
        "African": Count((324_376,), 7_000),
        "Asian": Count((325_475,), 7_000),
        "Caucasian": Count((326_484,), 7_000),
        "Indian": Count((275_095,), 7_000),
    },
    "BUPT-BalancedFace, RecordIO": {
        "African": Count((324_376,), 7_000),
        "Asian": Count((325_493,), 7_000),
        "Caucasian": Count((326_484,), 7_000),
        "Indian": Count((275_063,), 6_999),
    },
    "BUPT-BalancedFace, MST-KD's aligned copy": {
        "African": Count((324_106, 324_202), 7_000),
        "Asian": Count((324_106, 324_202), 7_000),
        "Caucasian": Count((326_070,), 7_000),
        "Indian": Count((274_554,), 6_997),
    },
    "RFW": {
        "African": Count((10_415,), 2_995),
        "Asian": Count((9_688,), 2_492),
        "Caucasian": Count((10_196,), 2_958),
        "Indian": Count((10_308,), 2_984),
    },
}
"""Images and identities of each group. The first two and RFW are from an audit of the downloads. The images of the
third are from MST-KD's configuration, which does not tell which of two counts is African and which Asian."""

ALIKE = 0.01  # largest share of images by which the data may differ from a release that is named


@dataclass(frozen=True)
class Comparison:
    """Holds the counts of a release and of the data, group by group."""

    release: str
    rows: list[tuple[str, Count, int, int]]  # group, expected, images and identities found

    @property
    def images_off(self) -> int:
        """Returns by how many images the groups differ from the release, summed."""
        return sum(min(abs(found - one) for one in expected.images) for _, expected, found, _ in self.rows)

    @property
    def identities_off(self) -> int:
        """Returns by how many identities the groups differ from the release, summed."""
        return sum(abs(found - expected.identities) for _, expected, _, found in self.rows)

    @property
    def share_off(self) -> float:
        """Returns `images_off` as a share of the images of the release."""
        return self.images_off / sum(max(expected.images) for _, expected, *_ in self.rows)


def compare(found: dict[str, tuple[int, int]]) -> list[Comparison]:
    """Compares {group: (images, identities)} with each release, nearest first; returns [] for groups of other names."""
    compared = [
        Comparison(release, [(group, counts[group], *found[group]) for group in found])
        for release, counts in RELEASES.items()
        if found and found.keys() <= counts.keys()
    ]
    return sorted(compared, key=lambda one: (one.images_off, one.identities_off))


def verdict(compared: list[Comparison]) -> str:
    """States in one sentence which release the counts are those of."""
    if not compared:
        return "BUPT-BalancedFace and RFW have other groups: their counts are not compared."
    best = compared[0]
    if best.images_off == best.identities_off == 0:
        return f"The counts are those of {best.release}."
    if best.share_off > ALIKE:
        return "The counts are those of none of the known releases."
    off = f"{best.images_off:,} images and {best.identities_off:,} identities"
    return f"The counts are nearest to those of {best.release}: {off} more or less."
