"""Measures for `benchmarks.stages` how time and memory grow with classes, files, images and pairs."""

import itertools
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measuring import in_own_process, memory, rates
from benchmarks.networks import CLASSES
from benchmarks.steps import DEVICE, STEPS, PlainElasticArcFace
from config.config import Config
from eval.verification import ten_fold
from utils.data.columns import Column, stream
from utils.data.faces import Faces
from utils.data.index import SETTLED, find_images
from utils.losses import ElasticArcFace
from utils.process import setup
from utils.stages.rates import adaptor_rate

FILES = (12_500, 125_000, 1_250_000)
HEADERS = (7_000, 14_000, CLASSES)
PAIRS = (1500, 3000, 6000)


def growth(cfg: Config, work: Path) -> Iterator[tuple[str, str]]:
    """Yields what is measured and its result: ms and MB at three sizes, images/s by memory layout and threads."""
    for classes in HEADERS:
        yield f"adaptor step, {classes:,} classes", f"{1e3 * cfg.batch_size / adaptor_rate(cfg, classes):.1f} ms"
    for count in FILES:
        files = replace(cfg, data=str(work / f"{count}-files"), ethnicities=("African",))
        empty_files(count, Path(files.data))
        yield f"index of {count:,} files, listed", f"{_seconds(files):.2f} s"
        yield f"index of {count:,} files, read back", f"{_seconds(files):.2f} s"
        yield f"memory of the index of {count:,} files", _megabytes(in_own_process(_index_here, files))
        shutil.rmtree(files.data)
        peak = in_own_process(_reading_here, count, work)
        yield f"memory of reading {count:,} images, embeddings, labels", _megabytes(peak)
    for pairs in PAIRS:
        embeddings, same = noise_pairs(pairs)
        rate = rates(1, lambda embeddings=embeddings, same=same: ten_fold(embeddings, same))[0]
        yield f"ten folds of {pairs:,} pairs", f"{1e3 / rate:.2f} ms"
    for header, classes in itertools.product((PlainElasticArcFace, ElasticArcFace), HEADERS):
        peak = in_own_process(_header_here, header, classes)
        yield f"memory of {header.__name__}, batch 128, {classes:,} classes", _megabytes(peak)
    peak = in_own_process(_adaptor_here, replace(cfg, device="cpu"))
    what = f"resident memory of a process that trains SL, {CLASSES:,} classes, libraries included"
    yield what, _megabytes(peak)
    if DEVICE.type == "cpu":
        yield from layouts()


def empty_files(count: int, folder: Path) -> None:
    """Makes empty files, 50 per identity, and waits until their folders are old enough for the index to be cached."""
    for number in range(count):
        identity = folder / "African" / f"m.{number // 50}"
        if number % 50 == 0:
            identity.mkdir(parents=True)
        os.close(os.open(identity / f"{number}.jpg", os.O_CREAT))
    time.sleep(SETTLED)


def noise_pairs(pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns random embeddings (2 P, 64) of unit length, and which pairs are genuine, in ten folds (P,) bool."""
    embeddings = np.random.default_rng(0).normal(size=(2 * pairs, 64))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings, np.arange(pairs) // (pairs // 20) % 2 == 0


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


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


# In a process of its own ----------------------------------------------------------------------------------------------


def _index_here(cfg: Config) -> int:
    """Returns by how many bytes reading the index from the cache raises the peak."""
    _reset_peak()
    before = memory("VmRSS")
    find_images(cfg)
    return memory("VmHWM") - before


def _adaptor_here(cfg: Config) -> int:
    """Returns the peak bytes of the whole process while it trains an adaptor."""
    setup(cfg)
    adaptor_rate(cfg, CLASSES)
    return memory("VmHWM")


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
        columns[name] = Column(tuple(np.load(path, mmap_mode="r") for path in paths))
    faces = Faces.__new__(Faces)  # its order of the rows, without files
    faces.cfg, faces.flip, faces.rows = Config(), True, np.arange(count)
    batches = itertools.islice(faces.batches(0, 0), 64)
    return max(memory("RssAnon") for _ in stream(columns, batches, torch.device("cpu"), 2))


def _header_here(header: type[nn.Module], classes: int) -> int:
    """Returns by how many bytes a forward and backward pass of a header, with its gradient, raises the peak."""
    torch.set_num_threads(1)
    small, large = header(512, 128), header(512, classes)
    embeddings, label = F.normalize(torch.randn(128, 512)), torch.zeros(128, dtype=torch.long)
    F.cross_entropy(small(embeddings, label), label).backward()  # the libraries allocate buffers at first use
    _reset_peak()
    before = memory("VmRSS")
    F.cross_entropy(large(embeddings.requires_grad_(), label), label).backward()
    return memory("VmHWM") - before


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
