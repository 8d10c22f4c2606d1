"""Sums the time of a step's kernels by kind, for `benchmarks.gpu`."""

import re
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import wait

KINDS = (
    ("compiled", r"triton"),
    ("normalisation", r"batch_?norm|bn_"),
    ("PReLU", r"prelu"),
    ("convolution", r"conv|cudnn|fprop|dgrad|wgrad"),
    ("matrix product", r"gemm|gemv|nvjet|cutlass|addmm|::mm|dot"),
    ("optimizer and clipping", r"multi_tensor|sgd|foreach|norm"),
    ("addition", r"add"),
    ("copy, cast and fill", r"copy|memcpy|memset|fill|zero"),
)
"""A kernel is of the first kind whose expression its name contains, case ignored."""
STEPS, LONGEST = 5, 15


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def profiled(step: Callable[[], object], device: torch.device) -> dict[str, list]:
    """Returns the kernels of a step: `kinds` and the longest `kernels`, each as [name, milliseconds, launches].

    On a CPU, the operators instead of the kernels.
    """
    step()
    wait()
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        for _ in range(STEPS):
            step()
        wait()
    kernels, kinds = [], {}
    for event in found.key_averages():
        # A compiled region is reported as a kernel too, with the time of its kernels.
        is_region = getattr(event, "is_user_annotation", False)
        if not is_region and event.device_type == (DeviceType.CUDA if on_gpu else DeviceType.CPU):
            time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            kernels.append([event.key[:100], time / 1e3 / STEPS, event.count / STEPS])
    for name, time, launches in kernels:
        before = kinds.get(kind_of(name), (0.0, 0.0))
        kinds[kind_of(name)] = before[0] + time, before[1] + launches

    def longest_first(rows: list[list]) -> list[list]:
        return sorted(rows, key=lambda row: -row[1])

    return {
        "kinds": longest_first([[kind, *numbers] for kind, numbers in kinds.items()]),
        "kernels": longest_first(kernels)[:LONGEST],
    }
