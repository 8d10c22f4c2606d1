"""The one training loop and the one inference loop; both know nothing of the method that they run."""

import contextlib
import inspect
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from config.config import Config, Schedule
from utils.arrays import Filling
from utils.capture import Replayed
from utils.checkpoint import Run, device_of, find_weights, wrong_with
from utils.dataset import STEP, Column, Faces, cache, cut, stream
from utils.errors import InputError
from utils.files import locked, refuse_if_locked, write_text
from utils.process import Interrupted, StopSignals

Losses = Callable[..., dict[str, torch.Tensor]]
"""Named losses of a batch; the parameters are named after the columns that it reads (see utils.dataset)."""

GRADIENT, HEADER_GRADIENT = "gradient of the network", "gradient of the header"
GRADIENTS = (GRADIENT, HEADER_GRADIENT)
"""The names under which the norms of gradients are kept beside the losses, to notice when one is not finite."""
NUMBERS = 8  # losses and norms of gradients of a step, at most

Validate = Callable[[], tuple[dict[str, float], float]]
"""Scores to log, and the one that decides which epoch is best (higher is better)."""


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


# Training -------------------------------------------------------------------------------------------------------------


def fit(
    losses: Losses,
    faces: Faces,
    folder: Path,
    cfg: Config,
    backbone: nn.Module,
    header: nn.Module | None = None,
    *,
    schedule: Schedule,
    validate: Validate | None = None,
) -> None:
    """Minimises the sum of the named losses by SGD over `backbone` and `header`, and keeps the run in `folder`.

    The learning rate follows `schedule`; gradients of the backbone are clipped to `cfg.max_grad_norm`. After every
    epoch `validate` scores it; without one the epoch with the lowest training loss is the best. An interrupted run
    continues where it was when it is started again, a finished one is left as it is.

    Raises InputError where `check_run` does, and where a loss or gradient is not finite: that step is not taken.
    """
    _need_a_batch(faces, cfg)
    with locked(folder):
        run = Run(folder, cfg, faces.sources, faces.identities)
        state = run.load()
        if state is None and (given := find_weights(folder, "best") or find_weights(folder, "last")):
            print(f"{folder} holds {given.name} and no checkpoint of a run: used as it is, nothing to train.")
            return
        device = device_of(cfg)
        backbone.to(device, memory_format=torch.channels_last)
        modules = [backbone] if header is None else [backbone, header.to(device)]
        parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
        sgd = {"momentum": cfg.momentum, "weight_decay": cfg.weight_decay, "fused": True}
        progress = _Progress(run, backbone, header, torch.optim.SGD(parameters, schedule.base_lr, **sgd), schedule)
        if state is not None:
            progress.restore(state)
        if progress.epoch >= schedule.epochs:
            print(f"{folder} is already trained; move it away to train anew.")
            return
        run.begin(progress.epoch, progress.step)
        with arithmetic(backbone, cfg.precision, device, cfg.compile), _events(cfg, progress):
            _train(losses, faces, cfg, progress, validate)


def _train(losses: Losses, faces: Faces, cfg: Config, progress: "_Progress", validate: Validate | None) -> None:
    """From where the run stands to its last epoch."""
    schedule, steps, device = progress.schedule, len(faces) // cfg.batch_size, device_of(cfg)
    read = {name: faces.columns[name] for name in inspect.signature(losses).parameters}
    columns = cache(read, faces.rows, device, cfg.device_cache_gb)
    replayed = device.type == "cuda" and "image" not in read  # such a step is shorter than launching its kernels
    take_step = progress.stepper(losses, cfg.max_grad_norm, replayed)
    if progress.epoch or progress.step:
        print(f"{progress.run.folder}: continuing in epoch {progress.epoch + 1} after step {progress.step} of {steps}.")
    with StopSignals() as stop:
        while progress.epoch < schedule.epochs:
            epoch, first, started = progress.epoch, progress.step, time.monotonic()
            progress.start_epoch()
            batches = stream(columns, faces.batches(epoch, first), device, cfg.num_workers)
            with _Bar(f"epoch {epoch + 1}/{schedule.epochs}", steps * cfg.batch_size, first * cfg.batch_size) as bar:
                for batch in batches:
                    take_step(batch, _seed(STEP, cfg.seed, epoch, progress.step))  # margins and dropout
                    progress.step += 1
                    bar.update(cfg.batch_size)
                    if device.type == "cpu" or bar.due():  # reading a loss makes a GPU wait
                        bar.set_postfix_str(_listed(progress.means()), refresh=False)
                    if stop.received or progress.due(cfg.checkpoint_minutes):
                        progress.save()
                        stop.leave(f"stopped in epoch {epoch + 1} after step {progress.step} of {steps}")
            means = progress.means()  # waits for a GPU to have taken its steps
            trained = time.monotonic()
            try:
                with stop.at_once():
                    scores, value = validate() if validate else ({}, -sum(means.values()))
            except Interrupted:
                progress.save()
                raise
            line = progress.finish_epoch(means, scores, value)
            if steps > first:  # an epoch that was stopped while verifying has no steps left to measure
                seconds = (trained - started) / (steps - first)
                left = (schedule.epochs - epoch - 1) * (seconds * steps + time.monotonic() - trained)
                line += f"  {cfg.batch_size / seconds:,.0f} images/s, {_duration(left)} left"
            tqdm.write(line)
        stop.leave("stopped after the last epoch")


def check_run(faces: Faces, folder: Path, cfg: Config) -> None:
    """Raises InputError for what can be known before training begins.

    That is a folder that another process works on or that holds a run of other settings or data, and fewer rows than
    one batch. A script that trains several networks calls it for all of them before it trains the first.
    """
    _need_a_batch(faces, cfg)
    refuse_if_locked(folder)
    Run(folder, cfg, faces.sources, faces.identities)


def _need_a_batch(faces: Faces, cfg: Config) -> None:
    if len(faces) < cfg.batch_size:
        raise InputError(f"{len(faces)} images are fewer than one batch: set batch_size to {len(faces)} or less.")


class _Progress:
    """A run's networks and optimizer and where it stands: position, summed losses of the epoch, log, best score."""

    def __init__(
        self,
        run: Run,
        backbone: nn.Module,
        header: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
    ):
        self.run, self.backbone, self.header, self.optimizer, self.schedule = run, backbone, header, optimizer, schedule
        self.epoch = self.step = 0
        self.best = -math.inf
        self.names: list[str] = []
        self.log: list[dict] = []
        self.weights: dict[str, str] = {}  # digests of the best and last weights by name
        self.saved_at = time.monotonic()
        self._replayed: Replayed | None = None
        self.note: Callable[[dict], None] | None = None  # is told the entry of every epoch
        self._watch = _Watch(next(backbone.parameters()).device)
        self.sums = torch.zeros_like(self._watch.values)  # of each of the names over the epoch
        optimizer.found_inf = self._watch.bad  # fused SGD leaves everything as it is where this is 1

    def restore(self, state: dict) -> None:
        try:
            self.epoch, self.step, self.best, self.log = state["epoch"], state["step"], state["best"], state["log"]
            self.weights = state["weights"]
            self.names = list(state["sums"])
            for k, total in enumerate(state["sums"].values()):
                self.sums[k] = total
            self.backbone.load_state_dict(state["backbone"])
            if self.header is not None:
                self.header.load_state_dict(state["header"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{self.run.folder} holds a checkpoint of another version ({error}): move it away to train anew."
            ) from error
        if self.log:
            self._mend()

    def _mend(self) -> None:
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
                self.weights |= self.run.save_weights(which, self.backbone, self.header)
                print(f"{lost[0]}: written anew from the checkpoint.")
            elif which == "best" and self.epoch < self.schedule.epochs:
                # Where they are of a later epoch, this one is trained again, and as good as it was.
                self.best = -math.inf
                print(f"{lost[0]}: the best of the epochs to come takes its place.")
            elif which == self.run.cfg.weights:
                raise InputError(f"{lost[0]}: set weights to last, or move {self.run.folder} away to train anew.")

    def start_epoch(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(self.epoch)
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
        """One step of the optimizer, which changes nothing if a loss or a gradient is not finite.

        Whatever it changes is among `_tensors`, and is changed in place.
        """
        self.optimizer.zero_grad()
        sum(named.values()).backward()
        values = {**named, GRADIENT: nn.utils.clip_grad_norm_(self.backbone.parameters(), max_grad_norm)}
        if self.header is not None:
            values[HEADER_GRADIENT] = nn.utils.get_total_norm(
                [parameter.grad for parameter in self.header.parameters() if parameter.grad is not None]
            )
        self.names = list(values)
        if len(values) > NUMBERS:
            raise InputError(f"{', '.join(values)} are {len(values)} numbers: utils.engine.NUMBERS must be as large.")
        seen = torch.zeros_like(self.sums)
        seen[: len(values)] = torch.stack([value.detach().double() for value in values.values()])
        self._watch.look(seen)
        self.optimizer.step()
        self.sums += seen

    def _tensors(self) -> list[torch.Tensor]:
        modules = [self.backbone] if self.header is None else [self.backbone, self.header]
        states = [module.state_dict() for module in modules]
        momentum = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        return [value for state in states for value in state.values()] + momentum + [self.sums, *self._watch.tensors]

    def means(self) -> dict[str, float]:
        """Mean of each loss over the epoch so far; raises InputError where one, or a gradient, was not finite."""
        if found := self._watch.found():
            step, values = found
            name, value = next((n, v) for n, v in zip(self.names, values, strict=False) if not math.isfinite(v))
            what = name if name in GRADIENTS else f"loss {name!r}"
            advice = "lower the learning rate or s"
            if self.run.has_checkpoint:
                advice += f" and move {self.run.folder} away, whose last checkpoint is good"
            raise InputError(
                f"The {what} is {value} in epoch {self.epoch + 1}, step {step + 1}, which was not taken: {advice}."
            )
        sums = zip(self.names, self.sums.tolist(), strict=False)
        return {name: total / self.step for name, total in sums if name not in GRADIENTS}

    def save(self) -> None:
        self.means()  # a checkpoint of a run that has gone wrong would be no good
        state = {"epoch": self.epoch, "step": self.step, "best": self.best, "log": self.log}
        state["weights"] = self.weights
        state["sums"] = dict(zip(self.names, self.sums.cpu(), strict=False))
        state["backbone"] = self.backbone.state_dict()
        state["header"] = self.header.state_dict() if self.header is not None else {}
        self.run.save({**state, "optimizer": self.optimizer.state_dict()})
        self.saved_at = time.monotonic()

    def due(self, minutes: float) -> bool:
        return time.monotonic() - self.saved_at > 60 * minutes

    def finish_epoch(self, means: dict[str, float], scores: dict[str, float], value: float) -> str:
        """Logs the epoch and writes its files; gives the line that says how it went."""
        if not self.run.has_checkpoint:
            self.save()  # weights without a checkpoint are a finished model that was put there
        is_best = value > self.best
        entry = {"epoch": self.epoch + 1, "lr": self.schedule.lr(self.epoch), "loss": means, "scores": scores}
        self.log.append({**entry, "best": is_best})
        self.best = max(self.best, value)
        for which in ("best", "last") if is_best else ("last",):
            self.weights |= self.run.save_weights(which, self.backbone, self.header)
        # The log is written as a whole: an epoch that is repeated after a crash does not appear twice.
        write_text(self.run.folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.log))
        if self.note:
            self.note(self.log[-1])
        self.epoch, self.step, self.names = self.epoch + 1, 0, []
        self.sums.zero_()
        self.save()
        line = f"epoch {self.epoch}/{self.schedule.epochs}  {_listed(means)}  {_listed(scores)}"
        return f"{line} (best so far)" if is_best else line


@contextlib.contextmanager
def _events(cfg: Config, progress: _Progress) -> Iterator[None]:
    """With `cfg.tensorboard` the log is written as TensorBoard events too; a repeated epoch replaces its own."""
    if not cfg.tensorboard:
        yield
        return
    from torch.utils.tensorboard import SummaryWriter  # an optional package

    with SummaryWriter(str(progress.run.folder / "tensorboard"), purge_step=progress.epoch + 1) as writer:

        def note(entry: dict) -> None:
            named = {f"loss/{name}": value for name, value in entry["loss"].items()}
            named |= {f"accuracy/{name}": value for name, value in entry["scores"].items()}
            for name, value in {**named, "lr": entry["lr"]}.items():
                writer.add_scalar(name, value, entry["epoch"])

        progress.note = note
        yield


class _Watch:
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
        """Losses and norms of gradients (NUMBERS,) of the step that is about to be taken."""
        self.values.copy_(torch.where(self.bad > 0, self.values, values))
        self.bad.copy_(torch.maximum(self.bad, 1 - values.isfinite().all().float()))
        self._steps += self.bad == 0

    def found(self) -> tuple[int, list[float]] | None:
        """How many steps of the epoch came before the first bad one, and the numbers of that one."""
        return (int(self._steps), self.values.tolist()) if self.bad.item() else None


# Inference ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def infer(
    function: Callable[..., torch.Tensor],
    network: nn.Module,
    columns: dict[str, Column],
    cfg: Config,
    title: str,
    fillings: Sequence[Filling] = (),
) -> np.ndarray | None:
    """`function` of all rows of `columns` in order, with `network` in eval mode: array (N, ...) float32.

    With `fillings`, all in blocks of the same rows, `function` gives (B, as many, ...), one part for the array of each:
    only the blocks that are missing in one are computed, and nothing is returned.
    """
    device = device_of(cfg)
    count = len(next(iter(columns.values())).arrays[0])
    blocks = sorted({block for filling in fillings for block in filling.missing})
    parts = [fillings[0].rows(block) for block in blocks] if fillings else [range(count)]
    batches = [rows for part in parts for rows in cut(part, cfg.infer_batch_size)]
    block_of = {part.stop: block for part, block in zip(parts, blocks, strict=False)}
    out = None
    was_training = network.training
    network.to(device, memory_format=torch.channels_last).eval()
    try:
        # Always in fp32: embeddings and scores do not depend on how the network was trained.
        with arithmetic(network, "fp32", device), _Bar(title, count, count - sum(map(len, parts))) as bar:
            ahead = stream(columns, ((np.asarray(rows), None) for rows in batches), device, cfg.num_workers)
            for rows, batch in zip(batches, ahead, strict=True):
                result = function(**batch).float().cpu().numpy()
                if fillings:
                    _fill(fillings, rows, result, block_of.get(rows.stop))
                else:
                    out = np.empty((count, *result.shape[1:]), np.float32) if out is None else out
                    out[rows.start : rows.stop] = result
                bar.update(len(result))
    finally:
        network.train(was_training)
    return out


def _fill(fillings: Sequence[Filling], rows: range, result: np.ndarray, finished: int | None) -> None:
    for filling, part in zip(fillings, result.swapaxes(0, 1), strict=True):
        filling.array[rows.start : rows.stop] = part
        if finished is not None:
            filling.finish(finished, filling.digest(finished))


# Progress ------------------------------------------------------------------------------------------------------------


class _Bar(tqdm):
    """Progress of images with named numbers behind it; silent where the output is no terminal."""

    def __init__(self, title: str, total: int, initial: int = 0):
        super().__init__(desc=title, total=total, initial=initial, unit=" images", leave=False, disable=None)
        self._shown = 0.0

    def due(self) -> bool:
        """Whether half a second has gone by since the last time."""
        now = time.monotonic()
        if now - self._shown < 0.5:
            return False
        self._shown = now
        return True


def _seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


def _listed(numbers: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
