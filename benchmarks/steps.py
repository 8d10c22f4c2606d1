"""Training steps for `benchmarks.stages`: as in the published code, ours, and the bare kernels that bound them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from backbones import build_adaptor, build_backbone
from benchmarks.measuring import compiling, rates
from benchmarks.networks import CLASSES
from config.config import Config
from utils.environment import device_of
from utils.losses import ElasticArcFace
from utils.stages.rates import training_rate
from utils.training.cuda_graph import capture
from utils.training.precision import mixed_precision

DEVICE = device_of(Config())


class PlainElasticArcFace(nn.Module):
    """Implements the header as published: normalised kernel copy, dense one-hot margins, arc cosine of all entries."""

    def __init__(self, dimensions: int, classes: int):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(dimensions, classes).normal_(0, 0.01))

    def forward(self, embeddings: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        cosine = (F.normalize(embeddings) @ F.normalize(self.kernel, dim=0)).clamp(-1, 1)
        labelled = torch.where(label != -1)[0]
        margins = torch.normal(0.5, 0.0125, (len(labelled), 1), device=label.device)
        hot = torch.zeros(len(labelled), cosine.shape[1], device=label.device).scatter_(
            1, label[labelled].unsqueeze(1), margins
        )
        return cosine.acos().index_add(0, labelled, hot).cos() * 64.0


def plain_rate(
    losses: Callable, modules: list[nn.Module], columns: dict[str, np.ndarray], device: torch.device
) -> float:
    """Returns rows per second of a step with PyTorch's defaults: the loss is read after every step.

    `columns` hold one batch, by the parameters of `losses`.
    """
    batch = {name: torch.from_numpy(column) for name, column in columns.items()}
    if "image" in batch:
        batch["image"] = (batch["image"].permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()
    parameters = [parameter for module in modules for parameter in module.to(device).parameters()]
    optimizer = torch.optim.SGD(parameters, 0.01, 0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        total = sum(losses(**{name: value.to(device) for name, value in batch.items()}).values())
        total.backward()
        nn.utils.clip_grad_norm_(modules[0].parameters(), 5.0)
        optimizer.step()
        total.item()

    return rates(len(batch["label"]), step)[0]


# Adaptor --------------------------------------------------------------------------------------------------------------


def plain_adaptor(cfg: Config) -> float:
    """Returns rows per second of the SL adaptor's step with PyTorch's defaults and the published header."""
    random = np.random.default_rng(0)
    adaptor, header = build_adaptor("SL", cfg), PlainElasticArcFace(512, CLASSES)
    rows = random.normal(size=(cfg.batch_size, 2048)).astype(np.float32)
    columns = {"embedding": rows, "label": random.integers(0, CLASSES, cfg.batch_size)}

    def losses(embedding, label):
        return {"eaf": F.cross_entropy(header(F.normalize(adaptor(embedding)), label), label)}

    return plain_rate(losses, [adaptor, header], columns, device_of(cfg))


def bare_adaptor(cfg: Config) -> float:
    """Returns rows per second of the matrix products of a step and one pass over header, gradient and momentum."""
    size, device = cfg.batch_size, device_of(cfg)
    inputs, kernel, weight, grad = (
        torch.randn(shape, device=device) for shape in ((size, 2048), (512, CLASSES), (512, 2048), (size, CLASSES))
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


# Networks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Describes a network's training step with the losses of teachers (EAF), of a-KD (KD) or of EAF-KD (both)."""

    stage: str
    network: str
    batch: int
    has_header: bool = True
    has_target: bool = False
    compile: bool = False
    classes: int = 7000
    device: torch.device = DEVICE  # `ours` takes that of its settings

    def modules(self, header: type) -> list[nn.Module]:
        torch.manual_seed(0)
        return [build_backbone(self.network), *([header(512, self.classes)] if self.has_header else [])]

    def losses(self, backbone: nn.Module, header: nn.Module | None = None) -> Callable:
        def losses(image, label, target):
            embedding = F.normalize(backbone(image))
            eaf = {"eaf": F.cross_entropy(header(embedding, label), label)} if header else {}
            return eaf | ({"kd": 10_000 * F.mse_loss(embedding, target)} if self.has_target else {})

        return losses

    def columns(self) -> dict[str, np.ndarray]:
        random = np.random.default_rng(0)
        return {
            "image": random.integers(0, 256, (self.batch, 112, 112, 3), np.uint8),
            "label": random.integers(0, self.classes, self.batch),
            "target": random.normal(size=(self.batch, 512)).astype(np.float32),
        }

    def plain(self, precision: str = "tf32") -> float:
        """Returns images per second of the published way; the default is that of PyTorch, tf32 in convolutions."""
        modules = self.modules(PlainElasticArcFace)
        with mixed_precision(modules[0], precision, self.device):
            return plain_rate(self.losses(*modules), modules, self.columns(), self.device)

    def ours(self, cfg: Config) -> float:
        cfg = replace(cfg, batch_size=self.batch, compile=self.compile)
        modules = self.modules(ElasticArcFace)
        with compiling(self.compile, self.stage):
            return training_rate(self.losses(*modules), "EAF-KD", self.columns(), cfg, *modules)

    def bare(
        self,
        layout: torch.memory_format = torch.channels_last,
        precision: str = "tf32",
        is_captured: bool = False,
    ) -> float:
        """Returns images per second of forward and backward pass of the network, on one batch on the device.

        With `is_captured`, they are replayed as one CUDA graph.
        """
        backbone = build_backbone(self.network).to(self.device, memory_format=layout)
        image = torch.randn(self.batch, 3, 112, 112).to(self.device, memory_format=layout)
        grad = torch.randn(self.batch, 512, device=self.device)

        def step() -> None:
            backbone.zero_grad()
            backbone(image).backward(grad)

        with mixed_precision(backbone, precision, self.device):
            return rates(self.batch, capture(step) if is_captured else step)[0]


STEPS = (
    Step("teacher step, iresnet34", "iresnet34", 16),
    Step("teacher step, iresnet_tiny", "iresnet_tiny", 128),
    Step("teacher step, iresnet_tiny, compiled", "iresnet_tiny", 128, compile=True),
    Step("a-KD step, iresnet_tiny", "iresnet_tiny", 128, has_header=False, has_target=True),
    Step("EAF-KD step, iresnet_tiny", "iresnet_tiny", 128, has_target=True),
)
