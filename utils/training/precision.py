"""How a network computes: in the precision set for training or inference, and compiled in training on request."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from tqdm import tqdm

from utils.environment import allow_tf32


@contextlib.contextmanager
def mixed_precision(network: nn.Module, precision: str, device: torch.device, training: bool = True) -> Iterator[None]:
    """Runs the forward pass of `network` in `precision`; its outputs are fp32.

    bf16 applies in training mode only, or with `training` False in eval mode only, so that the network can be verified
    in another precision while it is trained.

    bf16 is autocast in forward hooks, so it ends where the network ends: headers, losses and the optimizer stay in
    fp32. tf32 is allowed in convolutions only, so the matrix products of headers stay in fp32.
    """
    was_allowed, handles = allow_tf32(precision == "tf32"), []
    with contextlib.ExitStack() as autocast:

        def enter(module: nn.Module, _) -> None:
            if module.training == training:
                autocast.enter_context(torch.autocast(device.type, torch.bfloat16))

        def leave(module: nn.Module, _, output: torch.Tensor | None) -> torch.Tensor | None:
            autocast.close()
            return None if output is None else output.float()  # None: the forward pass has raised an error

        try:
            if precision == "bf16":
                # The compiler cannot trace a context that is entered in one hook and left in another.
                handles.append(network.register_forward_pre_hook(torch.compiler.disable(enter)))
                handles.append(network.register_forward_hook(torch.compiler.disable(leave), always_call=True))
            yield
        finally:
            allow_tf32(was_allowed)
            for handle in handles:
                handle.remove()


@contextlib.contextmanager
def compiled(network: nn.Module) -> Iterator[None]:
    """Compiles `network` in this context; if there is no compiler, prints one line and leaves it as it is.

    It is compiled for the shapes of a training batch. What runs in eval mode is not compiled (see `uncompiled`).
    """
    try:
        torch.compiler.reset()  # PyTorch stops recompiling code after a few networks of the same class
        network.compile(dynamic=False)
    except RuntimeError as error:  # a Python version or a system for which there is no compiler
        _run_eagerly(network, error)
    try:
        yield
    finally:
        network._compiled_call_impl = None  # there is no public inverse of nn.Module.compile


def eagerly_if_compiling_fails(network: nn.Module, losses: Callable) -> Callable:
    """Returns `losses`; if compiling `network` fails in a call, the call is repeated without compilation."""
    from torch._dynamo.exc import TorchDynamoException  # importing it takes a second, so only where something compiles

    @functools.wraps(losses)  # `fit` reads the names of its parameters
    def repeated(**batch: torch.Tensor) -> dict[str, torch.Tensor]:
        try:
            return losses(**batch)
        except TorchDynamoException as error:
            _run_eagerly(network, error)
            return losses(**batch)

    return repeated


def timing_compilation(network: nn.Module, take_step: Callable) -> Callable:
    """Returns `take_step`; its first call prints how long it took, if it has compiled `network`."""
    is_first = True

    def timed(batch: dict[str, torch.Tensor], seed: int) -> None:
        nonlocal is_first
        started = time.monotonic()
        take_step(batch, seed)
        if is_first and network._compiled_call_impl is not None:
            tqdm.write(
                f"compile: the first step, in which the network is compiled, took {time.monotonic() - started:.0f} s."
            )
        is_first = False

    return timed


def _run_eagerly(network: nn.Module, error: Exception) -> None:
    network._compiled_call_impl = None
    print(f"compile: {(str(error) or 'it failed.').splitlines()[0]} Training without compilation.")


def uncompiled(network: nn.Module) -> contextlib.AbstractContextManager:
    """Returns a context that runs `network` without compilation, also inside `compiled`."""
    # Setting the stance imports the compiler, which takes a second.
    return contextlib.nullcontext() if network._compiled_call_impl is None else torch.compiler.set_stance("force_eager")
