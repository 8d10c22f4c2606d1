"""Training and inference rates of the paper's networks on this machine: measured, or derived from one given rate."""

import contextlib
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from backbones import build_adaptor, build_backbone
from config.config import Config
from utils.data.columns import Batch, Column
from utils.data.faces import Faces
from utils.environment import device_of
from utils.losses import ElasticArcFace
from utils.process import setup
from utils.training.engine import fit, infer

TRAIN, INFER, ADAPT = "training", "inference", "training of adaptors"
"""Kinds of work, counted in images trained on, images embedded, and rows that an adaptor is trained on."""

Rates = dict[tuple[str, str], float]
"""Images (or rows) per second by (kind of work, network); the network of an adaptor is ""."""

TRAINED = {"fp32": 1_215, "tf32": 3_394, "bf16": 4_318}
INFERRED = {"fp32": 4_526, "tf32": 13_387, "bf16": 20_819}
ADAPTED = 134_487
"""Images per second of training and inference of iresnet34, and rows of the SL adaptor, on an H100 (for ratios)."""

SECONDS = 12.0  # duration of the measurement for each kind of work and network
WINDOWS = 5  # at the most, of which the rate is the median


def rates_from(rate: float, cfg: Config) -> Rates:
    """Derives all rates from `rate`, the images per second at which the teachers' network is trained.

    The rates of the students' network are scaled by the ratio of the two networks' `operations`.
    """
    rates = {}
    for network in (cfg.network, cfg.student_network):
        own = rate * operations(cfg.network) / operations(network)
        rates |= {(TRAIN, network): own, (INFER, network): own * INFERRED[cfg.infer_precision] / TRAINED[cfg.precision]}
    return {**rates, (ADAPT, ""): rate * ADAPTED / TRAINED[cfg.precision]}


def measured_rates(cfg: Config, classes: int) -> Rates:
    """Measures all rates on random data with the device, precision and batch size of `cfg`, in about a minute.

    Training steps are those of `utils.training.engine.fit`, with a header of `classes` identities. The trained weights
    are discarded.
    """
    setup(cfg)
    rates = {}
    for network in dict.fromkeys((cfg.network, cfg.student_network)):
        rates[TRAIN, network] = teacher_rate(network, cfg, classes)
        rates[INFER, network] = inference_rate(network, cfg)
    return {**rates, (ADAPT, ""): adaptor_rate(cfg, classes)}


@functools.cache
def operations(network: str) -> int:
    """Returns the multiplications and additions of a forward pass of one image."""
    with torch.device("meta"):
        backbone = build_backbone(network).eval()
        with FlopCounterMode(display=False) as counter:
            backbone(torch.empty(1, 3, 112, 112))
    return counter.get_total_flops()


class _Measured(Exception):
    """Ends `fit` or `infer` from inside when the measurement is complete."""


class _Clock:
    """Measures the rate of steps of `size` images or rows, without the first ones, in which libraries autotune."""

    def __init__(self, device: torch.device, size: int):
        self._device, self._size = device, size
        self._step = -10 if device.type == "cuda" else -1
        self._rates: list[float] = []

    @property
    def rate(self) -> float:
        """Images or rows per second: the median of the windows."""
        return statistics.median(self._rates)

    def tick(self) -> None:
        """Must be called before each step. Raises _Measured after SECONDS, with at least one step measured."""
        if self._step == 0:
            self._begun = self._started = self._now()
            self._first = 0
        elif self._step > 0 and time.perf_counter() - self._started > SECONDS / WINDOWS:
            now = self._now()
            self._rates.append((self._step - self._first) * self._size / (now - self._started))
            if now - self._begun > SECONDS:
                raise _Measured
            self._started, self._first = now, self._step
        self._step += 1

    def _now(self) -> float:
        """Returns the time in seconds after the device has finished all steps."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _EndlessFaces(Faces):
    """A training set of one endless epoch, which repeats one batch, or draws rows if the columns hold more."""

    def __init__(self, cfg: Config, columns: dict[str, np.ndarray], clock: _Clock):
        self.cfg, self.flip, self._clock = cfg, True, clock
        self.sources, self.identities = {}, ()
        self.columns = {name: Column((values,)) for name, values in columns.items()}
        self.rows = np.arange(len(next(iter(columns.values()))))

    def __len__(self) -> int:
        return self.cfg.batch_size << 20

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        random, size = np.random.default_rng(0), self.cfg.batch_size
        for _ in itertools.count():
            self._clock.tick()
            rows = self.rows if len(self.rows) == size else random.choice(self.rows, size)
            yield rows, rows % 2 == 0


def training_rate(
    losses: Callable,
    kind: str,
    columns: dict[str, np.ndarray],
    cfg: Config,
    *modules: torch.nn.Module,
    measures: tuple[str, ...] = (),
    is_streamed: bool = False,
) -> float:
    """Measures the rows per second of training by `fit`, which is ended before it writes anything.

    `columns` hold the rows of one batch or more, by the parameters of `losses`; `measures` is that of `fit`. With
    `is_streamed` they are read from memory in every step, and not kept on the device.
    """
    if is_streamed:
        cfg = replace(cfg, device_cache_gb=0.0)
    else:
        # Without workers and with data on the device no batch is read ahead, so that the clock ticks once per step.
        cfg = replace(cfg, num_workers=0, device_cache_gb=1.0 if device_of(cfg).type == "cuda" else 0.0)
    clock = _Clock(device_of(cfg), cfg.batch_size)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Measured):
        faces, run_folder = _EndlessFaces(cfg, columns, clock), Path(folder) / "measured"
        fit(losses, faces, run_folder, cfg, *modules, kind=kind, measures=measures)
    return clock.rate


def teacher_rate(network: str, cfg: Config, classes: int, streamed: int = 0) -> float:
    """Measures the images per second of training a teacher on one batch on the device, or on `streamed` images."""
    random, count = np.random.default_rng(0), streamed or cfg.batch_size
    images = random.integers(0, 256, (count, 112, 112, 3), np.uint8)
    columns: dict[str, np.ndarray] = {"image": images, "label": random.integers(0, classes, count)}
    backbone, header = build_backbone(network, cfg.embedding_size), ElasticArcFace(cfg.embedding_size, classes)

    def losses(image, label):
        return {"margin": header.loss(F.normalize(backbone(image)), label)}

    return training_rate(losses, "teacher", columns, cfg, backbone, header, is_streamed=streamed > 0)


def adaptor_rate(cfg: Config, classes: int) -> float:
    """Measures the rows per second of training the SL adaptor."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(cfg.batch_size, len(cfg.teachers) * cfg.embedding_size)).astype(np.float32)
    columns: dict[str, np.ndarray] = {"embedding": rows, "label": random.integers(0, classes, cfg.batch_size)}
    adaptor, header = build_adaptor("SL", cfg), ElasticArcFace(cfg.embedding_size, classes)

    def losses(embedding, label):
        return {"eaf": header.loss(F.normalize(adaptor(embedding)), label)}

    return training_rate(losses, "SL", columns, cfg, adaptor, header)


def inference_rate(network: str, cfg: Config) -> float:
    """Measures the images per second of embedding; on a CPU in small batches, which take less time."""
    size = cfg.infer_batch_size if device_of(cfg).type == "cuda" else 32
    cfg, backbone = replace(cfg, num_workers=0, infer_batch_size=size), build_backbone(network, cfg.embedding_size)
    images = np.random.default_rng(0).integers(0, 256, (size, 112, 112, 3), np.uint8)
    clock = _Clock(device_of(cfg), size)

    def receive(rows: range, result: np.ndarray) -> None:
        clock.tick()

    def embedding(image):
        return F.normalize(backbone(image))

    with contextlib.suppress(_Measured):
        columns, parts = {"image": Column((images,))}, [range(size)] * (1 << 16)
        infer(embedding, backbone, columns, cfg, "measure", parts, receive)
    return clock.rate
