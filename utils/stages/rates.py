"""How fast this machine trains and applies the networks of the paper: measured, or derived from one given rate."""

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
from utils.losses import ElasticArcFace, margin_loss
from utils.process import setup
from utils.training.engine import fit, infer

TRAIN, INFER, ADAPT = "training", "inference", "training of adaptors"
"""Images a network is trained on, images that it embeds, rows of embeddings that an adaptor is trained on."""

Rates = dict[tuple[str, str], float]
"""Images (or rows) per second by kind of work and name of the network; the adaptor's network is ""."""

INFERRED_PER_TRAINED = {"fp32": 3.7, "tf32": 1.3, "bf16": 1.05}
"""Images embedded per image trained in each precision, of iresnet34 on an H100: inference is always in fp32."""

ROWS_PER_TRAINED = {"fp32": 110.0, "tf32": 40.0, "bf16": 31.0}
"""Rows on which the SL adaptor is trained per image on which iresnet34 is trained, likewise."""

SECONDS = 12.0  # of measuring, for each kind of work


def rates_from(rate: float, cfg: Config) -> Rates:
    """Rates that follow from the images per second at which the teachers' network is trained.

    The students' network is slower or faster by the ratio of the two networks' multiplications.
    """
    rates = {}
    for network in (cfg.network, cfg.student_network):
        own = rate * operations(cfg.network) / operations(network)
        rates |= {(TRAIN, network): own, (INFER, network): INFERRED_PER_TRAINED[cfg.precision] * own}
    return {**rates, (ADAPT, ""): ROWS_PER_TRAINED[cfg.precision] * rate}


def measured_rates(cfg: Config, classes: int) -> Rates:
    """Rates measured on random data with the device, precision and batch size of `cfg`, in about a minute.

    A step of training is that of `utils.training.engine.fit` with a header of so many `classes`. What is measured is
    discarded.
    """
    on_gpu = device_of(cfg).type == "cuda"
    # Data that lies on the device and batches that are read when they are needed: the clock is read between steps.
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
    """Multiplications and additions of one image's forward pass."""
    with torch.device("meta"):
        backbone = build_backbone(network).eval()
        with FlopCounterMode(display=False) as counter:
            backbone(torch.empty(1, 3, 112, 112))
    return counter.get_total_flops()


class _Enough(Exception):
    """Ends `fit` or `infer` from inside when it has been measured long enough."""


class _Clock:
    """Counts steps; the first ones are not measured, since libraries choose their algorithms then."""

    def __init__(self, device: torch.device, size: int):
        self._device, self._size, self._steps = device, size, 0
        self._warm = 10 if device.type == "cuda" else 1
        self.rate = 0.0  # images or rows per second

    def tick(self) -> None:
        """Is called before each step. Raises _Enough after SECONDS, with at least one step measured."""
        if self._steps == self._warm:
            self._started = self._now()
        elif self._steps > self._warm and time.perf_counter() - self._started > SECONDS:
            self.rate = (self._steps - self._warm) * self._size / (self._now() - self._started)
            raise _Enough
        self._steps += 1

    def _now(self) -> float:
        """When the device has taken the steps that it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _Endless(Faces):
    """A training set of random rows whose epoch has no end."""

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
        return {"margin": margin_loss(header, F.normalize(backbone(image)), label)}

    return _fitted(losses, "teacher", {"image": images}, cfg, classes, backbone, header)


def _adaptor(cfg: Config, classes: int) -> float:
    adaptor, header = build_adaptor("SL", cfg), ElasticArcFace(cfg.embedding_size, classes)
    width = len(cfg.teachers) * cfg.embedding_size
    rows = np.random.default_rng(0).normal(size=(cfg.batch_size, width)).astype(np.float32)

    def losses(embedding, label):
        return {"eaf": margin_loss(header, F.normalize(adaptor(embedding)), label)}

    return _fitted(losses, "SL", {"embedding": rows}, cfg, classes, adaptor, header)


def _fitted(losses: Callable, kind: str, columns: dict, cfg: Config, classes: int, *modules: torch.nn.Module) -> float:
    """The rate of steps of `fit`, which is left before it writes anything."""
    columns["label"] = np.random.default_rng(1).integers(0, classes, cfg.batch_size)
    clock = _Clock(device_of(cfg), cfg.batch_size)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Enough):
        fit(losses, _Endless(cfg, columns, clock), Path(folder) / "measured", cfg, *modules, kind=kind)
    return clock.rate


def _inference(network: str, cfg: Config) -> float:
    backbone, size = build_backbone(network, cfg.embedding_size), cfg.infer_batch_size
    images = np.random.default_rng(0).integers(0, 256, (size, 112, 112, 3), np.uint8)
    clock = _Clock(device_of(cfg), size)

    def receive(rows: range, result: np.ndarray) -> None:
        clock.tick()

    def embedding(image):
        return F.normalize(backbone(image))

    with contextlib.suppress(_Enough):
        columns, parts = {"image": Column((images,))}, [range(size)] * (1 << 16)
        infer(embedding, backbone, columns, cfg, "measure", parts, receive)
    return clock.rate
