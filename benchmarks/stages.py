"""Compares for every stage the straightforward way, ours, and the bare kernels that bound it, in one run.

The straightforward way does what the published code does, written here for the comparison: files opened one by one on
the training thread, PIL transforms, a dense one-hot header, PyTorch's defaults. Rates are medians of five, without
warm-up, validation and compilation. The ways alternate, except for training steps: what `setup` does to the process
cannot be undone, so all straightforward steps come first, and a difference of a tenth may be noise.

A GPU is used if there is one; benchmarks.networks then follows.

Reads   nothing; draws generated faces
Writes  benchmarks/results/stages_<device>.json and .md
Run     python -m benchmarks.stages
"""

import glob
import itertools
import multiprocessing
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.model_selection import KFold
from torch import nn
from torchvision import transforms

from backbones import build_adaptor, build_backbone
from benchmarks.networks import CLASSES, PUBLISHED, measure_all
from benchmarks.timing import EPOCHS, Timed, adaptor_losses, graphs, rates
from config.config import Config
from eval.verification import THRESHOLDS, pair_distances, ten_fold, views
from utils.data.columns import Column, stream
from utils.data.index import SETTLED, find_images, scan
from utils.data.pairs import load_bin
from utils.data.split import deal
from utils.data.store import ImageStore
from utils.data.synthetic import generate
from utils.environment import device_of, versions
from utils.losses import ElasticArcFace
from utils.process import setup
from utils.storage.files import write_json, write_text
from utils.training.engine import fit
from utils.training.extract import Output, embed_all

GROUPS = ("African", "Asian", "Caucasian", "Indian")
ROWS = 8192  # training rows of the adaptor, fewer than in the paper
DEVICE = device_of(Config())
AGAIN = 1 if DEVICE.type == "cpu" else 50  # how often an epoch sees the rows
LISTED = 125_000  # files in the index
TRANSFORM = transforms.Compose(
    [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
)


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


def measure_split(faces: Path, work: Path) -> Row:
    """Compares decoding and re-encoding every image, as published, with listing and splitting."""
    paths = sorted((faces / "train").rglob("*.jpg"))

    def decoded_and_written_again() -> None:
        for path in paths:
            cv2.imwrite(str(work / "copy.jpg"), cv2.imread(str(path)))

    def listed() -> None:
        index = scan(faces / "train", GROUPS)
        for group in GROUPS:
            deal(index.identities_of(group), 4, np.random.default_rng(0))

    return Row("split", "images", *rates(len(paths), decoded_and_written_again, listed))


def measure_index(cfg: Config) -> Row:
    """Compares listing all files into a dictionary of labels with our index, read from the cache."""
    empty_files(LISTED, Path(cfg.data))

    def globbed() -> None:
        paths = sorted(glob.glob(f"{cfg.data}/*/*/*.jpg"))
        labels = {name: k for k, name in enumerate(sorted({path.split("/")[-2] for path in paths}))}
        [labels[path.split("/")[-2]] for path in paths]

    return Row(f"index of {LISTED:,} files", "images", *rates(LISTED, globbed, lambda: find_images(cfg)))


def empty_files(count: int, folder: Path) -> None:
    """Makes empty files, 50 per identity, and waits until their folders are old enough for the index to be cached."""
    for number in range(count):
        identity = folder / "African" / f"m.{number // 50}"
        if number % 50 == 0:
            identity.mkdir(parents=True)
        os.close(os.open(identity / f"{number}.jpg", os.O_CREAT))
    time.sleep(SETTLED)


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
            torch.stack([TRANSFORM(Image.fromarray(image)) for image in images])

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


# Steps ----------------------------------------------------------------------------------------------------------------


class PlainElasticArcFace(nn.Module):
    """Implements the header as published: normalised kernel copy, dense one-hot margins, arc cosine of all entries."""

    def __init__(self, dimensions: int, classes: int, s: float = 64.0, m: float = 0.5, std: float = 0.0125):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(dimensions, classes).normal_(0, 0.01))
        self.s, self.m, self.std = s, m, std

    def forward(self, embeddings: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        cosine = (F.normalize(embeddings) @ F.normalize(self.kernel, dim=0)).clamp(-1, 1)
        labelled = torch.where(label != -1)[0]
        margins = torch.normal(self.m, self.std, (len(labelled), 1), device=label.device)
        hot = torch.zeros(len(labelled), cosine.shape[1], device=label.device).scatter_(
            1, label[labelled].unsqueeze(1), margins
        )
        return cosine.acos().index_add(0, labelled, hot).cos() * self.s


def plain_steps(losses: Callable, modules: list[nn.Module], batch: Callable[[], dict], units: int) -> float:
    """Times a step with PyTorch's defaults: batches made on the training thread, the loss read after every step.

    Returns units per second.
    """
    parameters = [parameter for module in modules for parameter in module.to(DEVICE).parameters()]
    optimizer = torch.optim.SGD(parameters, 0.01, 0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        total = sum(losses(**{name: value.to(DEVICE) for name, value in batch().items()}).values())
        total.backward()
        nn.utils.clip_grad_norm_(modules[0].parameters(), 5.0)
        optimizer.step()
        total.item()

    return rates(units, step)[0]


def adaptor_columns(classes: int = CLASSES) -> dict:
    random = np.random.default_rng(0)
    embeddings = random.normal(size=(4, ROWS, 512)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=2, keepdims=True)
    return {"embedding": tuple(embeddings), "label": random.integers(0, classes, ROWS)}


def plain_adaptor(cfg: Config, work: Path) -> tuple[float, float]:
    """Returns rows per second of the plain step alone, and of the step with four files opened for every row."""
    columns, size = adaptor_columns(), cfg.batch_size
    adaptor, header = build_adaptor("SL", cfg), PlainElasticArcFace(512, CLASSES)
    for teacher, row in itertools.product(range(4), range(size)):
        np.save(work / f"{teacher}-{row}.npy", columns["embedding"][teacher][row])

    def files() -> dict:
        opened = [[np.load(work / f"{teacher}-{row}.npy") for teacher in range(4)] for row in range(size)]
        embedding = torch.stack([torch.from_numpy(np.concatenate(four)) for four in opened])
        return {"embedding": embedding, "label": torch.from_numpy(columns["label"][:size])}

    made, losses = files(), adaptor_losses(adaptor, header)
    return tuple(plain_steps(losses, [adaptor, header], batch, size) for batch in (lambda: made, files))


def our_adaptor(cfg: Config, work: Path, classes: int = CLASSES, times: int = AGAIN) -> float:
    cfg = replace(cfg, num_epoch_fc=EPOCHS)
    adaptor, header = build_adaptor("SL", cfg), ElasticArcFace(512, classes, 64.0, *cfg.margin("SL"))
    faces = Timed(cfg, adaptor_columns(classes), flip=False, times=times)
    options = {"kind": "SL", "validate": faces.validate}
    fit(adaptor_losses(adaptor, header), faces, work / "adaptors" / "SL", cfg, adaptor, header, **options)
    return faces.rate()


def bare_adaptor(cfg: Config) -> float:
    """Returns rows per second of the matrix products of a step and one pass over header, gradient and momentum."""
    size = cfg.batch_size
    inputs, kernel, weight, grad = (
        torch.randn(shape, device=DEVICE) for shape in ((size, 2048), (512, CLASSES), (512, 2048), (size, CLASSES))
    )
    header = nn.Parameter(kernel)
    header.grad = torch.zeros_like(kernel)
    optimizer = torch.optim.SGD([header], 1e-9, 0.9, weight_decay=5e-4, fused=True)

    def step() -> None:
        embedding = inputs @ weight.T
        with torch.no_grad():
            embedding @ header
            back = grad @ header.T
            torch.mm(embedding.T, grad, out=header.grad)
        back.T @ inputs
        optimizer.step()

    return rates(size, step)[0]


@dataclass(frozen=True)
class Step:
    """Describes a network's training step with the losses of teachers (EAF), of a-KD (KD) or of EAF-KD (both)."""

    stage: str
    network: str
    batch: int
    steps: int  # per epoch
    has_header: bool = True
    has_target: bool = False
    compile: bool = False

    def modules(self, header: type) -> list[nn.Module]:
        torch.manual_seed(0)
        return [build_backbone(self.network), *([header(512, 7000, std=0.05)] if self.has_header else [])]

    def losses(self, backbone: nn.Module, header: nn.Module | None = None) -> Callable:
        def named(embedding, label, target):
            eaf = {"eaf": F.cross_entropy(header(embedding, label), label)} if header else {}
            return eaf | ({"kd": 10_000 * F.mse_loss(embedding, target)} if self.has_target else {})

        def losses(image, label, target):
            return named(F.normalize(backbone(image)), label, target)

        return losses

    def columns(self, images: np.ndarray) -> dict:
        random = np.random.default_rng(0)
        target = random.normal(size=(len(images), 512)).astype(np.float32)
        return {"image": images, "label": random.integers(0, 7000, len(images)), "target": target}

    def plain(self, images: np.ndarray) -> float:
        columns = self.columns(images[: self.batch])
        batch = {name: torch.from_numpy(np.array(column)) for name, column in columns.items()}
        batch["image"] = (batch["image"].permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()
        modules = self.modules(PlainElasticArcFace)
        return plain_steps(self.losses(*modules), modules, lambda: batch, self.batch)

    def ours(self, images: np.ndarray, cfg: Config, work: Path) -> float:
        cfg = replace(cfg, batch_size=self.batch, num_epoch=EPOCHS, compile=self.compile)
        modules = self.modules(ElasticArcFace)
        faces, before = Timed(cfg, self.columns(images[: self.batch * self.steps]), flip=True, times=AGAIN), graphs()
        options = {"kind": "EAF-KD", "validate": faces.validate}
        fit(self.losses(*modules), faces, work / "students" / self.stage, cfg, *modules, **options)
        if self.compile and graphs() == before:
            raise RuntimeError(f"{self.stage} was not compiled.")
        return faces.rate()

    def bare(self, layout: torch.memory_format = torch.channels_last) -> float:
        """Returns images per second of forward and backward pass of the network, on one batch on the device."""
        backbone = build_backbone(self.network).to(DEVICE, memory_format=layout)
        image = torch.randn(self.batch, 3, 112, 112).to(DEVICE, memory_format=layout)
        grad = torch.randn(self.batch, 512, device=DEVICE)

        def step() -> None:
            backbone.zero_grad()
            backbone(image).backward(grad)

        return rates(self.batch, step)[0]


STEPS = (
    Step("teacher step, iresnet34", "iresnet34", 16, 4),
    Step("teacher step, iresnet_tiny", "iresnet_tiny", 128, 16),
    Step("teacher step, iresnet_tiny, compiled", "iresnet_tiny", 128, 16, compile=True),
    Step("a-KD step, iresnet_tiny", "iresnet_tiny", 128, 16, has_header=False, has_target=True),
    Step("EAF-KD step, iresnet_tiny", "iresnet_tiny", 128, 16, has_target=True),
)


# Inference and scores -------------------------------------------------------------------------------------------------


def measure_verification(faces: Path, cfg: Config) -> Row:
    network = build_backbone("iresnet_tiny").eval().to(DEVICE)
    path = faces / "pairs" / "Asian_test.bin"
    pairs = load_bin(path)
    encoded = [cv2.imencode(".png", image)[1] for image in pairs.images]
    plain = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])

    @torch.no_grad()
    def one_by_one() -> None:
        """Does as published: decodes and transforms images one at a time, embeds them in batches of 64."""
        images = [plain(Image.fromarray(cv2.imdecode(image, cv2.IMREAD_COLOR))) for image in encoded]
        for start in range(0, len(images), 64):
            batch = torch.stack(images[start : start + 64]).to(DEVICE)
            network(batch), network(batch.flip(-1))

    @torch.no_grad()
    def bare() -> None:
        for start in range(0, len(inputs), 256):
            batch = inputs[start : start + 256]
            network(batch), network(batch)

    inputs = torch.randn(len(encoded), 3, 112, 112).to(DEVICE, memory_format=torch.channels_last)

    def ours() -> None:
        pair_distances(views(network, pairs.distinct, cfg, "verify"), pairs.rows)

    found = rates(len(encoded), one_by_one, ours, bare)
    return Row("verification embedding, iresnet_tiny", "images", *found, "the network alone")


def measure_extraction(cfg: Config, work: Path) -> Row:
    network, store = build_backbone("iresnet_tiny").eval().to(DEVICE), ImageStore(cfg)
    images = store.images[:1024]
    plain = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    paths = [Path(cfg.data) / path for path in store.index.paths[: len(images)]]

    @torch.no_grad()
    def file_by_file() -> None:
        for start in range(0, len(paths), 128):
            opened = [plain(Image.open(path)) for path in paths[start : start + 128]]
            for k, embedding in enumerate(F.normalize(network(torch.stack(opened).to(DEVICE))).cpu().numpy()):
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

    inputs = torch.randn(len(images), 3, 112, 112).to(DEVICE, memory_format=torch.channels_last)
    found = rates(len(images), file_by_file, embedded, bare)
    return Row("extraction, iresnet_tiny", "images", *found, "the network alone")


def measure_ten_fold(pairs: int = 6000) -> Row:
    random = np.random.default_rng(0)
    embeddings = random.normal(size=(2 * pairs, 64))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    same = np.arange(pairs) // (pairs // 20) % 2 == 0

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


# Scaling and memory ---------------------------------------------------------------------------------------------------


def growth(cfg: Config, work: Path) -> Iterator[tuple[str, str]]:
    """Yields what is measured and its result: ms and MB at three sizes, images/s by memory layout and threads."""
    for classes in (7_000, 14_000, CLASSES):
        rate = our_adaptor(cfg, work / str(classes), classes)
        yield f"adaptor step, {classes:,} classes", f"{1e3 * cfg.batch_size / rate:.1f} ms"
    for count in (12_500, 125_000, 1_250_000):
        files = replace(cfg, data=str(work / f"{count}-files"), ethnicities=("African",))
        empty_files(count, Path(files.data))
        yield f"index of {count:,} files, listed", f"{_seconds(files):.2f} s"
        yield f"index of {count:,} files, read back", f"{_seconds(files):.2f} s"
        yield f"memory of the index of {count:,} files", f"{_in_own_process(_index_here, files) / 1e6:.0f} MB"
        shutil.rmtree(files.data)
        yield (
            f"memory of reading {count:,} images, embeddings, labels",
            f"{_in_own_process(_reading_here, count, work) / 1e6:.0f} MB",
        )
    for pairs in (1500, 3000, 6000):
        yield f"ten folds of {pairs:,} pairs", f"{1e3 / measure_ten_fold(pairs).ours:.2f} ms"
    for header, classes in itertools.product((PlainElasticArcFace, ElasticArcFace), (7_000, 14_000, CLASSES)):
        peak = _in_own_process(_header_here, header, classes)
        yield f"memory of {header.__name__}, batch 128, {classes:,} classes", f"{peak / 1e6:.0f} MB"
    peak = _in_own_process(_adaptor_here, replace(cfg, device="cpu"), work / "whole")
    yield (
        f"resident memory of a process that trains SL, {CLASSES:,} classes, libraries included",
        f"{peak / 1e6:.0f} MB",
    )
    if DEVICE.type == "cpu":
        yield from layouts()


def layouts() -> Iterator[tuple[str, str]]:
    every = torch.get_num_threads()
    for step, threads in itertools.product(STEPS[:2], sorted({1, every})):
        torch.set_num_threads(threads)
        for layout in (torch.contiguous_format, torch.channels_last):
            what = f"{step.network} forwards and backwards, {str(layout).removeprefix('torch.')}, {threads} threads"
            yield what, f"{step.bare(layout):.1f} images/s"
    torch.set_num_threads(every)


def _seconds(cfg: Config) -> float:
    started = time.perf_counter()
    find_images(cfg)
    return time.perf_counter() - started


def _in_own_process(function: Callable[..., int], *arguments) -> int:
    """Calls a function in its own process and returns its result."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _index_here(cfg: Config) -> int:
    """Returns by how many bytes reading the index from the cache raises the peak."""
    _reset_peak()
    before = _memory("VmRSS")
    find_images(cfg)
    return _memory("VmHWM") - before


def _adaptor_here(cfg: Config, work: Path) -> int:
    """Returns the peak bytes of the whole process while it trains an adaptor."""
    setup(cfg)
    our_adaptor(cfg, work, times=1)
    return _memory("VmHWM")


def _reading_here(count: int, work: Path) -> int:
    """Returns the peak of private, not memory-mapped bytes while batches of a training set of this size are read."""
    setup(Config(device="cpu"))
    shapes = {"image": [(count, 112, 112, 3)], "embedding": [(count, 512)] * 4, "label": [(count,)]}
    kinds = {"image": np.uint8, "embedding": np.float32, "label": np.int64}
    columns = {}
    for name, several in shapes.items():
        paths = [work / f"{count}-{name}-{k}.npy" for k in range(len(several))]
        for path, shape in zip(paths, several, strict=True):
            np.lib.format.open_memmap(path, "w+", kinds[name], shape).flush()  # a sparse file
        columns[name] = tuple(np.load(path, mmap_mode="r") for path in paths)
    faces = Timed(Config(), columns, flip=True)
    read, batches = faces.columns, itertools.islice(faces.batches(0, 0), 64)
    return max(_memory("RssAnon") for _ in stream(read, batches, torch.device("cpu"), 2))


def _header_here(header: type[nn.Module], classes: int) -> int:
    """Returns by how many bytes a forward and backward pass of a header, with its gradient, raises the peak."""
    torch.set_num_threads(1)
    small, large = header(512, 128), header(512, classes)
    embeddings, label = F.normalize(torch.randn(128, 512)), torch.zeros(128, dtype=torch.long)
    F.cross_entropy(small(embeddings, label), label).backward()  # the libraries allocate buffers at first use
    _reset_peak()
    before = _memory("VmRSS")
    F.cross_entropy(large(embeddings.requires_grad_(), label), label).backward()
    return _memory("VmHWM") - before


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory(what: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{what}:\s+(\d+) kB", status)[1])


# Report ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        faces = work / "faces"
        generate(faces, GROUPS, identities=32, images=16, pairs=100, seed=0)
        paths = {
            "data": f"{faces}/train",
            "pairs": f"{faces}/pairs",
            "output": f"{work}/output",
            "cache": f"{work}/cache",
        }
        cfg = Config(**paths, infer_batch_size=256)
        images = np.array(ImageStore(cfg).images)
        report = []
        for row in _measure(faces, work, cfg, images):
            print(_line(row), flush=True)
            report.append(row)
        sizes = dict(growth(cfg, work))
    found = versions(cfg)
    stages = [vars(row) for row in report]
    path = Path(f"benchmarks/results/stages_{DEVICE.type}.json")
    write_json(path, {"versions": found, "stages": stages, "sizes": sizes})
    head = f"Made by `python -m benchmarks.stages` ({', '.join(f'{k} {v}' for k, v in found.items())}).\n\n"
    grown = "".join(f"| {what} | {value} |\n" for what, value in sizes.items())
    lines = "\n".join([*HEADER, *map(_line, report)]) + f"\n\n| ours | |\n|---|--:|\n{grown.rstrip()}"
    write_text(path.with_suffix(".md"), f"# Stages side by side\n\n{head}{lines}\n")
    if DEVICE.type == "cuda":
        measure_all(PUBLISHED)


def _measure(faces: Path, work: Path, cfg: Config, images: np.ndarray) -> Iterator[Row]:
    # `setup` cannot be undone, so PyTorch's defaults are measured first, but with the same precision.
    torch.backends.cudnn.allow_tf32 = False
    plain = {step: step.plain(images) for step in STEPS if not step.compile}
    (work / "files").mkdir()
    plain_step, plain_epoch = plain_adaptor(cfg, work / "files")
    setup(cfg)
    yield measure_split(faces, work)
    yield measure_index(replace(cfg, data=str(work / "files-to-list"), ethnicities=("African",)))
    yield measure_reader(faces, cfg)
    (work / "embeddings").mkdir()
    yield measure_adaptor_input(work / "embeddings")
    limit = "products and one pass over header, gradient, momentum"
    ours, bare = our_adaptor(cfg, work), bare_adaptor(cfg)
    yield Row("adaptor step, 27,997 classes", "rows", plain_step, ours, bare, limit)
    yield Row("adaptor epoch, with its reader", "rows", plain_epoch, ours, bare, limit)
    for step in STEPS:
        ours, bare = step.ours(images, cfg, work), step.bare()
        straightforward = plain[replace(step, stage=step.stage.removesuffix(", compiled"), compile=False)]
        yield Row(step.stage, "images", straightforward, ours, bare, "the network alone, not compiled")
    yield measure_extraction(cfg, work)
    yield measure_verification(faces, cfg)
    yield measure_ten_fold()


HEADER = (
    "| stage | unit | straightforward, /s | ours, /s | ratio | limit, /s | share of the limit | what the limit is |",
    "|---|---|--:|--:|--:|--:|--:|---|",
)


def _line(row: Row) -> str:
    limit = f"{row.limit:,.0f} | {row.ours / row.limit:.0%}" if row.limit else " | "
    ratio = row.ours / row.straightforward
    numbers = f"{row.straightforward:,.1f} | {row.ours:,.1f} | {ratio:,.1f} | {limit}"
    return f"| {row.stage} | {row.unit} | {numbers} | {row.limit_is} |"


if __name__ == "__main__":
    main()
