"""The state of a training run, which a checkpoint holds: networks, optimizer, position, losses and log."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from config.config import Config
from config.published import Schedule
from utils.distributed.collectives import averaged, from_first, on_first, wait_for_all
from utils.distributed.world import is_first, total_batch, world_size
from utils.errors import InputError
from utils.losses.sharded import ShardedHeader, dense_state_dict
from utils.training.checkpoint import Run, problem_with
from utils.training.cuda_graph import CapturedStep

Losses = Callable[..., dict[str, torch.Tensor]]
"""Returns the losses and measures of a batch by name, as scalars.

Its parameters are names of columns (see utils.data.columns), of which it gets a batch. A parameter `repeats` gets an
int: no label occurs more often in any batch of all ranks in this epoch. If a loss counted that itself, the host would
wait for the GPU. Losses are summed, measures are only logged.
"""

GRADIENT, HEADER_GRADIENT = "gradient of the network", "gradient of the header"
GRADIENTS = (GRADIENT, HEADER_GRADIENT)
"""Names of the gradient norms, which are recorded beside the losses so that one that is not finite is noticed."""
NUMBERS = 8  # the most losses, measures and gradient norms of a step


class Progress:
    """A run's networks and optimizer, position, sums of the losses over the epoch, log and best score.

    `measures` are the names that the loss function returns to be logged only. Layers in `frozen` stay in eval mode. A
    step averages the gradients of `accumulate` batches. All ranks call the methods.
    """

    def __init__(
        self,
        run: Run,
        backbone: nn.Module,
        header: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        measures: tuple[str, ...] = (),
        frozen: Sequence[nn.Module] = (),
        projection: nn.Module | None = None,
        accumulate: int = 1,
    ):
        self.run, self.backbone, self.optimizer, self.schedule = run, backbone, optimizer, schedule
        self.header: Any = header
        self.projection = projection
        self.measures, self.frozen, self.accumulate = measures, frozen, accumulate
        self.epoch = self.step = 0
        self.best = -math.inf
        self.names: list[str] = []  # of losses, measures and gradient norms, in the order of `sums`
        self.log: list[dict] = []
        self.weights: dict[str, str] = {}  # SHA-256 of the best and last weights by file name
        self.saved_at = time.monotonic()
        self.on_epoch_end: Callable[[dict], None] | None = None  # called with the log entry of every epoch
        self._check = FiniteCheck(next(backbone.parameters()).device)
        self.sums = torch.zeros_like(self._check.values)  # over the steps of the epoch
        # As torch.amp.GradScaler does: the fused kernel skips the update where this is 1, without synchronising a GPU.
        optimizer.found_inf = self._check.failed  # type: ignore[attr-defined]

    @property
    def modules(self) -> list[nn.Module]:
        """The networks that are trained: the backbone, and the header and the projection if there are any."""
        return [module for module in (self.backbone, self.header, self.projection) if module is not None]

    @property
    def lr(self) -> float:
        """The learning rate at the end of this epoch."""
        return self.schedule.lr(self.epoch, total_batch(self.run.cfg))

    def set_lr(self, done: float) -> None:
        """Sets the learning rate of a step; `done` is the share of the epoch's steps up to it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(self.epoch, total_batch(self.run.cfg), done)

    # Resuming -----------------------------------------------------------------------------------------------------

    def restore(self, state: dict | None) -> None:
        """Loads the state of a checkpoint, given on rank 0 and None elsewhere, on all ranks.

        Raises InputError if it was written by another version, or if the weights that the next stage reads are lost.
        """

        def load() -> tuple:
            try:
                self._load(state)
            except (KeyError, RuntimeError, ValueError) as error:
                raise InputError(
                    f"{self.run.folder} holds a checkpoint of another version ({error}): move it away to train anew."
                ) from error
            if self.log:
                self._repair_weights(state)
            return self.epoch, self.step, self.best, self.names, self.log, self.weights

        self.epoch, self.step, self.best, self.names, self.log, self.weights = on_first(load)
        if world_size() > 1:
            self._broadcast(state)

    def _load(self, state: dict) -> None:
        """Loads a checkpoint on rank 0, without the kernel of a sharded header."""
        self.epoch, self.step, self.best, self.log = state["epoch"], state["step"], state["best"], state["log"]
        self.weights = state["weights"]
        self.names = list(state["sums"])
        for k, total in enumerate(state["sums"].values()):
            self.sums[k] = total
        self.backbone.load_state_dict(state["backbone"])
        if self.projection is not None:
            self.projection.load_state_dict(state["projection"])
        optimizer = state["optimizer"]
        if isinstance(self.header, ShardedHeader):
            self.header.require_fit(state["header"])
            replicated = {k: own for k, own in optimizer["state"].items() if k != self._sharded_index}
            optimizer = {**optimizer, "state": replicated}  # the whole momentum may not fit on one device
        elif self.header is not None:
            self.header.load_state_dict(state["header"])
        self.optimizer.load_state_dict(optimizer)

    def _broadcast(self, state: dict | None) -> None:
        """Broadcasts what rank 0 has loaded, and scatters the kernel and momentum of a sharded header."""
        projected = {} if self.projection is None else self.projection.state_dict()
        for value in [self.sums, *self.backbone.state_dict().values(), *projected.values()]:
            from_first(value)
        if isinstance(self.header, ShardedHeader):
            self.header.load_dense_state_dict(state and state["header"])
        elif self.header is not None:
            for value in self.header.state_dict().values():
                from_first(value)
        saved = state["optimizer"]["state"] if state else {}
        for k in on_first(lambda: [*saved]):
            parameter = self._parameters[k]
            momentum = self.optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
            if k == self._sharded_index:
                self.header.scatter(saved[k]["momentum_buffer"] if saved else None, momentum)
            else:
                from_first(momentum)

    def _repair_weights(self, state: dict) -> None:
        """Checks the files of weights, and writes those again that are lost or newer, if the checkpoint holds them.

        Lost best weights of an earlier epoch are replaced by the best of the epochs that follow. Raises InputError if
        none follows and `cfg.weights` selects the lost ones.
        """
        for which in ("last", "best"):
            problems = [
                problem
                for name, digest in self.weights.items()
                if name.startswith(which) and (problem := problem_with(self.run.folder / name, digest))
            ]
            if not problems:
                continue
            if self.step == 0 and (which == "last" or self.log[-1]["best"]):
                self.weights |= self.run.save_weights(which, state["backbone"], state["header"])
                print(f"{problems[0]}: written anew from the checkpoint.")
            elif which == "best" and self.epoch < self.schedule.epochs:
                # If the file is newer than the checkpoint, its epoch is trained again, to the same score.
                self.best = -math.inf
                print(f"{problems[0]}: the best of the epochs to come takes its place.")
            elif which == self.run.cfg.weights:
                raise InputError(f"{problems[0]}: set weights to last, or move {self.run.folder} away to train anew.")

    # Steps --------------------------------------------------------------------------------------------------------

    def start_epoch(self) -> None:
        """Puts the networks in training mode, frozen layers in eval mode."""
        for module in self.modules:
            module.train()
        for layer in self.frozen:
            layer.eval()
        self._check.start(self.step)

    def stepper(self, losses: Losses, max_grad_norm: float, captured: bool) -> Callable[[dict, int], None]:
        """Returns a function that takes one step, given a batch and a seed; with `captured`, as a CUDA graph.

        Steps of warm-up epochs are not captured: each has another learning rate, which would be part of the graph.
        """
        count = self.accumulate

        def take_step(batch: dict[str, torch.Tensor]) -> None:
            parts = ({name: value.chunk(count)[k] for name, value in batch.items()} for k in range(count))
            self._take_step((losses(**part) for part in parts), max_grad_norm)

        # torch.manual_seed also seeds GPUs; where none is in use, it formats a stack trace for each of them.
        is_on_gpu = self._check.failed.is_cuda
        seed_generators = torch.manual_seed if is_on_gpu else torch.default_generator.manual_seed

        # No attribute: a cycle of references would keep the memory of the CUDA graph until the garbage collector runs,
        # while the next network is trained.
        step, epoch = CapturedStep(take_step, self._tensors) if captured else None, self.epoch

        def seeded_step(batch: dict[str, torch.Tensor], seed: int) -> None:
            nonlocal epoch
            if step and self.epoch >= self.schedule.warmup:
                if epoch < self.epoch:
                    step.reset()  # the learning rate is part of the CUDA graph
                    epoch = self.epoch
                step(batch, seed)
            else:
                seed_generators(seed)
                take_step(batch)

        return seeded_step

    def _take_step(self, batches: Iterable[dict[str, torch.Tensor]], max_grad_norm: float) -> None:
        """Takes one step of the optimizer; if a number is not finite, no weight changes in this or any later step.

        `batches` are the losses and measures of `accumulate` batches, each computed after the one before was used. What
        `losses` itself has changed, such as batch statistics or class centres, is then wrong, but never saved: `save`
        raises first. All that this method changes is in `_tensors`, and is changed in place.
        """
        self.optimizer.zero_grad()
        values: dict[str, torch.Tensor] = {}
        for named in batches:
            (self._total_loss(named) / self.accumulate).backward()
            for name, value in named.items():
                values[name] = values.get(name, 0) + value.detach() / self.accumulate
        values[GRADIENT] = nn.utils.clip_grad_norm_(self.backbone.parameters(), max_grad_norm)
        header_gradients = self._header_gradients()
        if header_gradients:
            values[HEADER_GRADIENT] = nn.utils.get_total_norm(header_gradients)  # of this rank's shard, if sharded
        if len(values) > NUMBERS:
            raise InputError(
                f"{', '.join(values)} are {len(values)} losses, measures and gradient norms, and at most {NUMBERS} are "
                "recorded: raise NUMBERS in utils/training/state.py."
            )
        self.names = list(values)
        numbers = torch.zeros_like(self.sums)
        numbers[: len(values)] = torch.stack([value.detach().double() for value in values.values()])
        numbers = averaged(numbers)  # a NaN on any rank must be seen by every rank
        self._check.update(numbers)
        self.optimizer.step()
        self.sums += numbers

    def _total_loss(self, named: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns the sum of the losses. Raises InputError if what is returned does not agree with `measures`."""
        if not isinstance(named, dict) or any(getattr(value, "ndim", None) != 0 for value in named.values()):
            raise InputError('The loss function must return a dict of scalar tensors by name, such as {"kd": loss}.')
        if missing := [name for name in self.measures if name not in named]:
            raise InputError(
                f"measures lists {missing[0]!r}, which the loss function does not return: it returns {_names(named)}."
            )
        losses = {name: value for name, value in named.items() if name not in self.measures}
        if not losses:
            raise InputError(f"The loss function returns no loss: it returns {_names(named)}, measures lists all.")
        if constant := [name for name, value in losses.items() if not value.requires_grad]:
            raise InputError(
                f"No gradient reaches the loss {constant[0]!r}: list it in the measures of fit if it is only logged."
            )
        return sum(losses.values())  # type: ignore[return-value]

    def _header_gradients(self) -> list[torch.Tensor]:
        """Returns the gradients of the header and the projection.

        Raises InputError if a parameter of the header got none: it would never be trained.
        """
        parameters = [] if self.header is None else [*self.header.named_parameters()]
        untrained = [name for name, one in parameters if one.requires_grad and one.grad is None]
        if untrained:
            raise InputError(
                f"No gradient reaches the header's parameter {untrained[0]!r}: use it in the losses outside "
                "target_logit, which is differentiated by the cosine only, or make it a buffer."
            )
        others = [parameter for module in self.modules[1:] for parameter in module.parameters()]
        return [one.grad for one in others if one.grad is not None]

    def _tensors(self) -> list[torch.Tensor]:
        """Returns all tensors that a step changes."""
        states = [module.state_dict() for module in self.modules]
        momentum = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        return [value for state in states for value in state.values()] + momentum + [self.sums, *self._check.tensors]

    def means(self) -> dict[str, float]:
        """Returns the mean of each loss and measure over the steps of the epoch so far; synchronises a GPU.

        Raises InputError if a number of a step was not finite.
        """
        if failure := self._check.failure():
            step, values = failure
            name, value = next((n, v) for n, v in zip(self.names, values, strict=False) if not math.isfinite(v))
            what = name if name in GRADIENTS else f"{'measure' if name in self.measures else 'loss'} {name!r}"
            advice = "lower the learning rate or s"
            if self.run.has_checkpoint:
                advice += f" and move {self.run.folder} away, whose last checkpoint is good"
            raise InputError(
                f"The {what} is {value} in epoch {self.epoch + 1}, step {step + 1}, which was not taken: {advice}."
            )
        sums = zip(self.names, self.sums.tolist(), strict=False)
        return {name: total / self.step for name, total in sums if name not in GRADIENTS}

    def loss(self, means: dict[str, float]) -> float:
        """Returns the sum of those means that are losses."""
        return sum(value for name, value in means.items() if name not in self.measures)

    # Saving -------------------------------------------------------------------------------------------------------

    def due(self, minutes: float) -> bool:
        """Returns True if the last checkpoint is older than `minutes`."""
        return time.monotonic() - self.saved_at > 60 * minutes

    def save(self) -> None:
        """Writes the checkpoint on rank 0, for which the other ranks wait. Raises InputError as `means` does."""
        self.means()  # a state with numbers that are not finite must not replace the last checkpoint
        state = {"epoch": self.epoch, "step": self.step, "best": self.best, "log": self.log}
        state["weights"] = self.weights
        state["sums"] = dict(zip(self.names, self.sums.cpu(), strict=False))
        state["measures"] = [*self.measures]
        state["backbone"] = self.backbone.state_dict()
        state["header"] = dense_state_dict(self.header)
        if self.projection is not None:
            state["projection"] = self.projection.state_dict()
        self.run.save({**state, "optimizer": self._optimizer_state()})
        self.saved_at = time.monotonic()
        wait_for_all()

    def finish_epoch(self, means: dict[str, float], scores: dict[str, float], value: float) -> str:
        """Logs the epoch, writes its files and begins the next one; returns a line that summarises the epoch.

        `value` is the score that selects the best epoch.
        """
        if not self.run.has_checkpoint:
            self.save()  # weights without a checkpoint count as a released model
        is_best = value > self.best
        entry: dict[str, Any] = {"epoch": self.epoch + 1, "lr": self.lr}
        entry["loss"] = {name: value for name, value in means.items() if name not in self.measures}
        entry["measures"] = {name: value for name, value in means.items() if name in self.measures}
        self.log.append({**entry, "scores": scores, "best": is_best})
        self.best = max(self.best, value)
        header = dense_state_dict(self.header)
        for which in ("best", "last") if is_best else ("last",):
            self.weights |= self.run.save_weights(which, self.backbone.state_dict(), header)
        del header  # a whole header of millions of classes is large, and `save` gathers it again
        self.run.write_log(self.log)
        if self.on_epoch_end:
            self.on_epoch_end(self.log[-1])
        self.epoch, self.step, self.names = self.epoch + 1, 0, []
        self.sums.zero_()
        self.save()
        line = f"epoch {self.epoch}/{self.schedule.epochs}  {listed(means)}  {listed(scores)}"
        if math.isnan(value):
            line += " (the score that selects the best epoch is NaN, so this one is not the best)"
        return f"{line} (best so far)" if is_best else line

    def _optimizer_state(self) -> dict:
        """Returns the optimizer's state dict with the momentum of a dense header, whole on rank 0."""
        state = self.optimizer.state_dict()
        if self._sharded_index in state["state"]:
            own = state["state"][self._sharded_index]
            state["state"][self._sharded_index] = {**own, "momentum_buffer": self.header.gather(own["momentum_buffer"])}
        return state

    @property
    def _parameters(self) -> list[nn.Parameter]:
        """The parameters in the order in which the optimizer's state dict numbers them."""
        return self.optimizer.param_groups[0]["params"]

    @property
    def _sharded_index(self) -> int | None:
        """The number of the sharded header's kernel among the parameters, None without one."""
        kernel = self.header.kernel if isinstance(self.header, ShardedHeader) else None
        return next((k for k, one in enumerate(self._parameters) if one is kernel), None)


class FiniteCheck:
    """Detects on the device that a number is not finite; the host asks for it now and then, to synchronise rarely."""

    def __init__(self, device: torch.device):
        self.failed = torch.zeros((), device=device)  # 1 from the first step with a number that is not finite
        self.values = torch.zeros(NUMBERS, dtype=torch.float64, device=device)  # of that step, or of the last one
        self._steps = torch.zeros((), dtype=torch.long, device=device)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.failed, self.values, self._steps]

    def start(self, step: int) -> None:
        """Sets the number of steps of the epoch that have been taken."""
        self._steps.fill_(step)

    def update(self, values: torch.Tensor) -> None:
        """Checks losses, measures and gradient norms (NUMBERS,) float64 of a step that is about to be taken."""
        self.values.copy_(torch.where(self.failed > 0, self.values, values))
        self.failed.copy_(torch.maximum(self.failed, 1 - values.isfinite().all().float()))
        self._steps += self.failed == 0

    def failure(self) -> tuple[int, list[float]] | None:
        """Returns the index in the epoch of the first step that failed, and its numbers; None if none did."""
        return (int(self._steps), self.values.tolist()) if self.failed.item() else None


@contextlib.contextmanager
def tensorboard_events(cfg: Config, progress: Progress) -> Iterator[None]:
    """Writes the log as TensorBoard events too, if `cfg.tensorboard` is set; a repeated epoch replaces its events."""
    if not cfg.tensorboard or not is_first():
        yield
        return
    from torch.utils.tensorboard import SummaryWriter  # an optional package

    with SummaryWriter(str(progress.run.folder / "tensorboard"), purge_step=progress.epoch + 1) as writer:

        def write(entry: dict) -> None:
            named = {f"loss/{name}": value for name, value in entry["loss"].items()}
            named |= {f"measures/{name}": value for name, value in entry["measures"].items()}
            named |= {f"accuracy/{name}": value for name, value in entry["scores"].items()}
            for name, value in {**named, "lr": entry["lr"]}.items():
                writer.add_scalar(name, value, entry["epoch"])

        progress.on_epoch_end = write
        yield


def listed(numbers: dict[str, float]) -> str:
    """Formats numbers as "margin 12.3 kd 0.5"."""
    return " ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def _names(named: dict) -> str:
    return ", ".join(named) or "nothing"
