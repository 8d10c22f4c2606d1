"""Aligns a face to the 112 x 112 input of the networks by five landmarks."""

import cv2
import numpy as np

from utils.data.store import SIZE
from utils.errors import InputError

TEMPLATE = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
"""ArcFace's positions x, y (pixels) of left eye, right eye, nose, left and right mouth corner, as seen in the image."""


def align(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Returns the aligned face (112, 112, 3) uint8 of an image (H, W, 3) uint8, black outside of the image.

    `landmarks` (5, 2) are x and y in pixels, in the order of TEMPLATE. Raises InputError for another shape, and if
    `similarity` does.
    """
    if np.shape(landmarks) != TEMPLATE.shape:
        raise InputError(f"Landmarks of shape {np.shape(landmarks)} are not five points x, y: give them as (5, 2).")
    transform = similarity(landmarks, TEMPLATE)
    return cv2.warpAffine(image, transform, (SIZE, SIZE), flags=cv2.INTER_LINEAR)


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Fits the similarity transform (2, 3), without reflection, that maps `source` (K, 2) onto `target` (K, 2).

    It minimises the sum of squared distances, as in Umeyama, "Least-squares estimation of transformation parameters
    between two point patterns" (1991). In 2D this needs no SVD: with points as complex numbers x + iy, rotation and
    scale are one complex factor, the slope of a linear regression.

    Raises InputError if the shapes differ or are not (K, 2), if a point is not finite, or if all points of the source
    coincide.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if source.ndim != 2 or source.shape[1] != 2 or source.shape != target.shape:
        raise InputError(f"Points of shape {source.shape} and {target.shape}: give both as the same number of x, y.")
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise InputError("Some landmarks are not finite: detect them again.")
    if (source == source[:1]).all():
        raise InputError("All landmarks lie at one point: detect them again.")
    z, w = (points[:, 0] + 1j * points[:, 1] for points in (source, target))
    z_mean, w_mean = z.mean(), w.mean()
    z, w = z - z_mean, w - w_mean
    turn = np.vdot(z, w) / np.vdot(z, z).real  # vdot conjugates its first argument
    shift = w_mean - turn * z_mean
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])
