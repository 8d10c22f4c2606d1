"""Where a run of training stands: its networks, optimizer, position, losses and log, all that a checkpoint holds."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from config.config import Config
from config.published import Schedule
from utils.distributed.collectives import averaged, from_first, on_first, wait_for_all
from utils.distributed.world import is_first, total_batch, world_size
from utils.errors import InputError
from utils.losses.sharded import ShardedHeader, dense_state_dict
from utils.training.checkpoint import Run, wrong_with
from utils.training.cuda_graph import Replayed

Losses = Callable[..., dict[str, torch.Tensor]]
"""Named losses of a batch; the parameters are named after the columns that it reads (see utils.data.columns).

A value that no gradient reaches is a measure: it is logged beside the losses and is no part of their sum.
"""

GRADIENT, HEADER_GRADIENT = "gradient of the network", "gradient of the header"
GRADIENTS = (GRADIENT, HEADER_GRADIENT)
"""The names under which the norms of gradients are kept beside the losses, to notice when one is not finite."""
NUMBERS = 8  # losses, measures and norms of gradients of a step, at most


class Progress:
    """A run's networks and optimizer and where it stands: position, summed losses of the epoch, log, best score."""

    def __init__(
        self,
        run: Run,
        backbone: nn.Module,
        header: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
    ):
        self.run, self.backbone, self.optimizer, self.schedule = run, backbone, optimizer, schedule
        self.header: Any = header
        self.epoch = self.step = 0
        self.best = -math.inf
        self.names: list[str] = []
        self.measures: list[str] = []  # those of the names that are no losses
        self.log: list[dict] = []
        self.weights: dict[str, str] = {}  # digests of the best and last weights by name
        self.saved_at = time.monotonic()
        self._replayed: Replayed | None = None
        self.note: Callable[[dict], None] | None = None  # is told the entry of every epoch
        self._watch = Watch(next(backbone.parameters()).device)
        self.sums = torch.zeros_like(self._watch.values)  # of each of the names over the epoch
        optimizer.found_inf = self._watch.bad  # type: ignore[attr-defined]  # fused SGD leaves everything as it is where this is 1

    @property
    def modules(self) -> list[nn.Module]:
        return [self.backbone] if self.header is None else [self.backbone, self.header]

    @property
    def lr(self) -> float:
        """The learning rate of this epoch."""
        return self.schedule.lr(self.epoch, total_batch(self.run.cfg))

    def restore(self, state: dict | None) -> None:
        """Takes the state that rank 0 has read; all call it."""

        def take() -> tuple:
            try:
                self._take(state)
            except (KeyError, RuntimeError, ValueError) as error:
                raise InputError(
                    f"{self.run.folder} holds a checkpoint of another version ({error}): move it away to train anew."
                ) from error
            if self.log:
                self._mend(state)
            return self.epoch, self.step, self.best, self.names, self.measures, self.log, self.weights

        taken = on_first(take)
        self.epoch, self.step, self.best, self.names, self.measures, self.log, self.weights = taken
        if world_size() > 1:
            self._hand_out(state)

    def _take(self, state: dict) -> None:
        self.epoch, self.step, self.best, self.log = state["epoch"], state["step"], state["best"], state["log"]
        self.weights = state["weights"]
        self.names, self.measures = list(state["sums"]), state.get("measures", [])  # none before there were some
        for k, total in enumerate(state["sums"].values()):
            self.sums[k] = total
        self.backbone.load_state_dict(state["backbone"])
        optimizer = state["optimizer"]
        if isinstance(self.header, ShardedHeader):
            self.header.require_fit(state["header"])
            parts = {k: own for k, own in optimizer["state"].items() if k != self._sharded}
            optimizer = {**optimizer, "state": parts}  # a device need not hold the whole of it
        elif self.header is not None:
            self.header.load_state_dict(state["header"])
        self.optimizer.load_state_dict(optimizer)

    def _hand_out(self, state: dict | None) -> None:
        """What rank 0 has taken, to all ranks; of a sharded header, and of its momentum, each gets its part."""
        for value in [self.sums, *self.backbone.state_dict().values()]:
            from_first(value)
        if isinstance(self.header, ShardedHeader):
            self.header.load_dense_state_dict(state and state["header"])
        elif self.header is not None:
            for value in self.header.state_dict().values():
                from_first(value)
        given = state["optimizer"]["state"] if state else {}
        with_momentum = on_first(lambda: [*given])
        for k in with_momentum:
            parameter = self._parameters[k]
            momentum = self.optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
            if k == self._sharded:
                self.header.scatter(given[k]["momentum_buffer"] if given else None, momentum)
            else:
                from_first(momentum)

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return self.optimizer.param_groups[0]["params"]

    @property
    def _sharded(self) -> int | None:
        """Which of the parameters differs from rank to rank."""
        kernel = self.header.kernel if isinstance(self.header, ShardedHeader) else None
        return next((k for k, one in enumerate(self._parameters) if one is kernel), None)

    def _mend(self, state: dict) -> None:
        """Writes weights anew that are lost, or newer than the checkpoint, if they are those of the checkpoint."""
        for which in ("last", "best"):
            lost = [
                reason
                for name, digest in self.weights.items()
                if name.startswith(which) and (reason := wrong_with(self.run.folder / name, digest))
            ]
            if not lost:
                continue
            if self.step == 0 and (which == "last" or self.log[-1]["best"]):
                self.weights |= self.run.save_weights(which, state["backbone"], state["header"])
                print(f"{lost[0]}: written anew from the checkpoint.")
            elif which == "best" and self.epoch < self.schedule.epochs:
                # Where they are of a later epoch, this one is trained again, and as good as it was.
                self.best = -math.inf
                print(f"{lost[0]}: the best of the epochs to come takes its place.")
            elif which == self.run.cfg.weights:
                raise InputError(f"{lost[0]}: set weights to last, or move {self.run.folder} away to train anew.")

    def start_epoch(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.backbone.train()
        if self.header is not None:
            self.header.train()
        self._watch.start(self.step)
        if self._replayed:
            self._replayed.forget()  # the learning rate may be another

    def stepper(self, losses: Losses, max_grad_norm: float, replayed: bool) -> Callable[[dict, int], None]:
        """The function that takes one step with a batch and a seed."""

        def take_step(batch: dict[str, torch.Tensor]) -> None:
            self._take_step(losses(**batch), max_grad_norm)

        def seeded(batch: dict[str, torch.Tensor], seed: int) -> None:
            torch.manual_seed(seed)
            take_step(batch)

        if replayed:
            self._replayed = Replayed(take_step, self._tensors)
        return self._replayed or seeded

    def _take_step(self, named: dict[str, torch.Tensor], max_grad_norm: float) -> None:
        """One step of the optimizer, which changes nothing if a number is not finite.

        What `losses` itself has changed by then, statistics or centres, is never saved: the run ends before it is.
        Whatever it changes is among `_tensors`, and is changed in place.
        """
        self.optimizer.zero_grad()
        total: Any = sum(value for value in named.values() if value.requires_grad)
        total.backward()  # and gradients are averaged
        values = {**named, GRADIENT: nn.utils.clip_grad_norm_(self.backbone.parameters(), max_grad_norm)}
        of_header = [] if self.header is None else [one.grad for one in self.header.parameters()]
        if of_header := [grad for grad in of_header if grad is not None]:
            values[HEADER_GRADIENT] = nn.utils.get_total_norm(of_header)  # of a sharded one, of the part here
        self.names = list(values)
        self.measures = [name for name, value in named.items() if not value.requires_grad]
        if len(values) > NUMBERS:
            raise InputError(
                f"{', '.join(values)} are {len(values)} numbers: utils.training.state.NUMBERS must be as large."
            )
        seen = torch.zeros_like(self.sums)
        seen[: len(values)] = torch.stack([value.detach().double() for value in values.values()])
        seen = averaged(seen)  # what is not finite on one rank is not on all
        self._watch.look(seen)
        self.optimizer.step()
        self.sums += seen

    def _tensors(self) -> list[torch.Tensor]:
        states = [module.state_dict() for module in self.modules]
        momentum = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        return [value for state in states for value in state.values()] + momentum + [self.sums, *self._watch.tensors]

    def means(self) -> dict[str, float]:
        """Mean of each loss and measure over the epoch so far; raises InputError where a number was not finite."""
        if found := self._watch.found():
            step, values = found
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
        """The sum of those that are losses."""
        return sum(value for name, value in means.items() if name not in self.measures)

    def save(self) -> None:
        """Writes the checkpoint; all ranks call it, and wait for rank 0 to have written."""
        self.means()  # a checkpoint of a run that has gone wrong would be no good
        state = {"epoch": self.epoch, "step": self.step, "best": self.best, "log": self.log}
        state["weights"] = self.weights
        state["sums"] = dict(zip(self.names, self.sums.cpu(), strict=False))
        state["measures"] = self.measures
        state["backbone"] = self.backbone.state_dict()
        state["header"] = dense_state_dict(self.header)
        self.run.save({**state, "optimizer": self._optimizer_state()})
        self.saved_at = time.monotonic()
        wait_for_all()

    def _optimizer_state(self) -> dict:
        """That of the dense header's optimizer, whole on rank 0."""
        state = self.optimizer.state_dict()
        if self._sharded in state["state"]:
            own = state["state"][self._sharded]
            state["state"][self._sharded] = {**own, "momentum_buffer": self.header.gather(own["momentum_buffer"])}
        return state

    def due(self, minutes: float) -> bool:
        return time.monotonic() - self.saved_at > 60 * minutes

    def finish_epoch(self, means: dict[str, float], scores: dict[str, float], value: float) -> str:
        """Logs the epoch and writes its files; gives the line that says how it went."""
        if not self.run.has_checkpoint:
            self.save()  # weights without a checkpoint are a finished model that was put there
        is_best = value > self.best
        entry: dict[str, Any] = {"epoch": self.epoch + 1, "lr": self.lr}
        entry["loss"] = {name: value for name, value in means.items() if name not in self.measures}
        entry["measures"] = {name: means[name] for name in self.measures}
        self.log.append({**entry, "scores": scores, "best": is_best})
        self.best = max(self.best, value)
        header = dense_state_dict(self.header)
        for which in ("best", "last") if is_best else ("last",):
            self.weights |= self.run.save_weights(which, self.backbone.state_dict(), header)
        del header  # the checkpoint gathers it again
        self.run.write_log(self.log)
        if self.note:
            self.note(self.log[-1])
        self.epoch, self.step, self.names = self.epoch + 1, 0, []
        self.sums.zero_()
        self.save()
        line = f"epoch {self.epoch}/{self.schedule.epochs}  {listed(means)}  {listed(scores)}"
        return f"{line} (best so far)" if is_best else line


@contextlib.contextmanager
def events(cfg: Config, progress: Progress) -> Iterator[None]:
    """With `cfg.tensorboard` the log is written as TensorBoard events too; a repeated epoch replaces its own."""
    if not cfg.tensorboard or not is_first():
        yield
        return
    from torch.utils.tensorboard import SummaryWriter  # an optional package

    with SummaryWriter(str(progress.run.folder / "tensorboard"), purge_step=progress.epoch + 1) as writer:

        def note(entry: dict) -> None:
            named = {f"loss/{name}": value for name, value in entry["loss"].items()}
            named |= {f"measures/{name}": value for name, value in entry["measures"].items()}
            named |= {f"accuracy/{name}": value for name, value in entry["scores"].items()}
            for name, value in {**named, "lr": entry["lr"]}.items():
                writer.add_scalar(name, value, entry["epoch"])

        progress.note = note
        yield


class Watch:
    """Notices on the device when a number is not finite; the host asks now and then."""

    def __init__(self, device: torch.device):
        self.bad = torch.zeros((), device=device)  # 1 from the first step on that was not to be taken
        self.values = torch.zeros(NUMBERS, dtype=torch.float64, device=device)  # of that step, or of the last one
        self._steps = torch.zeros((), dtype=torch.long, device=device)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.bad, self.values, self._steps]

    def start(self, step: int) -> None:
        """Counts steps from this one on."""
        self._steps.fill_(step)

    def look(self, values: torch.Tensor) -> None:
        """Losses, measures and norms of gradients (NUMBERS,) of the step that is about to be taken."""
        self.values.copy_(torch.where(self.bad > 0, self.values, values))
        self.bad.copy_(torch.maximum(self.bad, 1 - values.isfinite().all().float()))
        self._steps += self.bad == 0

    def found(self) -> tuple[int, list[float]] | None:
        """How many steps of the epoch came before the first bad one, and the numbers of that one."""
        return (int(self._steps), self.values.tolist()) if self.bad.item() else None


def listed(numbers: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in numbers.items())
