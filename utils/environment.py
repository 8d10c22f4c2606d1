"""Versions, device and commit, on which the last bits of a run's numbers depend."""

import contextlib
import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from config.config import Config
from utils.distributed.world import world_size


def versions(cfg: Config) -> dict[str, str]:
    """Returns by name what the last bits of a run's numbers depend on, apart from its settings and data."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": metadata.version("torchvision"),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "device": torch.cuda.get_device_name() if device_of(cfg).type == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()),
        "processes": str(world_size()),
        "accumulate": str(cfg.accumulate),
        "compile": str(cfg.compile),
        "cudnn_benchmark": str(cfg.cudnn_benchmark),
        "infer_precision": computed_in(cfg.infer_precision, device_of(cfg)),
        "commit": _commit(),
    }


def numerics(cfg: Config) -> dict[str, str]:
    """Returns the part of `versions` on which the last bits of a network's output depend."""
    found = versions(cfg)
    return {name: found[name] for name in ("torch", "device", "threads", "cudnn_benchmark")}


def device_of(cfg: Config) -> torch.device:
    """Returns the device that `cfg.device` selects; the CPU if PyTorch finds no GPU."""
    return torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")


def computed_in(precision: str, device: torch.device) -> str:
    """Returns the precision in which `device` computes a network in `precision`: without TF32 units, tf32 is fp32."""
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "fp32" if precision == "tf32" and not has_tf32 else precision


def allow_tf32(allowed: bool) -> bool:
    """Allows or forbids TF32 in the convolutions of a GPU; returns whether it was allowed before.

    PyTorch has two APIs for it. The older one alone would leave `torch.backends.fp32_precision = "tf32"` in effect, and
    reading the older one raises an error where the two disagree, so both are set.
    """
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision == "tf32"
    cudnn.allow_tf32 = allowed
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32" if allowed else "ieee"
    return before


@functools.cache
def _commit() -> str:
    """Returns the git commit of this code, with -dirty if files differ from it; "unknown" outside a repository."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    here_only = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}  # no repository further up
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, env=here_only).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.cache
def _processor() -> str:
    """Returns the name of the CPU model."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
