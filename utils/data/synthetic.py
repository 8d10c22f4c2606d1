"""Generates faces: drawings made with OpenCV from a seed, so that every stage runs without photographs of persons.

The four groups have the names of the four ethnicities only because the scripts expect folders of these names. They
differ only in *which* facial attributes distinguish identities: in each group four of the sixteen attributes are fixed
per identity, the other twelve vary from image to image. A network trained on one group learns its four attributes and
ignores the rest, and therefore performs poorly on the other groups, as a specialised teacher should. Skin, light, pose
and background have the same distribution in all groups.
"""

import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from utils.data.identities import write_identities
from utils.data.store import SIZE
from utils.errors import InputError
from utils.storage.files import sha256

MARKER = "GENERATED.txt"
"""Marks a folder of generated faces; tables and pictures made from it are labelled as generated."""

FOLDS = 10

ATTRIBUTES = (
    ("face_width", "eye_gap", "nose_length", "brow_thickness"),
    ("hair_colour", "eye_size", "mouth_width", "face_height"),
    ("beard", "brow_angle", "eye_height", "nose_width"),
    ("hair_height", "brow_gap", "mouth_position", "lip_thickness"),
)
"""The attributes that distinguish identities, for the first, second, third and fourth group."""

NAMES = tuple(name for group in ATTRIBUTES for name in group)
SCALE = 2  # faces are drawn this much larger and averaged down, for smooth edges


def generate(
    folder: Path, groups: tuple[str, ...], identities: int = 40, images: int = 16, pairs: int = 400, seed: int = 0
) -> None:
    """Writes <folder>/train/<group>/<identity>/<image>.jpg and <folder>/pairs/<group>_test.bin.

    Each of up to four groups gets `identities` x `images` training images, and `pairs` verification pairs of other
    identities (a multiple of 20: ten folds, in each the genuine pairs first), with their names in a file beside. A
    folder made with the same arguments is kept. Raises InputError for bad arguments, and for a folder of anything but
    generated faces.
    """
    if not 1 <= len(groups) <= len(ATTRIBUTES) or pairs % (2 * FOLDS) or min(identities, images, pairs) < 1:
        raise InputError("Faces are generated for one to four groups, with a multiple of 20 pairs.")
    recipe = (
        f"These faces are generated (utils/data/synthetic.py): {groups=} {identities=} {images=} {pairs=} {seed=}\n"
    )
    if folder.exists():
        marker = folder / "train" / MARKER
        if not marker.exists():
            raise InputError(f"{folder} is there and does not hold generated faces: move it away.")
        if marker.read_text() == recipe:
            return
        shutil.rmtree(folder)

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    jobs = [(group, number) for group in range(len(groups)) for number in range(identities)]
    with ThreadPoolExecutor() as pool, tqdm(desc="draw", unit=" images", disable=None) as bar:

        def draw_identity(job: tuple[int, int]) -> int:
            group, number = job
            random = np.random.default_rng((seed, group, 0, number))
            parameters = identity_parameters(group, random)
            name = f"{'abcd'[group]}{number:04}"
            target = partial / "train" / groups[group] / name
            target.mkdir(parents=True)
            for k in range(images):
                (target / f"{name}_{k:04}.jpg").write_bytes(_encode(draw_face(*parameters, random)))
            return images

        for count in pool.map(draw_identity, jobs):
            bar.update(count)

        (partial / "pairs").mkdir()
        for group, name in enumerate(groups):
            same = [bool((k // (pairs // (2 * FOLDS))) % 2 == 0) for k in range(pairs)]
            drawn = pool.map(lambda k: _draw_pair(group, same[k], (seed, group, 1, k)), range(pairs))  # noqa: B023
            faces = []
            for two in drawn:
                faces += two
                bar.update(2)
            path = partial / "pairs" / f"{name}_test.bin"
            path.write_bytes(pickle.dumps((faces, same), protocol=2))
            ends = [f"{'abcd'[group]}-pair{k:04}" for k in range(pairs)]
            both = [(one, one if same[k] else f"{one}-other") for k, one in enumerate(ends)]
            write_identities(path, sha256(path), both)
    for part in ("train", "pairs"):
        (partial / part / MARKER).write_text(recipe)
    os.replace(partial, folder)


def is_generated(folder: Path) -> bool:
    """Tells whether a folder is marked as holding generated faces."""
    return (folder / MARKER).exists()


def _draw_pair(group: int, same: bool, seed: tuple[int, ...]) -> list[bytes]:
    """Draws a verification pair: two encoded images of one new identity (`same`), or of two."""
    random = np.random.default_rng(seed)
    one = identity_parameters(group, random)
    other = one if same else identity_parameters(group, random)
    return [_encode(draw_face(*one, random)), _encode(draw_face(*other, random))]


def _encode(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def identity_parameters(group: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws a new identity of `group`; returns mean (16,) and standard deviation (16,) of its attributes in [0, 1]."""
    carries = np.array([name in ATTRIBUTES[group] for name in NAMES])
    mean = np.where(carries, random.uniform(0, 1, 16), random.normal(0.5, 0.08, 16))
    return mean, np.where(carries, 0.05, 0.25)


def draw_face(mean: np.ndarray, spread: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Draws an identity with random pose, light, expression, occlusion and noise: RGB (112, 112, 3) uint8."""
    values = np.clip(random.normal(mean, spread), -0.1, 1.1)
    a = dict(zip(NAMES, 2 * values - 1, strict=True))  # every attribute in about [-1, 1]
    canvas = _background(random)
    _draw_head(canvas, a, random)
    if random.random() < 0.12:
        _occlude(canvas, random)
    return _photograph(canvas, random)


def _points(*xy: tuple[float, float]) -> np.ndarray:
    return np.rint(np.array(xy) * SCALE).astype(np.int32)


def _ellipse(canvas, centre, axes, colour, angle=0.0, start=0.0, end=360.0, thickness=-1):
    centre, axes = (tuple(round(v * SCALE) for v in pair) for pair in (centre, axes))
    if thickness > 0:
        thickness = max(1, round(thickness * SCALE))
    cv2.ellipse(canvas, centre, axes, angle, start, end, colour, thickness, cv2.LINE_AA)


def _background(random) -> np.ndarray:
    """Returns a smooth gradient between four muted colours, RGB uint8."""
    corners = random.uniform(40, 215, (2, 2, 1)) + random.uniform(-25, 25, (2, 2, 3))
    side = SIZE * SCALE
    return cv2.resize(np.clip(corners, 0, 255).astype(np.uint8), (side, side), interpolation=cv2.INTER_LINEAR)


def _draw_head(canvas: np.ndarray, a: dict[str, float], random) -> None:
    """Draws neck, hair, head, ears, beard, eyes, brows, nose and mouth into an RGB canvas, in place."""
    tone = random.uniform(0, 1)  # the same distribution in all groups: skin tone must not identify a group
    skin = np.array([238, 200, 172]) * (1 - tone) + np.array([120, 78, 54]) * tone
    shadow, light = tuple(map(float, skin * 0.80)), tuple(map(float, np.minimum(skin * 1.07, 255)))
    skin_colour = tuple(map(float, skin))
    shade = 0.5 + 0.5 * a["hair_colour"]
    hair = tuple(map(float, np.array([32, 24, 20]) * (1 - shade) + np.array([222, 176, 98]) * shade))
    shirt = tuple(map(float, random.uniform(30, 220, 3)))

    x, y = 56.0, 62.0
    width, height = 35 + 6.0 * a["face_width"], 46 + 6.0 * a["face_height"]
    chin = y + height
    hairline = y - height + 15 - 9.5 * a["hair_height"]

    _ellipse(canvas, (x, 128), (50, 24), shirt)
    cv2.fillPoly(canvas, [_points((x - 15, 88), (x + 15, 88), (x + 18, 114), (x - 18, 114))], shadow, cv2.LINE_AA)
    _ellipse(canvas, (x, y - 5), (width + 5, height + 4), hair, 0, 180, 360)
    _ellipse(canvas, (x, y - 5), (width + 5, 22), hair, 0, 0, 180)
    for side in (-1, 1):
        _ellipse(canvas, (x + side * (width - 0.5), y + 1), (5, 9), shadow)
    _ellipse(canvas, (x, y), (width, height), skin_colour)

    # The fringe is the part of the head above the hairline.
    head = np.zeros(canvas.shape[:2], np.uint8)
    _ellipse(head, (x, y), (width, height), 255)
    fringe = np.zeros_like(head)
    _ellipse(fringe, (x, hairline - 30), (width * 1.25, 30 + 7), 255)
    canvas[(head > 127) & (fringe > 127)] = hair

    beard = 0.5 + 0.5 * a["beard"]
    lower = np.zeros_like(head)
    _ellipse(lower, (x, y + 27), (width * 0.98, height - 20), 255)
    _ellipse(lower, (x, y + 6), (width * 0.62, 20), 0)
    alpha = 0.85 * beard * cv2.blur(cv2.bitwise_and(head, lower), (13, 13))[..., None] / 255
    canvas[:] = canvas * (1 - alpha) + np.array([52, 40, 34]) * alpha

    eye_y = 54 + 4.5 * a["eye_height"]
    _draw_eyes(canvas, a, random, x, eye_y, hair, shadow)

    nose_end, nose_width = 73 + 5.5 * a["nose_length"], 7.5 + 3.4 * a["nose_width"]
    bridge = [_points((x - 2.5, eye_y + 2), (x - nose_width * 0.6, nose_end - 2), (x, nose_end + 1))]
    cv2.polylines(canvas, bridge, False, shadow, int(1.3 * SCALE), cv2.LINE_AA)
    _ellipse(canvas, (x, nose_end - 1), (nose_width * 0.62, 3.6), light)
    for side in (-1, 1):
        _ellipse(canvas, (x + side * nose_width * 0.72, nose_end - 0.2), (nose_width * 0.33, 2.7), shadow)
        _ellipse(canvas, (x + side * nose_width * 0.45, nose_end + 1.0), (1.5, 0.9), tuple(0.45 * c for c in skin))

    _draw_mouth(canvas, a, random, x, chin, skin)


def _draw_eyes(
    canvas: np.ndarray, a: dict[str, float], random, x: float, eye_y: float, hair: tuple, shadow: tuple
) -> None:
    """Draws eyes and brows."""
    gap, size = 16 + 4.0 * a["eye_gap"], 6.4 + 2.4 * a["eye_size"]
    brow_y = eye_y - size - 5.8 - 3.6 * a["brow_gap"]
    raised = random.normal(0, 0.5)
    gaze = random.normal(0, 0.8)
    iris = tuple(map(float, random.uniform((40, 40, 30), (110, 120, 130))))
    thickness = 2.1 + 1.4 * a["brow_thickness"]
    for side in (-1, 1):
        eye = (x + side * gap, eye_y)
        _ellipse(canvas, eye, (size + 1.2, size * 0.66 + 1.0), shadow)
        _ellipse(canvas, eye, (size, size * 0.62), (246, 244, 240))
        _ellipse(canvas, (eye[0] + gaze, eye_y), (size * 0.46, size * 0.5), iris)
        _ellipse(canvas, (eye[0] + gaze, eye_y), (size * 0.22, size * 0.25), (12, 10, 10))
        _ellipse(canvas, (eye[0] + gaze - 1, eye_y - 1.2), (0.7, 0.7), (255, 255, 255))
        _ellipse(canvas, eye, (size, size * 0.64), (40, 26, 22), 0, 185, 355, thickness=1.0)
        slope = 3.2 * a["brow_angle"]
        inner, outer = (eye[0] - side * size * 1.05, brow_y + slope), (eye[0] + side * size * 1.3, brow_y - slope)
        middle = (eye[0] + side * 0.5, brow_y - 1.6 - raised)
        drawn = tuple(0.45 * c for c in hair)
        cv2.polylines(
            canvas, [_points(inner, middle, outer)], False, drawn, max(1, round(thickness * SCALE)), cv2.LINE_AA
        )


def _draw_mouth(canvas: np.ndarray, a: dict[str, float], random, x: float, chin: float, skin: np.ndarray) -> None:
    """Draws the mouth, open or closed, above the chin."""
    mouth_y = 90 + 5.5 * a["mouth_position"]
    mouth, lips = 13 + 5.5 * a["mouth_width"], 3.6 + 2.6 * a["lip_thickness"]
    smile, opening = random.normal(0.8, 1.3), max(0.0, random.normal(-0.4, 1.2))
    red = tuple(map(float, skin * np.array([0.86, 0.56, 0.56])))
    mouth_y = min(mouth_y, chin - lips - opening - 4)
    left, right = (x - mouth, mouth_y - smile), (x + mouth, mouth_y - smile)
    upper, under = mouth_y - lips * 0.9, mouth_y + lips + opening
    outline = [left, (x - mouth * 0.4, upper), (x, upper + 0.8), (x + mouth * 0.4, upper), right]
    outline += [(x + mouth * 0.5, under - 0.6), (x, under), (x - mouth * 0.5, under - 0.6)]
    cv2.fillPoly(canvas, [_points(*outline)], red, cv2.LINE_AA)
    if opening > 0.6:
        inside = [left, (x, mouth_y - opening * 0.6), right, (x, mouth_y + opening)]
        cv2.fillPoly(canvas, [_points(*inside)], (70, 24, 26), cv2.LINE_AA)
    else:
        line = [_points(left, (x, mouth_y + 0.4 * smile), right)]
        cv2.polylines(canvas, line, False, tuple(0.5 * c for c in red), SCALE, cv2.LINE_AA)


def _occlude(canvas: np.ndarray, random) -> None:
    """Covers part of the face: with glasses, or with a plain bar in place of a hand or a microphone."""
    colour = tuple(map(float, random.uniform(10, 120, 3)))
    if random.random() < 0.6:
        for side in (-1, 1):
            _ellipse(canvas, (56 + side * 16, 54), (11, 9), colour, thickness=1.6)
        cv2.line(canvas, _points((51, 53))[0].tolist(), _points((61, 53))[0].tolist(), colour, 2 * SCALE, cv2.LINE_AA)
    else:
        x, y = random.uniform(10, 102), random.uniform(80, 104)
        cv2.line(
            canvas, _points((x, y))[0].tolist(), _points((x + 30, 140))[0].tolist(), colour, 10 * SCALE, cv2.LINE_AA
        )


def _photograph(canvas: np.ndarray, random) -> np.ndarray:
    """Applies pose (a small homography), scales to 112 x 112, then adds directional light, blur and sensor noise."""
    side = SIZE * SCALE
    centre = np.array([side / 2, side / 2], np.float32)
    angle, zoom = np.radians(random.normal(0, 2.5)), 1 + random.normal(0, 0.02)
    rotation = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], np.float32)
    corners = np.array([[0, 0], [side, 0], [side, side], [0, side]], np.float32)
    moved = (corners - centre) @ rotation.T + centre + random.normal(0, SCALE, 2)
    yaw, pitch = random.normal(0, 0.025, 2)
    away = (corners - centre) / (side / 2)
    moved += away * (side / 2) * (yaw * away[:, :1] + pitch * away[:, 1:])
    homography = cv2.getPerspectiveTransform(corners, moved.astype(np.float32))
    large = cv2.warpPerspective(canvas, homography, (side, side), borderMode=cv2.BORDER_REPLICATE)
    image = cv2.resize(large, (SIZE, SIZE), interpolation=cv2.INTER_AREA).astype(np.float32)

    across, down = np.meshgrid(np.linspace(-1, 1, SIZE), np.linspace(-1, 1, SIZE))
    direction = random.normal(0, 0.13, 2)
    gain = random.normal(1.0, 0.12) + direction[0] * across + direction[1] * down
    image *= gain[..., None].astype(np.float32) * random.normal(1, 0.03, 3).astype(np.float32)
    if random.random() < 0.25:
        cv2.GaussianBlur(image, (0, 0), random.uniform(0.5, 1.1), image)
    image += random.normal(0, random.uniform(1, 5), image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)
