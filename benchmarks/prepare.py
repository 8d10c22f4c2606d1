"""Measures the preparation of data, each command and the image store, against bare loops of cv2.imdecode.

Preparation is bound by decoding. A bare loop decodes the same encoded bytes from memory in as many processes, and
discards the images. It is measured twice: with the default allocator settings, and with glibc keeping freed memory, as
our processes do (see `utils.data.images.prepare_process`). Our rates include reading the files, writing the result and,
except for `align`, starting the processes. Rates are medians of five; the ways alternate.

Reads   nothing; draws generated faces
Writes  benchmarks/results/prepare_cpu.json and .md
Run     python -m benchmarks.prepare
"""

import contextlib
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from config.config import Config
from utils.data import images
from utils.data.align import TEMPLATE
from utils.data.store import ImageStore
from utils.data.synthetic import draw_face, identity_parameters
from utils.prepare.align import Aligner, aligned
from utils.prepare.contents import list_images, look_at_all
from utils.prepare.landmarks import match, read_landmarks
from utils.prepare.rec import pack, unpack
from utils.prepare.work import TOGETHER

REPEATS = 5
IMAGES, DRAWN = 6144, 256
COPIES = 6  # of each aligned face, so that starting the processes takes a small part of the time
SIDE, QUALITY = 400, 90  # pixels and JPEG quality of the loose crops: about the file size of RFW's, 33 kB
PROCESSES = os.cpu_count() or 1
STARTED = min(4 * TOGETHER * PROCESSES, IMAGES // 4)  # images after which all processes are surely running
MILLION = 1_250_000  # images of BUPT-BalancedFace


# Input ----------------------------------------------------------------------------------------------------------------


def draw(folder: Path, count: int, drawn: int) -> Path:
    """Writes `count` loose crops, of which `drawn` are distinct; returns the file of their landmarks."""
    crops = [_crop(np.random.default_rng(seed)) for seed in range(drawn)]
    lines = []
    for k in range(count):
        content, points = crops[k % drawn]
        path = folder / "crops" / f"m.{k // 50:04}" / f"m.{k // 50:04}_{k % 50:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        numbers = "\t".join(f"{value:.2f}" for value in points.ravel())
        lines.append(f"/test/data/African/{path.parent.name}/{path.name}\t{k // 50}\t{numbers}\n")
    (folder / "African_lmk.txt").write_text("".join(lines))
    return folder / "African_lmk.txt"


def _crop(random: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """Draws a noisy 400 x 400 image with a face of half its width; returns it encoded, with its landmarks (5, 2)."""
    face = draw_face(*identity_parameters(0, random), random)
    angle, scale = random.normal(0, 0.15), random.uniform(1.8, 2.6)
    turn = scale * np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    shift = SIDE / 2 + random.normal(0, 10, 2) - turn @ (56, 56)
    matrix = np.column_stack([turn, shift])
    image = cv2.warpAffine(face, matrix, (SIDE, SIDE), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    image = np.clip(image + random.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
    content = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
    return content, TEMPLATE @ turn.T + shift


# Bare loops -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bare_loop(folder: Path, keep: bool) -> Iterator:
    """Starts the processes, and yields a function that returns the images per second of all of them together."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(PROCESSES)
    with ProcessPoolExecutor(PROCESSES, context, _start, (folder, keep, barrier)) as pool:
        yield lambda: sum(pool.map(_decode_share, range(PROCESSES)))


def _start(folder: Path, keep: bool, barrier) -> None:
    global _paths, _barrier
    cv2.setNumThreads(1)
    if keep:
        images.prepare_process()
    _paths, _barrier = [folder / path for path in images.find(folder)[0]], barrier


def _decode_share(which: int) -> float:
    """Decodes one share of the images while the other processes decode theirs; returns images per second."""
    share = [path.read_bytes() for path in _paths[which::PROCESSES]]
    _barrier.wait()
    started = time.perf_counter()
    for content in share:
        cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    return len(share) / (time.perf_counter() - started)


# Ours -----------------------------------------------------------------------------------------------------------------


def align_rate(crops: Path, landmarks: Path, output: Path) -> float:
    """Returns images per second of `align` into a new folder, counted from when all processes are running."""
    output.mkdir()
    paths = images.find(crops)[0]
    points, _, _ = match(paths, [read_landmarks(landmarks)])
    for k, (kind, note) in enumerate(aligned(Aligner(str(crops), str(output)), paths, points, PROCESSES), 1):
        if kind != "aligned":
            raise RuntimeError(f"{paths[k - 1]} {note}.")
        if k == STARTED:
            started = time.perf_counter()
    return (len(paths) - STARTED) / (time.perf_counter() - started)


def rate(step: Callable[[], object]) -> float:
    """Returns faces per second of a step that processes all copies of the aligned faces."""
    started = time.perf_counter()
    step()
    return COPIES * IMAGES / (time.perf_counter() - started)


def store(cfg: Config) -> None:
    """Makes the image store from scratch."""
    shutil.rmtree(cfg.cache_dir, ignore_errors=True)
    ImageStore(cfg)


# Report ---------------------------------------------------------------------------------------------------------------


def measure(work: Path, cfg: Config, landmarks: Path) -> dict[str, float]:
    """Returns images per second of each way, median over REPEATS rounds after one to warm up."""
    crops, faces, many = work / "crops", work / "faces", Path(cfg.data)
    align_rate(crops, landmarks, faces)
    for copy in range(COPIES):
        for identity in faces.glob("*/"):
            shutil.copytree(identity, many / f"{identity.name}.{copy}", copy_function=os.link)
    contents = list_images(many, ())
    pack(many, (), work / "records", PROCESSES)

    def new() -> Path:
        """Returns a new folder each time, since ext4 is slow for a while after many files are deleted."""
        return Path(tempfile.mkdtemp(dir=work)) / "new"

    with contextlib.ExitStack() as stack:
        bare = {
            f"{what}, {kind}": stack.enter_context(bare_loop(folder, keep))
            for what, folder in (("400", crops), ("112", faces))
            for kind, keep in (("plain", False), ("keep", True))
        }
        ways = {
            **bare,
            "align": lambda: align_rate(crops, landmarks, new()),
            "inspect": lambda: rate(lambda: look_at_all(contents, PROCESSES)),
            "pack": lambda: rate(lambda: pack(many, (), new(), PROCESSES)),
            "unpack": lambda: rate(lambda: unpack(work / "records", False, new(), PROCESSES)),
            "store": lambda: rate(lambda: store(cfg)),
        }
        taken = {name: [] for name in ways}
        for _ in range(REPEATS + 1):
            for name, way in ways.items():
                taken[name].append(way())
    return {name: statistics.median(rates[1:]) for name, rates in taken.items()}


def page(made: str, sizes: dict[int, float], rates: dict[str, float]) -> str:
    """Formats the rates as a Markdown page."""
    lines = [
        "# Preparing data",
        "",
        made,
        "",
        f"{IMAGES:,} generated crops of {SIDE} x {SIDE}, {sizes[SIDE] / 1e3:.0f} kB each, for `align`, and "
        f"{COPIES * IMAGES:,} faces of 112 x 112, {sizes[112] / 1e3:.1f} kB each, for all else, in {PROCESSES} "
        f"processes; hours are scaled from these to {MILLION:,} images.",
        "",
        "| step | images/s | bare loop, /s | share | bare, freed memory kept, /s | share | hours |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, side, title in (
        ("align", SIDE, "`align` with landmarks, from files to files"),
        ("inspect", 112, "`inspect`, every image looked at"),
        ("pack", 112, "`rec`, files to train.rec"),
        ("unpack", 112, "`rec`, train.rec to files"),
        ("store", 112, "image store, which the first stage makes, with index and check sums"),
    ):
        plain, keep, ours = (rates[key] for key in (f"{side}, plain", f"{side}, keep", name))
        shares = f"{plain:,.0f} | {ours / plain:.0%} | {keep:,.0f} | {ours / keep:.0%}"
        lines.append(f"| {title} | {ours:,.0f} | {shares} | {MILLION / ours / 3600:.2f} |")
    return "\n".join(lines) + "\n"


def mean_size(folder: Path) -> float:
    """Returns the mean size in bytes of the JPEG files below a folder of IMAGES images."""
    return sum(path.stat().st_size for path in folder.rglob("*.jpg")) / IMAGES


def main() -> None:
    # Imported late: spawned processes import this module too, and these import PyTorch.
    from benchmarks.measuring import RESULTS, made_by, write
    from utils.environment import versions
    from utils.process import setup

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        cfg = Config(data=str(work / "many"), cache=str(work / "cache"), ethnicities=(), device="cpu")
        setup(cfg)
        landmarks = draw(work, IMAGES, DRAWN)
        rates = measure(work, cfg, landmarks)
        sizes = {SIDE: mean_size(work / "crops"), 112: mean_size(work / "faces")}
    found = {**versions(cfg), "processes": str(PROCESSES)}
    text = page(made_by("benchmarks.prepare", found), sizes, rates)
    write(RESULTS / "prepare_cpu.json", {"versions": found, "bytes of an image": sizes, "rates": rates}, text)
    print(text, end="")


if __name__ == "__main__":
    main()
