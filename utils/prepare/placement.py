"""Measures whether a sample of faces is aligned: distance from ArcFace's template, and agreement between the faces.

Eyes and mouth are darker than their surroundings; the bridge of the nose and the cheeks below the eyes are lighter. The
template is shifted, scaled and rotated to maximise this contrast, in the mean of the sample and in each image.
"""

import functools
from dataclasses import dataclass

import cv2
import numpy as np

from utils.data.align import TEMPLATE
from utils.data.store import SIZE

LEFT_EYE, RIGHT_EYE, _, LEFT_CORNER, RIGHT_CORNER = TEMPLATE
DARK = np.array([LEFT_EYE, RIGHT_EYE, LEFT_CORNER, (LEFT_CORNER + RIGHT_CORNER) / 2, RIGHT_CORNER])
LIGHT = np.array([(LEFT_EYE + RIGHT_EYE) / 2, (LEFT_EYE[0], 66.0), (RIGHT_EYE[0], 66.0)])
WEIGHTS = np.array([1, 1, 0.4, 0.4, 0.4, -0.8, -0.7, -0.7], np.float32)
CENTRE = TEMPLATE.mean(0)
BLUR = 3.0  # pixels: standard deviation of the blur that keeps eyes and mouth; that of their surroundings is twice this
MARGIN = 72  # pixels of zero padding, since the template may be placed partly outside of the image

SAMPLE, FEWEST = 200, 50
MOST_DISTANCE, LEAST_AGREEMENT = 4.0, 0.4
"""For the rates of false and missed warnings with these limits see docs/data.md."""


@dataclass(frozen=True)
class Placement:
    """Describes where the faces of a sample are, relative to the template."""

    images: int
    shift: tuple[float, float]  # pixels to the right and down
    scale: float
    turn: float  # degrees, clockwise
    distance: float  # pixels: mean displacement of the five template points by shift, scale and turn
    agreement: float  # contrast of the mean face over the mean contrast of single faces; 1 if all have the same place

    @property
    def doubts(self) -> str:
        """Returns the reasons why the faces do not look aligned, or ""."""
        found = []
        if self.distance > MOST_DISTANCE:
            (x, y), turn = self.shift, f"turned by {self.turn:+.0f} degrees"
            moved = f"moved by {x:+.0f}, {y:+.0f} pixels, scaled by {self.scale:.2f} and {turn}"
            found.append(
                f"eyes and mouth of the mean of {self.images} faces lie {self.distance:.1f} pixels from the template's "
                f"({moved}), more than {MOST_DISTANCE:.0f}"
            )
        if self.agreement < LEAST_AGREEMENT:
            found.append(
                f"eyes and mouth of {self.images} faces do not lie in one place "
                f"(agreement {self.agreement:.2f}, less than {LEAST_AGREEMENT})"
            )
        return "; ".join(found)


def place(images: np.ndarray) -> Placement:
    """Measures the placement of the faces in grey images (N, 112, 112) uint8."""
    responses = np.stack([_contrast(image) for image in images])
    mean = responses.mean(0)
    shift, scale, turn, best = _fit(mean, _fine())
    turned = _similar(TEMPLATE, scale, turn) + shift
    each = np.mean([_fit(response, _coarse())[3] for response in responses])
    return Placement(
        len(images),
        (float(shift[0]), float(shift[1])),
        scale,
        turn,
        float(np.linalg.norm(turned - TEMPLATE, axis=1).mean()),
        float(best / each) if each > 0 else 0.0,
    )


def _contrast(image: np.ndarray) -> np.ndarray:
    """Returns how much darker each pixel is than its surroundings, in standard deviations of the image.

    The result is float32, padded by MARGIN on each side: (112 + 2 MARGIN, 112 + 2 MARGIN).
    """
    values = image.astype(np.float32)
    darker = cv2.GaussianBlur(values, (0, 0), 2 * BLUR) - cv2.GaussianBlur(values, (0, 0), BLUR)
    return np.pad(darker / max(values.std(), 1.0), MARGIN)


def _similar(points: np.ndarray, scale: float, turn: float) -> np.ndarray:
    """Scales and rotates points (P, 2) around the centre of the template."""
    x, y = scale * np.cos(np.radians(turn)), scale * np.sin(np.radians(turn))
    return (points - CENTRE) @ np.array([[x, y], [-y, x]]) + CENTRE


@dataclass(frozen=True)
class _Grid:
    """Holds the placements of the template that are searched."""

    scales_and_turns: list[tuple[float, float]]  # T
    shifts: np.ndarray  # (S, 2) pixels
    where: np.ndarray  # (T, S, points) int64: positions in the flattened contrast


def _grid(shifts: np.ndarray, scales: np.ndarray, turns: np.ndarray) -> _Grid:
    both = [(float(scale), float(turn)) for scale in scales for turn in turns]
    moved = np.stack(np.meshgrid(shifts, shifts), -1).reshape(-1, 2)
    points = np.concatenate([DARK, LIGHT])
    found = [_similar(points, *one) + moved[:, None] for one in both]
    column, row = np.moveaxis(np.rint(found).astype(np.int64) + MARGIN, -1, 0)
    return _Grid(both, moved, row * (SIZE + 2 * MARGIN) + column)


@functools.cache
def _fine() -> _Grid:
    return _grid(np.arange(-16, 17), np.arange(12, 29) / 20, np.arange(-24, 25, 4))


@functools.cache
def _coarse() -> _Grid:
    return _grid(np.arange(-16, 17, 2), np.arange(6, 15) / 10, np.arange(-30, 31, 10))


def _fit(response: np.ndarray, grid: _Grid) -> tuple[np.ndarray, float, float, float]:
    """Returns shift (2,), scale and turn of the placement with the highest contrast, and that contrast."""
    fits = response.ravel()[grid.where] @ WEIGHTS
    best, shift = np.unravel_index(fits.argmax(), fits.shape)
    return grid.shifts[shift], *grid.scales_and_turns[best], float(fits[best, shift])
