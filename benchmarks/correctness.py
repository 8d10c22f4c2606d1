"""Compares what a device computes with float64 on the CPU, and a stopped run with a whole one, for `benchmarks.gpu`.

Errors are relative: the norm of the difference, divided by the norm of what is compared.
"""

import copy
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from backbones import build_adaptor, build_backbone
from config.config import Config
from config.registry import ADA_LOSSES
from utils.data.columns import Batch, Column, stream
from utils.data.faces import Faces
from utils.losses import build_header
from utils.process import Interrupted, setup
from utils.training.engine import fit
from utils.training.precision import mixed_precision

CLASSES = 50


def apart(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Returns the relative error of tensors, all together."""
    one, other = (torch.cat([value.detach().cpu().double().flatten() for value in values]) for values in (found, exact))
    return float((one - other).norm() / other.norm())


def network_errors(name: str, precision: str, device: torch.device) -> dict[str, float]:
    """Returns the errors of a network's features and of the gradient of its parameters, in training mode."""
    torch.manual_seed(0)
    network = build_backbone(name)
    reference = copy.deepcopy(network).double()
    network = network.to(device).to(memory_format=torch.channels_last)
    image, grad = torch.randn(4, 3, 112, 112), torch.randn(4, 512)
    exact = reference(image.double())
    exact.backward(grad.double())
    with mixed_precision(network, precision, device):
        found = network(image.to(device))
        found.backward(grad.to(device))
    # Some parameters are frozen and get no gradient.
    gradients = [[p.grad for p in module.parameters() if p.requires_grad] for module in (network, reference)]
    return {"features": apart([found], [exact]), "gradient": apart(*gradients)}


def header_errors(name: str, device: torch.device) -> dict[str, float]:
    """Returns the errors of a header's loss and gradients, and of AdaDistill's centres; margins do not vary."""
    torch.manual_seed(0)
    is_ada = name in ADA_LOSSES
    cfg = Config(ada_loss=name) if is_ada else Config(loss=name, std=0.0)
    header = build_header(name, CLASSES, cfg, name if is_ada else "teacher")
    reference = copy.deepcopy(header).double()
    student, teacher, label = torch.randn(64, 512), torch.randn(64, 512), torch.randint(CLASSES, (64,))

    def computed(header: nn.Module, dtype: torch.dtype, device: torch.device) -> list[list[torch.Tensor]]:
        inputs = [value.to(device, dtype) for value in ([student, teacher] if is_ada else [student])]
        inputs[0].requires_grad_()
        loss = header.loss(*inputs, label.to(device))
        gradients = torch.autograd.grad(loss, [inputs[0], *header.parameters()])
        return [[loss], [*gradients], [header.kernel]]

    exact = computed(reference, torch.float64, torch.device("cpu"))
    found = computed(header.to(device), torch.float32, device)
    names = ("loss", "gradients", "centres") if is_ada else ("loss", "gradients")
    return {what: apart(one, other) for what, one, other in zip(names, found, exact, strict=False)}


# Runs -----------------------------------------------------------------------------------------------------------------


class _Noise(Faces):
    """A training set of noise in memory. With `stop_at`, an epoch and a step, it sends this process SIGTERM there."""

    def __init__(self, cfg: Config, columns: dict[str, np.ndarray], stop_at: tuple[int, int] | None = None):
        self.cfg, self.flip, self._stop_at = cfg, True, stop_at
        self.sources, self.identities = {}, tuple(map(str, range(CLASSES)))
        self.columns = {name: Column((values,)) for name, values in columns.items()}
        self.rows = np.arange(len(columns["label"]))

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        for step, batch in enumerate(super().batches(epoch, first), first):
            if self._stop_at == (epoch, step):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def _run(kind: str, cfg: Config, std: float) -> tuple[list[nn.Module], Callable, dict[str, np.ndarray]]:
    """Returns the modules, the losses as a function of modules, and the columns of training `kind`, teacher or SL."""
    torch.manual_seed(0)
    network = build_backbone(cfg.network) if kind == "teacher" else build_adaptor(kind, cfg)
    header = build_header("ElasticArcFace", CLASSES, cfg, kind, std=std)
    random, count = np.random.default_rng(0), 4 * cfg.batch_size
    columns: dict[str, np.ndarray] = {"label": random.integers(0, CLASSES, count)}
    if kind == "teacher":
        columns["image"] = random.integers(0, 256, (count, 112, 112, 3), np.uint8)
    else:
        columns["embedding"] = random.normal(size=(count, len(cfg.teachers) * cfg.embedding_size)).astype(np.float32)

    def losses_of(network: nn.Module, header: nn.Module) -> Callable:
        def of_images(image, label):
            return {"margin": header.loss(F.normalize(network(image)), label)}

        def of_embeddings(embedding, label):
            return {"margin": header.loss(F.normalize(network(embedding)), label)}

        return of_images if kind == "teacher" else of_embeddings

    return [network, header], losses_of, columns


def run_error(kind: str, cfg: Config, folder: Path) -> float:
    """Returns the error of what one epoch of `fit` changes in the network, against a plain loop in float64."""
    setup(cfg)
    modules, losses_of, columns = _run(kind, cfg, std=0.0)
    start = [value.clone() for value in modules[0].parameters()]
    exact = [copy.deepcopy(module).double() for module in modules]
    faces, schedule = _Noise(cfg, columns), cfg.schedule(kind)
    parameters = [value for module in exact for value in module.parameters()]
    lr = schedule.lr(0, cfg.batch_size)
    optimizer = torch.optim.SGD(parameters, lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)
    for batch in stream(faces.columns, faces.batches(0, 0), torch.device("cpu"), 0):
        optimizer.zero_grad()
        losses = losses_of(*exact)(**{n: v.double() if v.is_floating_point() else v for n, v in batch.items()})
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(exact[0].parameters(), cfg.max_grad_norm)
        optimizer.step()
    fit(losses_of(*modules), faces, folder, cfg, *modules, kind=kind)
    changes = [
        [value.detach().cpu().double() - before for value, before in zip(module.parameters(), start, strict=True)]
        for module in (modules[0], exact[0])
    ]
    return apart(*changes)


def is_resumed_to_the_bit(kind: str, cfg: Config, folder: Path) -> bool:
    """Returns True if a run that is stopped within an epoch ends with the weights of a whole run."""
    setup(cfg)
    for name, stop_at in (("whole", None), ("stopped", (1, 2)), ("stopped", None)):
        modules, losses_of, columns = _run(kind, cfg, std=0.05)
        try:
            fit(losses_of(*modules), _Noise(cfg, columns, stop_at), folder / name, cfg, *modules, kind=kind)
        except Interrupted:
            if not stop_at:
                raise
    names = ("last_backbone.pth", "last_header.pth")
    return all((folder / "whole" / name).read_bytes() == (folder / "stopped" / name).read_bytes() for name in names)


def config(device: torch.device, batch_size: int, **settings) -> Config:
    """Returns the settings of the runs above."""
    return Config(device=device.type, batch_size=batch_size, num_workers=0, s=16.0, **settings)
