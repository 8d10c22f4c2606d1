"""Training and inference rates of the paper's networks on this machine: measured, or derived from one given rate."""

import contextlib
import functools
import itertools
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

INFERRED_PER_TRAINED = {"fp32": 3.7, "tf32": 1.3, "bf16": 1.05}
"""Images embedded per image trained in each precision, of iresnet34 on an H100: inference is always in fp32."""

ROWS_PER_TRAINED = {"fp32": 110.0, "tf32": 40.0, "bf16": 31.0}
"""Rows on which the SL adaptor is trained per image on which iresnet34 is trained, measured likewise."""

SECONDS = 12.0  # duration of the measurement for each kind of work and network


def rates_from(rate: float, cfg: Config) -> Rates:
    """Derives all rates from `rate`, the images per second at which the teachers' network is trained.

    The rates of the students' network are scaled by the ratio of the two networks' `operations`.
    """
    rates = {}
    for network in (cfg.network, cfg.student_network):
        own = rate * operations(cfg.network) / operations(network)
        rates |= {(TRAIN, network): own, (INFER, network): INFERRED_PER_TRAINED[cfg.precision] * own}
    return {**rates, (ADAPT, ""): ROWS_PER_TRAINED[cfg.precision] * rate}


def measured_rates(cfg: Config, classes: int) -> Rates:
    """Measures all rates on random data with the device, precision and batch size of `cfg`, in about a minute.

    Training steps are those of `utils.training.engine.fit`, with a header of `classes` identities. The trained weights
    are discarded.
    """
    on_gpu = device_of(cfg).type == "cuda"
    # Without workers and with data on the device no batch is read ahead, so that the clock ticks once per step.
    cfg = replace(cfg, num_workers=0, device_cache_gb=1.0 if on_gpu else 0.0)
    setup(cfg)
    rates = {}
    for network in dict.fromkeys((cfg.network, cfg.student_network)):
        rates[TRAIN, network] = _training(network, cfg, classes)
        rates[INFER, network] = _inference(network, cfg if on_gpu else replace(cfg, infer_batch_size=32))
    rates[ADAPT, ""] = _adaptor(cfg, classes)
    return rates


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
        self._device, self._size, self._steps = device, size, 0
        self._warm = 10 if device.type == "cuda" else 1
        self.rate = 0.0  # images or rows per second

    def tick(self) -> None:
        """Must be called before each step. Raises _Measured after SECONDS, with at least one step measured."""
        if self._steps == self._warm:
            self._started = self._now()
        elif self._steps > self._warm and time.perf_counter() - self._started > SECONDS:
            self.rate = (self._steps - self._warm) * self._size / (self._now() - self._started)
            raise _Measured
        self._steps += 1

    def _now(self) -> float:
        """Returns the time in seconds after the device has finished all steps."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _EndlessFaces(Faces):
    """A training set that repeats one batch of random rows in an endless epoch."""

    def __init__(self, cfg: Config, columns: dict[str, np.ndarray], clock: _Clock):
        self.cfg, self.flip, self._clock = cfg, True, clock
        self.sources, self.identities = {}, ()
        self.columns = {name: Column((values,)) for name, values in columns.items()}
        self.rows = np.arange(len(columns["label"]))

    def __len__(self) -> int:
        return self.cfg.batch_size << 20

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        for _ in itertools.count():
            self._clock.tick()
            yield self.rows, self.rows % 2 == 0


def _training(network: str, cfg: Config, classes: int) -> float:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (cfg.batch_size, 112, 112, 3), np.uint8)
    backbone, header = build_backbone(network, cfg.embedding_size), ElasticArcFace(cfg.embedding_size, classes)

    def losses(image, label):
        return {"margin": header.loss(F.normalize(backbone(image)), label)}

    return _rate_of_fit(losses, "teacher", {"image": images}, cfg, classes, backbone, header)


def _adaptor(cfg: Config, classes: int) -> float:
    adaptor, header = build_adaptor("SL", cfg), ElasticArcFace(cfg.embedding_size, classes)
    width = len(cfg.teachers) * cfg.embedding_size
    rows = np.random.default_rng(0).normal(size=(cfg.batch_size, width)).astype(np.float32)

    def losses(embedding, label):
        return {"eaf": header.loss(F.normalize(adaptor(embedding)), label)}

    return _rate_of_fit(losses, "SL", {"embedding": rows}, cfg, classes, adaptor, header)


def _rate_of_fit(
    losses: Callable, kind: str, columns: dict, cfg: Config, classes: int, *modules: torch.nn.Module
) -> float:
    """Returns the rate of training by `fit`, which is ended before it writes anything."""
    columns["label"] = np.random.default_rng(1).integers(0, classes, cfg.batch_size)
    clock = _Clock(device_of(cfg), cfg.batch_size)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Measured):
        fit(losses, _EndlessFaces(cfg, columns, clock), Path(folder) / "measured", cfg, *modules, kind=kind)
    return clock.rate


def _inference(network: str, cfg: Config) -> float:
    backbone, size = build_backbone(network, cfg.embedding_size), cfg.infer_batch_size
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
