"""Compares for every stage the straightforward way, ours, and the bare kernels that bound it, in one run.

The straightforward way does what the published code does, written here for the comparison: files opened one by one on
the training thread, PIL transforms, a dense one-hot header, PyTorch's defaults. Rates are medians of five, without
warm-up, validation and compilation. The ways alternate, except for training steps: what `setup` does to the process
cannot be undone, so all straightforward steps come first, and a difference of a tenth may be noise. A GPU is used if
there is one.

Reads   nothing; draws generated faces
Writes  benchmarks/results/stages_<device>.json and .md
Run     python -m benchmarks.stages
"""

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.model_selection import KFold
from torchvision import transforms

from backbones import build_backbone
from benchmarks.growth import growth, noise_pairs
from benchmarks.measuring import RESULTS, made_by, rates, write
from benchmarks.networks import CLASSES
from benchmarks.steps import DEVICE, STEPS, bare_adaptor, plain_adaptor
from config.config import Config
from eval.verification import THRESHOLDS, pair_distances, ten_fold, views
from utils.data.columns import Column, stream
from utils.data.pairs import load_bin
from utils.data.store import ImageStore
from utils.data.synthetic import generate
from utils.environment import device_of, versions
from utils.process import setup
from utils.stages.rates import adaptor_rate
from utils.training.extract import Output, embed_all

PLAIN = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
FLIPPED = transforms.Compose([transforms.RandomHorizontalFlip(), PLAIN])


@dataclass
class Row:
    """Holds the rates of a stage in units per second; `limit` is the rate of the bare kernels."""

    stage: str
    unit: str
    straightforward: float
    ours: float
    limit: float | None = None
    limit_is: str = ""


# Files and images -----------------------------------------------------------------------------------------------------


def measure_reader(faces: Path, cfg: Config) -> Row:
    """Compares one worker of a published loader with our reader, which is one thread beside PyTorch's."""
    store = ImageStore(cfg)
    paths = [faces / "train" / path for path in store.index.paths]
    random, size = np.random.default_rng(0), 128
    batches = [(random.integers(0, len(paths), size), random.random(size) < 0.5) for _ in range(8)]
    device = torch.device("cpu")

    def files() -> None:
        for rows, _ in batches:
            images = [cv2.cvtColor(cv2.imread(str(paths[row])), cv2.COLOR_BGR2RGB) for row in rows]
            torch.stack([FLIPPED(Image.fromarray(image)) for image in images])

    def mapped() -> None:
        for _ in stream({"image": Column((store.images,))}, batches, device, 0):
            pass

    def gathered() -> None:
        for rows, _ in batches:
            np.asarray(store.images).take(rows, axis=0)

    return Row("image reader", "images", *rates(size * len(batches), files, mapped, gathered), "gathering the bytes")


def measure_adaptor_input(work: Path) -> Row:
    """Compares reading four embeddings per row from a file each with reading rows of four memory-mapped arrays."""
    count, size = 4096, 128
    values = np.random.default_rng(0).normal(size=(4, count, 512)).astype(np.float32)
    for teacher, row in itertools.product(range(4), range(count)):
        (work / f"{teacher}").mkdir(exist_ok=True)
        np.save(work / f"{teacher}" / f"{row}.npy", values[teacher, row])
    for teacher in range(4):
        np.save(work / f"{teacher}.npy", values[teacher])
    arrays = tuple(np.load(work / f"{teacher}.npy", mmap_mode="r") for teacher in range(4))
    order = np.random.default_rng(1).permutation(count).reshape(-1, size)
    device = torch.device("cpu")

    def files() -> None:
        for rows in order[:4]:
            for row in rows:
                np.concatenate([np.load(work / f"{teacher}" / f"{row}.npy") for teacher in range(4)])

    def mapped() -> None:
        for _ in stream({"embedding": Column(arrays)}, ((rows, None) for rows in order), device, 0):
            pass

    def copied() -> None:
        whole = torch.from_numpy(np.concatenate(values[:, :size], 1))
        for _ in order:
            whole.clone()

    straightforward = rates(4 * size, files)[0]
    ours, limit = rates(count, mapped, copied)
    return Row("adaptor input", "rows", straightforward, ours, limit, "copying the rows")


# Inference and scores -------------------------------------------------------------------------------------------------


def measure_verification(faces: Path, cfg: Config) -> Row:
    device = device_of(cfg)
    network = build_backbone("iresnet_tiny").eval().to(device)
    pairs = load_bin(faces / "pairs" / "Asian_test.bin")
    encoded = [cv2.imencode(".png", image)[1] for image in pairs.images]

    @torch.no_grad()
    def one_by_one() -> None:
        """Does as published: decodes and transforms images one at a time, embeds them in batches of 64."""
        images = [PLAIN(Image.fromarray(cv2.imdecode(image, cv2.IMREAD_COLOR))) for image in encoded]
        for start in range(0, len(images), 64):
            batch = torch.stack(images[start : start + 64]).to(device)
            network(batch), network(batch.flip(-1))

    @torch.no_grad()
    def bare() -> None:
        for start in range(0, len(inputs), 256):
            batch = inputs[start : start + 256]
            network(batch), network(batch)

    inputs = torch.randn(len(encoded), 3, 112, 112).to(device, memory_format=torch.channels_last)

    def ours() -> None:
        pair_distances(views(network, pairs.distinct, cfg, "verify"), pairs.rows)

    found = rates(len(encoded), one_by_one, ours, bare)
    return Row("verification embedding, iresnet_tiny", "images", *found, "the network alone")


def measure_extraction(cfg: Config, work: Path) -> Row:
    device, store = device_of(cfg), ImageStore(cfg)
    network = build_backbone("iresnet_tiny").eval().to(device)
    images = store.images[:1024]
    paths = [Path(cfg.data) / path for path in store.index.paths[: len(images)]]

    @torch.no_grad()
    def file_by_file() -> None:
        for start in range(0, len(paths), 128):
            opened = [PLAIN(Image.open(path)) for path in paths[start : start + 128]]
            for k, embedding in enumerate(F.normalize(network(torch.stack(opened).to(device))).cpu().numpy()):
                np.save(work / f"{start + k}.npy", embedding)

    @torch.no_grad()
    def bare() -> None:
        for start in range(0, len(images), 256):
            network(inputs[start : start + 256])

    def embedding(image):
        return F.normalize(network(image))

    def embedded() -> None:
        output = Output(work / "embeddings.npy", {}, embedding)
        output.path.unlink(missing_ok=True)
        embed_all([output], network, {"image": Column((images,))}, cfg)

    inputs = torch.randn(len(images), 3, 112, 112).to(device, memory_format=torch.channels_last)
    found = rates(len(images), file_by_file, embedded, bare)
    return Row("extraction, iresnet_tiny", "images", *found, "the network alone")


def measure_ten_fold() -> Row:
    pairs = 6000
    embeddings, same = noise_pairs(pairs)

    def counted(distance: np.ndarray, actual: np.ndarray, threshold: float) -> tuple[float, float, float]:
        accepted = distance < threshold
        right, wrong = np.sum(accepted & actual), np.sum(accepted & ~actual)
        rejected, missed = np.sum(~accepted & ~actual), np.sum(~accepted & actual)
        tpr, fpr = right / max(1, right + missed), wrong / max(1, wrong + rejected)
        return tpr, fpr, (right + rejected) / len(distance)

    def loop() -> None:
        """Does as published: counts all pairs again for every threshold of every fold."""
        distance = np.sum(np.square(embeddings[0::2] - embeddings[1::2]), 1)
        for train, test in KFold(10, shuffle=False).split(distance):
            accuracies = [counted(distance[train], same[train], t)[2] for t in THRESHOLDS]
            for t in THRESHOLDS:
                counted(distance[test], same[test], t)
            counted(distance[test], same[test], THRESHOLDS[int(np.argmax(accuracies))])

    return Row(f"ten folds of {pairs:,} pairs", "sets", *rates(1, loop, lambda: ten_fold(embeddings, same)))


# Report ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        faces = work / "faces"
        generate(faces, Config().ethnicities, identities=32, images=16, pairs=100, seed=0)
        paths = {"data": f"{faces}/train", "pairs": f"{faces}/pairs", "cache": f"{work}/cache"}
        cfg = Config(**paths, infer_batch_size=256)
        rows = []
        for row in measure(faces, work, cfg):
            print(line(row), flush=True)
            rows.append(row)
        kept = {"versions": versions(cfg), "stages": [*map(vars, rows)], "sizes": dict(growth(cfg, work))}
    write(RESULTS / f"stages_{DEVICE.type}.json", kept, page(kept))


def measure(faces: Path, work: Path, cfg: Config) -> Iterator[Row]:
    # `setup` cannot be undone, so PyTorch's defaults are measured first.
    plain = {step.stage: step.plain() for step in STEPS if not step.compile}
    plain_step = plain_adaptor(cfg)
    setup(cfg)
    yield measure_reader(faces, cfg)
    (work / "embeddings").mkdir()
    yield measure_adaptor_input(work / "embeddings")
    limit = "products and one pass over header, gradient, momentum"
    ours, bare = adaptor_rate(cfg, CLASSES), bare_adaptor(cfg)
    yield Row(f"adaptor step, {CLASSES:,} classes", "rows", plain_step, ours, bare, limit)
    for step in STEPS:
        ours, bare = step.ours(cfg), step.bare()
        straightforward = plain[step.stage.removesuffix(", compiled")]
        yield Row(step.stage, "images", straightforward, ours, bare, "the network alone, not compiled")
    yield measure_extraction(cfg, work)
    yield measure_verification(faces, cfg)
    yield measure_ten_fold()


def page(kept: dict) -> str:
    """Formats the measurements as a Markdown page."""
    lines = [
        "# Stages side by side",
        "",
        made_by("benchmarks.stages", kept["versions"]),
        "",
        *HEADER,
        *(line(Row(**row)) for row in kept["stages"]),
        "",
        "| ours | |",
        "|---|--:|",
        *(f"| {what} | {value} |" for what, value in kept["sizes"].items()),
    ]
    return "\n".join(lines) + "\n"


HEADER = (
    "| stage | unit | straightforward, /s | ours, /s | ratio | limit, /s | share of the limit | what the limit is |",
    "|---|---|--:|--:|--:|--:|--:|---|",
)


def line(row: Row) -> str:
    limit = f"{row.limit:,.0f} | {row.ours / row.limit:.0%}" if row.limit else " | "
    ratio = row.ours / row.straightforward
    numbers = f"{row.straightforward:,.1f} | {row.ours:,.1f} | {ratio:,.1f} | {limit}"
    return f"| {row.stage} | {row.unit} | {numbers} | {row.limit_is} |"


if __name__ == "__main__":
    main()
