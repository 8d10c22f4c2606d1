"""Alignment by five landmarks against known transforms and plain solutions."""

import cv2
import numpy as np
import pytest

from tests.conftest import noise
from utils.data.align import TEMPLATE, align, similarity
from utils.errors import InputError


def transform(angle, scale, shift):
    """Returns the matrix (2, 3) of a rotation by `angle` degrees, a scale and a shift."""
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return np.array([[scale * cos, -scale * sin, shift[0]], [scale * sin, scale * cos, shift[1]]])


def apply(matrix, points):
    return points @ matrix[:, :2].T + matrix[:, 2]


def least_squares(source, target):
    """Solves x' = a x - b y + c, y' = b x + a y + d as a linear system in a, b, c, d."""
    rows, values = [], []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]
        values += [u, v]
    a, b, c, d = np.linalg.lstsq(np.array(rows), np.array(values), rcond=None)[0]
    return np.array([[a, -b, c], [b, a, d]])


def umeyama(source, target):
    """Computes equations 40 to 42 of Umeyama (1991) by singular values."""
    x, y = source - source.mean(0), target - target.mean(0)
    u, d, vt = np.linalg.svd(y.T @ x / len(x))
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ np.diag(sign) @ vt
    scale = (d * sign).sum() / x.var(0).sum()
    return np.column_stack([scale * rotation, target.mean(0) - scale * rotation @ source.mean(0)])


@pytest.mark.parametrize(("angle", "scale", "shift"), [(30, 1.7, (12, -5)), (-160, 0.2, (300, 80)), (0, 1, (0, 0))])
def test_a_known_transform_is_recovered(angle, scale, shift):
    known = transform(angle, scale, shift)
    assert np.allclose(similarity(TEMPLATE, apply(known, TEMPLATE)), known, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_the_transform_is_the_least_squares_solution(seed):
    random = np.random.default_rng(seed)
    source = apply(transform(40 * seed, 2.5, (90, 60)), TEMPLATE) + random.normal(scale=8, size=(5, 2))
    found = similarity(source, TEMPLATE)
    assert np.allclose(found, least_squares(source, TEMPLATE), rtol=0, atol=1e-10)
    assert np.allclose(found, umeyama(source, TEMPLATE), rtol=0, atol=1e-10)


def test_mirrored_landmarks_give_no_reflection():
    mirrored = np.array([112, 0]) + np.array([-1, 1]) * TEMPLATE
    found = similarity(mirrored, TEMPLATE)
    assert np.linalg.det(found[:, :2]) > 0
    assert np.allclose(found, umeyama(mirrored, TEMPLATE), rtol=0, atol=1e-10)
    assert not np.allclose(apply(found, mirrored), TEMPLATE, atol=5)


def test_an_aligned_face_is_unchanged():
    assert np.array_equal(align(noise(0), TEMPLATE), noise(0))
    assert np.array_equal(align(noise(0)[..., ::-1], TEMPLATE), noise(0)[..., ::-1])  # the input has negative strides


def test_landmarks_are_moved_to_the_template():
    """Coloured dots at the landmarks of a rotated, enlarged face are found at the landmarks of the template."""
    landmarks = apply(transform(20, 2.0, (60, 20)), TEMPLATE)
    image = np.zeros((300, 300, 3), np.uint8)
    colours = np.array([(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)])
    for point, colour in zip(landmarks, colours, strict=True):
        cv2.circle(image, tuple(round(float(value)) for value in point), 6, tuple(int(value) for value in colour), -1)
    face = align(image, landmarks)
    assert (face.shape, face.dtype) == ((112, 112, 3), np.uint8)
    for point, colour in zip(TEMPLATE, colours, strict=True):
        y, x = np.nonzero((face == colour).all(2))
        assert np.hypot(x.mean() - point[0], y.mean() - point[1]) < 0.7


@pytest.mark.parametrize(
    ("landmarks", "sentence"),
    [
        (np.where(TEMPLATE == 51.6963, np.nan, TEMPLATE), "not finite"),
        (np.where(TEMPLATE == 51.6963, np.inf, TEMPLATE), "not finite"),
        (TEMPLATE[:4], r"shape \(4, 2\) are not five points"),
        (TEMPLATE.ravel(), r"shape \(10,\) are not five points"),
        (np.full((5, 2), 56.0), "All landmarks lie at one point"),
    ],
)
def test_landmarks_that_give_no_transform_are_refused(landmarks, sentence):
    with pytest.raises(InputError, match=sentence):
        align(noise(0), landmarks)


def test_points_of_different_numbers_are_refused():
    with pytest.raises(InputError, match=r"Points of shape \(5, 2\) and \(4, 2\)"):
        similarity(TEMPLATE, TEMPLATE[:4])
