"""The one training loop and the one inference loop; both know nothing of the method that they run."""

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from config.config import Config
from utils.data.columns import Column, cache, cut, stream
from utils.data.faces import STEP, Faces
from utils.distributed import collectives
from utils.distributed.batchnorm import share_statistics
from utils.distributed.world import is_first, rank, total_batch, world_size
from utils.environment import device_of
from utils.errors import InputError
from utils.losses.sharded import ShardedHeader
from utils.process import Interrupted, StopSignals
from utils.storage.locks import locked, refuse_if_locked
from utils.training.checkpoint import CHECKPOINTS, Run
from utils.training.precision import arithmetic
from utils.training.state import Losses, Progress, events, listed
from utils.weights import find_weights

Validate = Callable[[], tuple[dict[str, float], float]]
"""Scores to log, and the one that decides which epoch is best (higher is better)."""


# Training -------------------------------------------------------------------------------------------------------------


def fit(
    losses: Losses,
    faces: Faces,
    folder: Path,
    cfg: Config,
    backbone: nn.Module,
    header: nn.Module | None = None,
    *,
    kind: str,
    validate: Validate | None = None,
) -> None:
    """Minimises the sum of the named losses by SGD over `backbone` and `header`, and keeps the run in `folder`.

    `kind` says what is trained: "teacher", an adaptor's name, or a student's method. It decides the epochs and the
    learning rate (`cfg.schedule`), and which settings have to stay as they are when the run is resumed
    (`cfg.decisive`). Gradients of the backbone are clipped to `cfg.max_grad_norm`. After every epoch `validate` scores
    it; without one the epoch with the lowest training loss is the best. An interrupted run is resumed when `fit` is
    called again, a finished one is left as it is.

    Raises InputError where `check_run` does, and where a loss or gradient is not finite: that step is not taken.
    """
    _need_a_batch(faces, folder, cfg, kind)
    with _held(folder):
        run, schedule = Run(folder, cfg, kind, faces.sources, faces.identities), cfg.schedule(kind)
        if not run.has_checkpoint and is_given(folder):
            return
        device = device_of(cfg)
        backbone.to(device, memory_format=torch.channels_last)
        if cfg.sync_bn and world_size() > 1:
            share_statistics(backbone)
        modules = [backbone] if header is None else [backbone, header.to(device)]
        parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
        sgd = {"momentum": cfg.momentum, "weight_decay": cfg.weight_decay, "fused": True}
        optimizer = torch.optim.SGD(parameters, schedule.lr(0, total_batch(cfg)), **sgd)
        progress = Progress(run, backbone, header, optimizer, schedule)
        if run.has_checkpoint:
            progress.restore(run.load())
        if progress.epoch >= schedule.epochs:
            print(f"{folder} is already trained; move it away to train anew.")
            return
        print(cfg.described(kind))
        run.begin(progress.epoch, progress.step)
        with arithmetic(backbone, cfg.precision, device, cfg.compile), events(cfg, progress):
            _train(losses, faces, cfg, progress, validate)


def _train(losses: Losses, faces: Faces, cfg: Config, progress: Progress, validate: Validate | None) -> None:
    """From where the run stands to its last epoch."""
    schedule, batch_size, device = progress.schedule, total_batch(cfg), device_of(cfg)
    steps = len(faces) // batch_size
    read = {name: faces.columns[name] for name in inspect.signature(losses).parameters}
    columns = cache(read, faces.rows, device, cfg.device_cache_gb)
    several = world_size() > 1
    place = () if is_first() else (rank(),)  # other processes' dropout is another
    # Such a step is shorter than launching its kernels.
    replayed = device.type == "cuda" and "image" not in read and not several
    whole = [module for module in progress.modules if not isinstance(module, ShardedHeader)]
    take_step = progress.stepper(collectives.averaging(losses, whole), cfg.max_grad_norm, replayed)
    agreement = collectives.Agreement()
    if progress.epoch or progress.step:
        print(f"{progress.run.folder}: continuing in epoch {progress.epoch + 1} after step {progress.step} of {steps}.")
    with StopSignals() as stop:
        while progress.epoch < schedule.epochs:
            epoch, first, started = progress.epoch, progress.step, time.monotonic()
            progress.start_epoch()
            # Closed here whatever happens: a reader whose threads end when it is garbage may never end.
            reader = contextlib.closing(stream(columns, faces.batches(epoch, first), device, cfg.num_workers))
            title = f"epoch {epoch + 1}/{schedule.epochs}"
            with reader as batches, _Bar(title, steps * batch_size, first * batch_size) as bar:
                for batch in batches:
                    take_step(batch, _seed(STEP, cfg.seed, epoch, progress.step, *place))  # margins and dropout
                    progress.step += 1
                    bar.update(batch_size)
                    due = progress.due(cfg.checkpoint_minutes)
                    signal, due = agreement.after_step(stop.received, due)
                    if device.type == "cpu" or bar.due():  # reading a loss makes a GPU wait
                        bar.set_postfix_str(listed(progress.means()), refresh=False)
                    if signal or due:
                        progress.save()
                        stop.leave(f"stopped in epoch {epoch + 1} after step {progress.step} of {steps}", signal)
                        agreement.now(0)  # what is under way would say once more that it was due
            means = progress.means()  # waits for a GPU to have taken its steps
            trained = time.monotonic()
            try:
                if several:
                    for value in progress.backbone.buffers():  # rank 0's are those that are saved, and verified
                        collectives.from_first(value)
                with _leaving_together(stop, agreement) if several else stop.at_once():
                    scores, value = validate() if validate else ({}, -progress.loss(means))
            except Interrupted:
                progress.save()
                raise
            line = progress.finish_epoch(means, scores, value)
            if steps > first:  # an epoch that was stopped while verifying has no steps left to measure
                seconds = (trained - started) / (steps - first)
                left = (schedule.epochs - epoch - 1) * (seconds * steps + time.monotonic() - trained)
                line += f"  {batch_size / seconds:,.0f} images/s, {duration(left)} left"
            tqdm.write(line)
        stop.leave("stopped after the last epoch", agreement.now(stop.received))


_between_batches: ContextVar[Callable[[], None]] = ContextVar("between_batches", default=lambda: None)
"""What `infer` calls after each batch."""


@contextlib.contextmanager
def _leaving_together(stop: StopSignals, agreement: collectives.Agreement) -> Iterator[None]:
    """Context in which a signal that has come to one process ends inference on all, after the same batch."""

    def leave(what: str = "stopped while verifying") -> None:
        stop.leave(what, agreement.now(stop.received))

    leave("stopped before verifying")
    before = _between_batches.set(leave)
    try:
        yield
    finally:
        _between_batches.reset(before)


def _held(folder: Path) -> contextlib.AbstractContextManager:
    """The run folder, for rank 0, which writes it."""
    return locked(folder) if is_first() else contextlib.nullcontext()


def check_run(faces: Faces, folder: Path, cfg: Config, kind: str) -> None:
    """Raises InputError for what can be known before training of this `kind` (see `fit`) begins.

    That is a folder that another process works on or that holds a run of other settings or data, and fewer rows than
    one batch. A script that trains several networks calls it for all of them before it trains the first.
    """
    _need_a_batch(faces, folder, cfg, kind)
    collectives.on_first(lambda: refuse_if_locked(folder))
    Run(folder, cfg, kind, faces.sources, faces.identities)


def is_given(folder: Path) -> bool:
    """Whether a run folder holds weights and no checkpoint, a released model: says that it is used as it is."""
    given = collectives.on_first(lambda: _given(folder))
    if given:
        print(f"{folder} holds {given} and no checkpoint of a run: used as it is, nothing to train.")
    return bool(given)


def _given(folder: Path) -> str:
    given = find_weights(folder, "best") or find_weights(folder, "last")
    return "" if given is None or any((folder / name).exists() for name in CHECKPOINTS) else given.name


def _need_a_batch(faces: Faces, folder: Path, cfg: Config, kind: str) -> None:
    """Raises InputError if there are fewer rows than one batch, one identity only, or ranks would read other data."""
    collectives.require_same(faces.sources, "Give all processes the same data, pairs and output.")
    who = f"Teacher {folder.name}" if kind == "teacher" else folder.name
    if len(faces) < total_batch(cfg):
        each = len(faces) // (1 if cfg.global_batch else world_size())
        raise InputError(f"{who}: {len(faces)} images are fewer than one batch: set batch_size to {each} or less.")
    if len(faces.identities) == 1:
        raise InputError(
            f"{who}: all {len(faces):,} images are of one identity, {faces.identities[0]}, and a classifier needs two "
            f"or more: set data, or label its images."
        )


# Inference ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def infer(
    function: Callable[..., torch.Tensor],
    network: nn.Module,
    columns: dict[str, Column],
    cfg: Config,
    title: str,
    parts: Sequence[range] | None = None,
    receive: Callable[[range, np.ndarray], None] | None = None,
) -> np.ndarray | None:
    """`function` of all rows of `columns` in order, with `network` in eval mode: array (N, ...) float32.

    With `parts` those rows only; with `receive` that is told the rows and results of each batch, in order, and nothing
    is returned. Several processes share the batches, and all of them have all results.
    """
    device = device_of(cfg)
    count = len(next(iter(columns.values())).arrays[0])
    parts = [range(count)] if parts is None else parts
    batches = [rows for part in parts for rows in cut(part, cfg.infer_batch_size)]
    ranks, out = world_size(), None
    mine = batches[rank() :: ranks]
    if len(mine) * ranks < len(batches):
        mine.append(batches[-1])  # others have one more, and wait for what this process says of it
    was_training = network.training
    network.to(device, memory_format=torch.channels_last).eval()
    try:
        # Always in fp32: embeddings and scores do not depend on how the network was trained.
        ahead = stream(columns, ((np.asarray(rows), None) for rows in mine), device, cfg.num_workers)
        bar = _Bar(title, count, count - sum(map(len, parts)))
        with arithmetic(network, "fp32", device), contextlib.closing(ahead), bar:
            for k, batch in enumerate(ahead):
                results = _of_all(function(**batch).float(), cfg.infer_batch_size).cpu().numpy()
                # Of several processes each has filled up its part to a whole batch.
                for rows, result in zip(batches[k * ranks : (k + 1) * ranks], np.split(results, ranks), strict=False):
                    result = result[: len(rows)]
                    if receive:
                        receive(rows, result)
                    else:
                        out = np.empty((count, *result.shape[1:]), np.float32) if out is None else out
                        out[rows.start : rows.stop] = result
                    bar.update(len(rows))
                _between_batches.get()()
    finally:
        network.train(was_training)
    return out


def _of_all(result: torch.Tensor, most: int) -> torch.Tensor:
    """The results (at most `most`, ...) of each process, one after another; of several each filled up to `most`."""
    if world_size() == 1:
        return result
    return collectives.gathered(torch.cat((result, result.new_zeros(most - len(result), *result.shape[1:]))))


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


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
