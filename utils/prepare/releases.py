"""What the releases of BUPT-BalancedFace and RFW hold, counted, and which of them a data folder looks like."""

from dataclasses import dataclass
from typing import NamedTuple


class Count(NamedTuple):
    """Of one group. It may be one of several that are known without the name of their group."""

    images: tuple[int, ...]
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
"""Images and identities of each group: the first two and RFW from an audit of the downloads; of the third MST-KD's
configuration gives the images, for African and Asian without saying which is which."""

ALIKE = 0.01  # share of images by which a release may be off and still be named


@dataclass(frozen=True)
class Comparison:
    """A release beside what was found, group by group."""

    release: str
    rows: list[tuple[str, Count, int, int]]  # group, expected, images and identities found

    @property
    def images_off(self) -> int:
        return sum(min(abs(found - one) for one in expected.images) for _, expected, found, _ in self.rows)

    @property
    def identities_off(self) -> int:
        return sum(abs(found - expected.identities) for _, expected, _, found in self.rows)

    @property
    def share_off(self) -> float:
        return self.images_off / sum(max(expected.images) for _, expected, *_ in self.rows)


def compare(found: dict[str, tuple[int, int]]) -> list[Comparison]:
    """The releases beside images and identities of each group, nearest first; none for groups of other names."""
    compared = [
        Comparison(release, [(group, counts[group], *found[group]) for group in found])
        for release, counts in RELEASES.items()
        if found and found.keys() <= counts.keys()
    ]
    return sorted(compared, key=lambda one: (one.images_off, one.identities_off))


def verdict(compared: list[Comparison]) -> str:
    """One sentence."""
    if not compared:
        return "BUPT-BalancedFace and RFW have other groups: their counts are not compared."
    best = compared[0]
    if best.images_off == best.identities_off == 0:
        return f"The counts are those of {best.release}."
    if best.share_off > ALIKE:
        return "The counts are those of none of the known releases."
    off = f"{best.images_off:,} images and {best.identities_off:,} identities"
    return f"The counts are nearest to those of {best.release}: {off} more or less."
