"""Steps that are launched at once: on a GPU a step without images is over before Python has launched its kernels."""

from collections.abc import Callable

import torch

Columns = dict[str, torch.Tensor]


class Replayed:
    """A step of training that is captured when it is first taken, and replayed from then on.

    `step(batch)` works on `tensors()` in place, all that it changes, and depends on nothing else that changes but the
    generators' seed: a learning rate, for one, is captured with it, until `forget` is called. All batches have the same
    shapes.

    The first step is taken twice, plainly and replayed. Where the two differ by more than rounding, or where capturing
    fails, that is said and every step is taken plainly. A step that makes new tensors, as an optimizer's first one
    does, is taken plainly and not captured.
    """

    def __init__(self, step: Callable[[Columns], None], tensors: Callable[[], list[torch.Tensor]]):
        self._step, self._tensors = step, tensors
        self._inputs: Columns = {}
        self._replay: Callable[[], None] | None = None
        self._plainly = False

    def forget(self) -> None:
        """The next step is captured anew."""
        self._replay = None

    def __call__(self, batch: Columns, seed: int) -> None:
        if self._replay:
            for name, value in batch.items():
                self._inputs[name].copy_(value)
            torch.manual_seed(seed)
            self._replay()
        elif self._plainly:
            self._take(batch, seed)
        else:
            self._capture(batch, seed)

    def _take(self, batch: Columns, seed: int) -> None:
        torch.manual_seed(seed)
        self._step(batch)

    def _capture(self, batch: Columns, seed: int) -> None:
        before = [value.clone() for value in self._tensors()]
        self._take(batch, seed)
        if len(self._tensors()) != len(before):
            return
        plainly = [value.clone() for value in self._tensors()]
        try:
            self._inputs = {name: value.clone() for name, value in batch.items()}
            replay = graph_of(lambda: self._step(self._inputs))
            self._set(before)
            torch.manual_seed(seed)
            replay()
            if all(map(_close, self._tensors(), plainly, before)):
                self._replay = replay
                return
            reason = "it gave other numbers"
        except RuntimeError as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"The step could not be captured ({reason}): its kernels are launched one by one, which is slower.")
        self._plainly = True
        self._set(plainly)

    def _set(self, values: list[torch.Tensor]) -> None:
        for tensor, value in zip(self._tensors(), values, strict=True):
            tensor.copy_(value)


def _close(one: torch.Tensor, other: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether two results of a step are one but for rounding, which is little against what the step has changed."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    changed = float((other - before).abs().nan_to_num(0, 0).max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-5, atol=0.01 * changed, equal_nan=True)


def graph_of(function: Callable[[], None]) -> Callable[[], None]:
    """The kernels that `function` launches, as one CUDA graph. It is called twice before, as capturing requires."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            function()
            function()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads, those of the reader, may take pinned memory meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            function()
    except RuntimeError:
        torch.cuda.set_stream(current)  # a capture that fails may leave its own
        torch.cuda.synchronize()
        raise
    return graph.replay
