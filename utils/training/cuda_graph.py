"""Training steps as CUDA graphs: a GPU waits while Python launches the hundreds of kernels of a step one by one."""

import functools
from collections.abc import Callable

import torch

from utils.errors import InputError

Columns = dict[str, torch.Tensor]


class CapturedStep:
    """A training step that is captured in its first call and replayed in later ones.

    `step(batch)` may change only `tensors()`, in place, and may depend on nothing else that changes, except the seed of
    the generators. Other values, such as the learning rate, are captured with it until `reset` is called. All batches
    have the same shapes.

    The first step is taken twice, eagerly and as a replay. If the results differ by more than rounding, one line is
    printed and all steps are eager. A step that makes new tensors, such as the first one of an optimizer, is eager and
    not captured. Raises InputError if capturing itself fails: in PyTorch before 2.14 neither the generator nor the
    allocator recovers, so the steps that follow could not be trusted.
    """

    def __init__(self, step: Callable[[Columns], None], tensors: Callable[[], list[torch.Tensor]]):
        self._step, self._tensors = step, tensors
        self._inputs: Columns = {}
        self._replay: Callable[[], None] | None = None
        self._is_eager = False

    def reset(self) -> None:
        """Makes the next step be captured anew."""
        self._replay = None

    def __call__(self, batch: Columns, seed: int) -> None:
        if self._replay:
            for name, value in batch.items():
                self._inputs[name].copy_(value)
            torch.manual_seed(seed)
            self._replay()
        elif self._is_eager:
            self._take(batch, seed)
        else:
            self._capture(batch, seed)

    def _take(self, batch: Columns, seed: int) -> None:
        torch.manual_seed(seed)
        self._step(batch)

    def _capture(self, batch: Columns, seed: int) -> None:
        """Takes the step eagerly, then captures it and takes it again from the same state as a replay."""
        before = [value.clone() for value in self._tensors()]
        self._take(batch, seed)
        if len(self._tensors()) != len(before):
            return
        eager = [value.clone() for value in self._tensors()]
        self._inputs = {name: value.clone() for name, value in batch.items()}
        try:
            replay = capture(lambda: self._step(self._inputs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise InputError(
                f"The training step could not be captured as a CUDA graph ({reason}): set capture to False."
            ) from error
        self._set(before)
        torch.manual_seed(seed)
        replay()
        if all(map(_close, self._tensors(), eager, before)):
            self._replay = replay
            return
        print("The captured step gives other numbers: its kernels are launched one by one, which is slower.")
        self._is_eager = True
        self._set(eager)

    def _set(self, values: list[torch.Tensor]) -> None:
        for tensor, value in zip(self._tensors(), values, strict=True):
            tensor.copy_(value)


def _close(one: torch.Tensor, other: torch.Tensor, before: torch.Tensor) -> bool:
    """Returns True if two results of a step differ by at most 1 % of its largest change from `before`."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    changed = float((other - before).abs().nan_to_num(0, 0).max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-5, atol=0.01 * changed, equal_nan=True)


def capture(function: Callable[[], None]) -> Callable[[], None]:
    """Captures the kernels that `function` launches as a CUDA graph and returns a function that replays them.

    Calls `function` twice before it captures, as torch.cuda.graph requires. Raises RuntimeError if capturing fails.
    """
    current, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
    side.wait_stream(current)
    with torch.cuda.stream(side):
        function()
        function()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # The reader's threads may allocate pinned memory while this thread captures.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        function()
    return graph.replay


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Returns the stream on which steps are captured on a device: cuBLAS keeps 32 MiB for each stream it has seen."""
    return torch.cuda.Stream(device)
