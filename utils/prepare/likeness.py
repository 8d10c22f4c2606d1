"""Finds images of one photograph by fingerprints of 256 bits, also where it was encoded, resized or lit otherwise.

A bit says whether one of the 16 x 16 lowest frequencies of the luminance (a cosine transform) is positive. Different
photographs agree in about half of the bits, copies of one in nearly all.
"""

from collections.abc import Iterator

import cv2
import numpy as np
from tqdm import tqdm

SIDE = 56  # pixels that are looked at
FREQUENCIES = 16  # in each direction
BITS = FREQUENCIES**2
BYTES = BITS // 8

NEAR = 32
"""Bits in which the fingerprints of one photograph may differ.

Measured on aligned faces of Labeled Faces in the Wild: of 2,648 x 2,645 photographs of different persons the nearest
two differ in 58 bits, and the share of pairs below a number of bits falls tenfold every six bits: continued so, one in
10^11 lies below 32. Of 29,184 pairs of one person's photographs seven lie below 32, and these show one photograph each;
those from 47 on show two. Of 400 photographs all are found that were encoded again (JPEG quality 15 to 90) or made
smaller and larger again (48 to 160 pixels), 99 % of those moved by a pixel, 12 % of those moved by two.
"""

BLOCK = 1024  # fingerprints that are compared with as many others at once: the results stay in a processor's cache

COSINES = np.cos(np.pi / SIDE * np.outer(np.arange(FREQUENCIES), np.arange(SIDE) + 0.5)).astype(np.float32)
ACROSS = np.ascontiguousarray(COSINES.T)
ROUNDING = 1.0  # is more than rounding makes of a frequency that is not there: an even image has no bit set
SET_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)  # of each byte


def fingerprint(image: np.ndarray) -> bytes:
    """The 32 bytes of a BGR image (H, W, 3) uint8 of any size."""
    small = cv2.cvtColor(cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2GRAY)
    found = COSINES @ small.astype(np.float32) @ ACROSS
    found[0, 0] = 0  # the mean, which is always positive
    return np.packbits(found > ROUNDING).tobytes()


def near(one: np.ndarray, other: np.ndarray, at_most: int = NEAR) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which fingerprints of `one` (N, 32) and `other` (M, 32), both uint8, differ in no more than `at_most` bits.

    Gives the K rows of `one`, the K rows of `other`, and in how many bits they differ, sorted in this order. All N x M
    are compared; beside the result the memory for it grows with M only.
    """
    rows, columns, bits = np.concatenate([np.empty((0, 3), np.int64), *_near(one, other, at_most)]).T
    order = np.lexsort((columns, rows))
    return rows[order], columns[order], bits[order]


def _near(one: np.ndarray, other: np.ndarray, at_most: int) -> Iterator[np.ndarray]:
    """(K, 3) int64 for each two blocks."""
    columns = [(begin, _signs(other[begin : begin + BLOCK]).T) for begin in range(0, len(other), BLOCK)]
    # A product of signs is the number of bits that agree less that of the others. Half of the bits suffice for it: few
    # pass that are not near in all.
    least = BITS // 2 - 2 * at_most
    with tqdm(desc="compare", total=len(one), unit=" images", disable=None) as bar:
        for row in range(0, len(one), BLOCK):
            signs = _signs(one[row : row + BLOCK])
            for column, others in columns:
                passed = np.flatnonzero(signs @ others >= least)  # of few among many faster than of rows and columns
                rows, beside = row + passed // others.shape[1], column + passed % others.shape[1]
                bits = SET_BITS[one[rows] ^ other[beside]].sum(1, dtype=np.int64)
                yield np.column_stack([rows, beside, bits])[bits <= at_most]
            bar.update(len(signs))


def _signs(fingerprints: np.ndarray) -> np.ndarray:
    """(N, 128) float32, 1 or -1 for the higher horizontal frequencies: faces differ in these more than in the lower."""
    return np.unpackbits(fingerprints[:, 1::2], axis=1).astype(np.float32) * 2 - 1
