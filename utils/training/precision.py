"""The precision in which a network computes, and its compilation."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def arithmetic(network: nn.Module, precision: str, device: torch.device, compiled: bool = False) -> Iterator[None]:
    """Context in which the network computes in a precision, and gives fp32; nothing else is changed by it."""
    before, tf32 = network.__dict__.pop("forward", None), torch.backends.cudnn.allow_tf32
    plain = network.forward
    forward = plain

    def lowered(*inputs: torch.Tensor) -> torch.Tensor:
        nonlocal forward
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            try:
                return forward(*inputs).float()
            except RuntimeError as error:
                from torch._dynamo.exc import TorchDynamoException  # takes a second, which every script would wait for

                if not isinstance(error, TorchDynamoException):
                    raise
                print(f"compile: {(str(error) or 'it failed.').splitlines()[0]} Going on without.")
                forward = plain
                return forward(*inputs).float()

    try:
        torch.backends.cudnn.allow_tf32 = precision == "tf32"  # convolutions only: products of headers stay fp32
        if compiled:
            try:
                torch.compiler.reset()  # networks share their code: it is given up after some have been compiled
                forward = torch.compile(plain)
            except RuntimeError as error:  # a Python or a system for which there is no compiler
                print(f"compile: {error} Going on without.")
        if forward is not plain or precision == "bf16":
            network.forward = lowered
        yield
    finally:
        network.__dict__.pop("forward", None)
        if before:
            network.forward = before
        torch.backends.cudnn.allow_tf32 = tf32
