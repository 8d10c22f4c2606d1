"""Aligns photographs or loose crops to faces of 112 x 112 pixels.

Every image below --images, at any depth, becomes <output>/<same path>.jpg (JPEG, quality 95), rotated, scaled and
cropped so that its five landmarks match ArcFace's template. The landmarks are either given or detected:

--landmarks   Files such as RFW's <Race>_lmk.txt, with one line per image: its path, optionally other fields, and ten
              numbers, separated by tabs, spaces, commas or semicolons; also VGGFace2's and CelebA's tables, .lst files
              of insightface, RetinaFace's label files and JSON. The numbers are x1 y1 ... x5 y5 or x1 ... x5 y1 ... y5
              (recognised for each file) of left eye, right eye, nose, left and right corner of the mouth as seen in the
              image, in stored pixels: EXIF orientation is not applied. How a file was understood is printed. A path is
              matched with the images by its last parts: <Race>/<id>/<image>, or <id>/<image> if that is unambiguous.
--detector    OpenCV's face detector YuNet, an ONNX file that you provide (docs/data.md says where it is). EXIF
              orientation is applied. Faces below --score are not found. Of several faces the largest and most central
              one is chosen (area minus twice the squared distance to the centre); <output>/several_faces.csv lists
              these images.

<output>/acquisition.csv counts images and failures by group, the first folder of a path: the evaluation makes its table
of failures to acquire from it. <output>/failures.csv lists images that could not be aligned, and lines of landmarks
without an image. Run the same command again to resume after an interruption: finished faces are kept, faces whose image
has changed are made again, and failures are retried. The exit status is 0 even if some images failed, and 2 if none
could be aligned.

Run     python -m utils.prepare align --images test/data --landmarks test/txts/*/*_lmk.txt --output aligned
        python -m utils.prepare align --images photographs --detector face_detection_yunet.onnx --output aligned
"""

import argparse
import contextlib
import functools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.data import images
from utils.data.align import align
from utils.data.listing import entries
from utils.errors import InputError
from utils.prepare import acquisition
from utils.prepare.landmarks import OF_NO_FACE, match, read_landmarks, unlikeness
from utils.prepare.work import add_processes, in_processes, path_of, write_failures
from utils.storage.files import not_written, read_json, sha256, write_json
from utils.storage.locks import locked
from utils.storage.mistaken import mistaken

PARAMETERS, FAILURES, SEVERAL = "align.json", "failures.csv", "several_faces.csv"
QUALITY = 95
SCORE, OPENCV_SCORE = 0.85, 0.9
"""The default of --score, and OpenCV's, with which earlier versions detected.

On LFW's 13,233 photographs YuNet misses 132 faces at 0.9 and none at 0.85.
"""
DETECTED_AT = 640  # pixels: larger images are scaled down to this longer side for detection
START, END, COMMENT = b"\xff\xd8", b"\xff\xd9", b"\xff\xfe"  # markers of a JPEG


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=path_of, required=True, metavar="FOLDER", help="the folder of the images")
    parser.add_argument(
        "--output", type=path_of, required=True, metavar="FOLDER", help="the folder of the faces, a new one"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--landmarks", type=path_of, nargs="+", metavar="FILE", help="files of landmarks")
    source.add_argument("--detector", type=path_of, metavar="FILE", help="YuNet's ONNX file")
    parser.add_argument(
        "--score", type=_score, metavar="X", help=f"with --detector: the lowest score of a face, 0 to 1 [{SCORE}]"
    )
    add_processes(parser)


def _score(text: str) -> float:
    try:
        if 0 < (value := float(text)) <= 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, found {text!r}")


def run(given: argparse.Namespace) -> None:
    """Aligns all images. Raises InputError for unusable folders, landmarks or detector, and if every image fails."""
    source, output = given.images, given.output
    _refuse_folders(source, output)
    score = SCORE if given.score is None else given.score
    if given.score is not None and not given.detector:
        raise InputError("--score goes with --detector: leave it out.")
    if given.detector:
        load_detector(given.detector, score)
    paths = _find(source)
    points, failures, strays = None, {}, []
    if given.landmarks:
        files = [*map(read_landmarks, given.landmarks)]
        for path, file in zip(given.landmarks, files, strict=True):
            print(f"{path}: {file.text}.")
        points, failures, strays = match(paths, files)
        if not points:
            example = f" {strays[0][0]}: {strays[0][1]}." if strays else ""
            raise InputError(
                f"--landmarks have no line for any image of {source}, such as {paths[0]}, which {failures[paths[0]]}: "
                f"set another file.{example}"
            )
    overwritten = _overwritten(paths)
    failures |= overwritten
    with locked(output):
        _claim(output, source, given.landmarks, given.detector, score)
        left, counts, several = [path for path in paths if path not in failures], Counter(), []
        aligner = Aligner(str(source), str(output), given.detector, score)
        for path, (kind, note) in zip(left, aligned(aligner, left, points, given.processes), strict=True):
            counts[kind] += 1
            if kind == "failed":
                failures[path] = note
            elif note:
                several.append((path, note))
        acquisition.write(output, paths, failures.keys() - overwritten.keys())
        strays += _orphans(output, paths)
        write_failures(output / SEVERAL, ("path", "faces"), several)
        write_failures(output / FAILURES, ("path", "reason"), [*sorted(failures.items()), *strays])
    _report(output, counts, len(failures), len(several), len(strays))


def aligned(
    aligner: "Aligner", paths: list[str], points: dict[str, np.ndarray] | None, processes: int = 0
) -> Iterator[tuple[str, str]]:
    """Aligns images in processes; yields for each, in order, "aligned", "kept" or "failed", and a note."""
    # Landmarks go as lists: pickling an array takes several times as long.
    items = ((path, points[path].tolist() if points else None) for path in paths)
    return in_processes(aligner, items, len(paths), "align", processes)


def _refuse_folders(source: Path, output: Path) -> None:
    if not source.is_dir():
        raise InputError(f"There is no folder {source}: set --images to that of the images.")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is no folder: set --output to a new one.")
    here, there = source.resolve(), output.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise InputError(f"{output} and {source} lie in each other: set --output to a folder of its own.")


def _find(source: Path) -> list[str]:
    try:
        paths, others = images.find(source, says=True)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}).") from error
    if others:
        endings = ", ".join(sorted(ending or "no ending" for ending in others))
        print(f"{others.total():,} files below {source} are not named like images ({endings}): they are left out.")
    if not paths:
        raise InputError(f"{source} holds no image: set --images to the folder of the images.")
    return paths


def _overwritten(paths: list[str]) -> dict[str, str]:
    """Finds images whose face would overwrite that of an earlier image, with the reason."""
    taken: dict[str, str] = {}
    for path in paths:
        taken.setdefault(_named(path), path)
    return {path: f"would be written over {first}" for path in paths if (first := taken[_named(path)]) != path}


def _orphans(output: Path, paths: list[str]) -> list[tuple[str, str]]:
    """Lists faces whose image no longer exists, with the reason; deleting them is left to the user."""
    faces = {_named(path) for path in paths}
    return [(face, "is a face of no image any more: delete it") for face in images.find(output)[0] if face not in faces]


def _named(path: str) -> str:
    return os.path.splitext(path)[0] + ".jpg"


def _claim(output: Path, source: Path, landmarks: list[Path] | None, detector: Path | None, score: float) -> None:
    """Records `made_from` in the output folder. Raises InputError if it holds anything else."""
    made_from = {
        "images": str(source.resolve()),
        "landmarks" if landmarks else "detector": sorted(map(sha256, landmarks or [detector])),
        **({"score": score} if detector else {}),
    }
    path = output / PARAMETERS
    if path.exists():
        try:
            found = read_json(path)
        except InputError as error:
            raise InputError(f"{path} is damaged: delete {output}, or set --output to a new folder.") from error
        if {"score": OPENCV_SCORE, **found} != {"score": OPENCV_SCORE, **made_from}:
            raise InputError(
                f"{output} holds faces of other --images, --landmarks, --detector or --score: set --output to another "
                "folder."
            )
    elif output.exists() and any(not entry.name.startswith(PARAMETERS) for entry in entries(output)):
        raise InputError(f"{output} holds files, but no {PARAMETERS} of this command: set --output to a new folder.")
    else:
        write_json(path, made_from)
    for folder, _, names in os.walk(output):
        # The lock is held, so no other process is writing these files.
        for leftover in (name for name in names if name.endswith(".partial")):
            os.unlink(os.path.join(folder, leftover))


def _report(output: Path, counts: Counter, failed: int, several: int, strays: int) -> None:
    listing = output / FAILURES
    if several:
        print(f"{several:,} images show several faces: {output / SEVERAL} says which was taken.")
    if strays:
        print(f"{strays:,} lines of landmarks, or faces, belong to no image: {listing} lists them.")
    if not counts["aligned"] + counts["kept"]:
        raise InputError(f"None of the {failed:,} images could be aligned: {listing} says why.")
    where = f" ({listing})" if failed else ""
    print(f"{output}: {counts['aligned']:,} images aligned, {counts['kept']:,} kept, {failed:,} failed{where}.")


# One image ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aligner:
    """Aligns one image of the folder `images` into the folder `output`; a class, since a closure cannot be pickled."""

    images: str
    output: str
    detector: Path | None = None
    score: float = SCORE

    def __call__(self, item: tuple[str, list | None]) -> tuple[str, str]:
        """Takes path and landmarks (five x, y; None to detect); returns "aligned", "kept" or "failed", and a note.

        The note is the reason of a failure, otherwise which of several faces was chosen. Raises NotWritten if the disk
        is full or the folder is not writable.
        """
        path, points = item
        source, target = f"{self.images}/{path}", f"{self.output}/{_named(path)}"
        try:
            stat = os.stat(source)
        except OSError as error:  # keeps the finished face: the disk of the images may be unmounted
            return "failed", images.reason_of(error)
        if kept := _read_if_newer(target, stat):
            return "kept", _note_of(kept)
        content, reason = self._try(source, points)
        reason = reason or self._write(target, content)
        if not reason:
            return "aligned", _note_of(content)
        with contextlib.suppress(OSError):
            os.unlink(target)  # a face of the former content of the image
        return "failed", reason

    def _try(self, source: str, points: list | None) -> tuple[bytes, str]:
        """Returns the encoded face and "", or b"" and the reason."""
        try:
            return self._face(source, points), ""
        except (OSError, ValueError, MemoryError, cv2.error) as error:
            return b"", images.reason_of(error)

    def _face(self, source: str, points: list | None) -> bytes:
        """Returns the encoded face. Raises ValueError for implausible landmarks, and if no face is detected."""
        image, note = images.read(source, upright=points is None), ""
        if points is None:
            landmarks, note = detect(image, load_detector(self.detector, self.score))
        else:
            landmarks = np.array(points)
        height, width, _ = image.shape
        if any(abs(x - width / 2) > width or abs(y - height / 2) > height for x, y in landmarks):
            raise ValueError(f"has landmarks that lie far outside its {width} x {height} pixels")
        face = align(image, landmarks)
        if self.detector is None and unlikeness(landmarks) > OF_NO_FACE:
            raise ValueError("has landmarks that do not lie as those of a face do")
        content = cv2.imencode(".jpg", face, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
        return _with_note(content, note) if note else content

    def _write(self, target: str, content: bytes) -> str:
        """Writes a face atomically; returns a reason if a file and a folder would have the same name.

        Unlike `utils.storage.files.replaced` it does not fsync, which would take most of the time for a million small
        files. A face truncated by a power failure lacks a JPEG marker, and is made again.
        """
        folder = os.path.dirname(target)
        partial = f"{folder}/{os.getpid()}.partial"  # one common folder for these is several times slower on ext4
        try:
            if not os.path.isdir(folder):
                os.makedirs(folder, exist_ok=True)
            with open(partial, "wb") as file:
                file.write(content)
            os.replace(partial, target)
        except (FileExistsError, IsADirectoryError, NotADirectoryError):
            return "has no place: a face has the name of its folder, or a folder its name"
        except OSError as error:
            raise not_written(Path(target), error) from error
        finally:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(partial)
        return ""


def _read_if_newer(target: str, source: os.stat_result) -> bytes | None:
    """Returns the content of a complete face that is newer than its image, or None.

    It must be newer than the image's ctime too, since unpacking an archive sets the mtime back.
    """
    with contextlib.suppress(OSError), open(target, "rb") as file:
        if os.fstat(file.fileno()).st_mtime_ns > max(source.st_mtime_ns, source.st_ctime_ns):
            content = file.read()
            if content.startswith(START) and content.endswith(END):
                return content
    return None


def _with_note(content: bytes, note: str) -> bytes:
    """Inserts a comment after the first segment of a JPEG, so that the note can be reported when the face is kept."""
    begin, text = _after_first(content), note.encode()
    return content[:begin] + COMMENT + (len(text) + 2).to_bytes(2, "big") + text + content[begin:]


def _note_of(content: bytes) -> str:
    begin = _after_first(content)
    if content[begin : begin + 2] != COMMENT:
        return ""
    size = int.from_bytes(content[begin + 2 : begin + 4], "big")
    return content[begin + 4 : begin + 2 + size].decode(errors="replace")


def _after_first(content: bytes) -> int:
    return 4 + int.from_bytes(content[4:6], "big")


# Detected landmarks ---------------------------------------------------------------------------------------------------


@functools.cache
def load_detector(path: Path, score: float = SCORE) -> cv2.FaceDetectorYN:
    """Loads YuNet with the lowest `score` of a face, once per process. Raises InputError if the file is not YuNet."""
    if not path.is_file():
        raise InputError(f"There is no file {path}: set --detector to YuNet's ONNX file.")
    try:
        content = np.fromfile(path, np.uint8)  # OpenCV segfaults on a path that is not valid text
        detector = cv2.FaceDetectorYN.create("onnx", content, np.empty(0, np.uint8), (64, 64), score)
        detector.detect(np.zeros((64, 64, 3), np.uint8))  # a network other than YuNet fails only when it runs
    except cv2.error as error:
        if reason := mistaken(content[:1024].tobytes()):
            raise InputError(f"{path} {reason}.") from error
        raise InputError(
            f"{path} is no YuNet that OpenCV {cv2.__version__} can read: set --detector to its ONNX file."
        ) from error
    return detector


def detect(image: np.ndarray, detector: cv2.FaceDetectorYN) -> tuple[np.ndarray, str]:
    """Detects the largest and most central face in a BGR image (H, W, 3) uint8.

    Returns its landmarks (5, 2) in pixels and, if there are several faces, a note which one was chosen. Raises
    ValueError if no face is found.
    """
    height, width = image.shape[:2]
    scale = min(1.0, DETECTED_AT / max(height, width))
    size = max(1, round(scale * width)), max(1, round(scale * height))
    detector.setInputSize(size)
    # YuNet's order is that of TEMPLATE: the person's right eye is the left one in the image.
    faces = detector.detect(cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image)[1]
    if faces is None:
        raise ValueError("shows no face that the detector finds")
    faces = faces[:, :14].astype(np.float64).reshape(-1, 7, 2) * np.divide((width, height), size)
    corners, sizes = faces[:, 0], faces[:, 1]
    distance = corners + sizes / 2 - (width / 2, height / 2)
    best = np.argmax(sizes.prod(1) - 2 * (distance**2).sum(1))
    (x, y), (w, h) = corners[best].round().astype(int), sizes[best].round().astype(int)
    note = f"{len(faces)} found, the one taken is at {x} {y}, {w} x {h}" if len(faces) > 1 else ""
    return faces[best, 2:], note
