"""The training loop and the inference loop of all stages; both know nothing of the method that they run."""

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
from utils.training.precision import compiled, eager_fp32, eagerly_if_compiling_fails, mixed_precision
from utils.training.start import freeze, read_by, start, start_sources
from utils.training.state import Losses, Progress, listed, tensorboard_events
from utils.weights import find_weights

Validate = Callable[[], tuple[dict[str, float], float]]
"""Returns the scores to log, and the score that selects the best epoch (higher is better)."""


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
    projection: nn.Module | None = None,
    measures: tuple[str, ...] = (),
    validate: Validate | None = None,
) -> None:
    """Minimises the sum of the named losses by SGD over `backbone` and `header`, and keeps the run in `folder`.

    A `projection` with parameters is trained too; it is kept in checkpoints only.

    The parameters of `losses` are names of columns of `faces`; it gets a batch of each and returns scalars by name.
    Those named in `measures` are logged only, all others are losses and summed.

    `kind` is "teacher", the name of an adaptor or the method of a student; a kind that config does not know is trained
    as a student. It selects the epochs and the learning rate (`cfg.schedule`), and the settings that may not change
    when the run is resumed (`cfg.decisive`).

    A step averages the gradients of `cfg.accumulate` batches. Gradients of the backbone are clipped to
    `cfg.max_grad_norm`. After every epoch `validate` scores it; without `validate`, the epoch with the lowest training
    loss is the best. If `fit` is called again, an interrupted run is resumed from its last checkpoint and a finished
    run is left unchanged.

    Raises InputError as `check_run` does; if a parameter of `losses` is no column; if a loss gets no gradient; if a
    measure is not returned; and if a loss or gradient is not finite, in which case that step is not taken.
    """
    columns = _columns_of(losses, faces)
    _require_batch(faces, cfg)
    with locked(folder) if is_first() else contextlib.nullcontext():  # only rank 0 writes
        run = _run_of(faces, folder, cfg, kind)
        if not run.has_checkpoint and is_given(folder):
            return
        progress = _progress(run, cfg, kind, backbone, header, projection, measures)
        if run.has_checkpoint:
            progress.restore(run.load())
        else:
            start(backbone, header, faces, cfg, kind)
        if progress.epoch >= progress.schedule.epochs:
            print(f"{folder} is already trained; move it away to train anew.")
            return
        print(cfg.described(kind))
        run.begin(progress.epoch, progress.step)
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(mixed_precision(backbone, cfg.precision, device_of(cfg)))
            contexts.enter_context(tensorboard_events(cfg, progress))
            if cfg.compile:
                contexts.enter_context(compiled(backbone))
                losses = eagerly_if_compiling_fails(backbone, losses)
            _train(losses, columns, faces, cfg, progress, validate)


def _progress(
    run: Run,
    cfg: Config,
    kind: str,
    backbone: nn.Module,
    header: nn.Module | None,
    projection: nn.Module | None,
    measures: tuple[str, ...],
) -> Progress:
    """Moves the modules to the device, freezes layers, and returns the state of a run before its first step."""
    device, schedule = device_of(cfg), cfg.schedule(kind)
    backbone.to(device).to(memory_format=torch.channels_last)
    if cfg.sync_bn and world_size() > 1:
        share_statistics(backbone)
    frozen = freeze(backbone, read_by(cfg, kind, "freeze"))
    if projection is not None and not [*projection.parameters()]:
        projection = None  # the identity
    modules = [module.to(device) for module in (backbone, header, projection) if module is not None]
    parameters = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    lr, decay = schedule.lr(0, total_batch(cfg)), cfg.weight_decay
    optimizer = torch.optim.SGD(parameters, lr, momentum=cfg.momentum, weight_decay=decay, fused=True)
    return Progress(run, backbone, header, optimizer, schedule, measures, frozen, projection)


def _train(
    losses: Losses,
    columns: dict[str, Column],
    faces: Faces,
    cfg: Config,
    progress: Progress,
    validate: Validate | None,
) -> None:
    """Trains from the position of `progress` to the last epoch."""
    epochs, batch_size, device = progress.schedule.epochs, total_batch(cfg), device_of(cfg)
    steps = len(faces) // batch_size
    # A step without images is shorter than launching its kernels.
    captured = device.type == "cuda" and "image" not in columns and world_size() == 1 and not progress.schedule.warmup
    columns = cache(columns, faces.rows, device, cfg.device_cache_gb)
    # DistributedDataParallel averages gradients, but those of a sharded header differ between ranks.
    replicated = [module for module in progress.modules if not isinstance(module, ShardedHeader)]
    take_step = progress.stepper(collectives.averaging(losses, replicated), cfg.max_grad_norm, captured)
    agreement = collectives.Agreement()
    if progress.epoch or progress.step:
        print(f"{progress.run.folder}: continuing in epoch {progress.epoch + 1} after step {progress.step} of {steps}.")
    with StopSignals() as stop:
        while progress.epoch < epochs:
            first, started = progress.step, time.monotonic()
            progress.start_epoch()
            batches = stream(columns, faces.batches(progress.epoch, first), device, cfg.num_workers)
            bar = _Bar(f"epoch {progress.epoch + 1}/{epochs}", steps * batch_size, first * batch_size)
            with contextlib.closing(batches), bar:  # closing ends the reader's threads, garbage collection may not
                for batch in batches:
                    progress.set_lr((progress.step + 1) / steps)
                    take_step(batch, _step_seed(cfg, progress))
                    progress.step += 1
                    bar.update(batch_size)
                    signal, due = agreement.after_step(stop.received, progress.due(cfg.checkpoint_minutes))
                    if device.type == "cpu" or bar.due():  # reading a loss synchronises a GPU
                        bar.set_postfix_str(listed(progress.means()), refresh=False)
                    if signal or due:
                        progress.save()
                        where = f"epoch {progress.epoch + 1} after step {progress.step} of {steps}"
                        stop.leave(f"stopped in {where}", signal)
                        agreement.now(0)  # discards the all_reduce in flight: it holds the `due` that was just served
            means = progress.means()  # synchronises a GPU, so the steps are timed whole
            trained = time.monotonic()
            scores, value = _validate(validate, means, progress, stop, agreement)
            line = progress.finish_epoch(means, scores, value)
            if steps > first:  # a run that was stopped while verifying has no steps left to time
                seconds = (trained - started) / (steps - first)
                left = (epochs - progress.epoch) * (seconds * steps + time.monotonic() - trained)
                line += f"  {batch_size / seconds:,.0f} images/s, {duration(left)} left"
            tqdm.write(line)
        stop.leave("stopped after the last epoch", agreement.now(stop.received))


def _step_seed(cfg: Config, progress: Progress) -> int:
    """Returns the seed of a step's elastic margins and dropout: equal in a resumed run, different on each rank."""
    return _seed(STEP, cfg.seed, progress.epoch, progress.step, *(() if is_first() else (rank(),)))


def _validate(
    validate: Validate | None,
    means: dict[str, float],
    progress: Progress,
    stop: StopSignals,
    agreement: collectives.Agreement,
) -> tuple[dict[str, float], float]:
    """Returns the scores of the epoch and the score that selects the best one; a signal saves and raises Interrupted.

    Buffers, such as the statistics of batch normalisation, may differ between ranks: those of rank 0 are saved, so all
    ranks validate with them.
    """
    try:
        if world_size() > 1:
            for value in progress.backbone.buffers():
                collectives.from_first(value)
        with _stopping_together(stop, agreement) if world_size() > 1 else stop.at_once():
            return validate() if validate else ({}, -progress.loss(means))
    except Interrupted:
        progress.save()
        raise


# `validate` takes no arguments and may call `infer` any number of times, so this cannot be passed on as one.
_after_batch: ContextVar[Callable[[], None]] = ContextVar("after_batch", default=lambda: None)
"""`infer` calls it after each batch."""


@contextlib.contextmanager
def _stopping_together(stop: StopSignals, agreement: collectives.Agreement) -> Iterator[None]:
    """Makes a signal that one rank receives in this context end `infer` on all ranks, after the same batch."""

    def leave(what: str = "stopped while verifying") -> None:
        stop.leave(what, agreement.now(stop.received))

    leave("stopped before verifying")
    before = _after_batch.set(leave)
    try:
        yield
    finally:
        _after_batch.reset(before)


def check_run(faces: Faces, folder: Path, cfg: Config, kind: str) -> None:
    """Raises InputError if it is already known that training of this `kind` (see `fit`) cannot begin.

    Another process may be working on the folder, the folder may hold a run of other settings or data, or the images may
    be fewer than one batch. A script that trains several networks calls it for all of them before it trains the first.
    """
    _require_batch(faces, cfg)
    collectives.on_first(lambda: refuse_if_locked(folder))
    _run_of(faces, folder, cfg, kind)


def _run_of(faces: Faces, folder: Path, cfg: Config, kind: str) -> Run:
    return Run(folder, cfg, kind, faces.sources | start_sources(cfg, kind), faces.identities)


def is_given(folder: Path) -> bool:
    """Returns True, and prints a line, if a run folder holds weights but no checkpoint, as a released model does."""
    given = collectives.on_first(lambda: _name_of_given(folder))
    if given:
        print(
            f"{folder} holds {given} and no checkpoint of a run: used as it is, nothing to train. "
            "To train from these weights, move the file to another place and set init_from to it."
        )
    return bool(given)


def _name_of_given(folder: Path) -> str:
    given = find_weights(folder, "best") or find_weights(folder, "last")
    return "" if given is None or any((folder / name).exists() for name in CHECKPOINTS) else given.name


def _columns_of(losses: Losses, faces: Faces) -> dict[str, Column]:
    """Returns the columns that the parameters of `losses` name. Raises InputError if one is no column."""
    names = inspect.signature(losses).parameters
    if unknown := [name for name in names if name not in faces.columns]:
        raise InputError(
            f"The loss function has the parameter {unknown[0]!r}, which is no column: "
            f"the columns are {', '.join(faces.columns)}."
        )
    return {name: faces.columns[name] for name in names}


def _require_batch(faces: Faces, cfg: Config) -> None:
    """Raises InputError if the images are fewer than one batch, or if the ranks have different data."""
    collectives.require_same(faces.sources, "Give all processes the same data, pairs and output.")
    if len(faces) < total_batch(cfg):
        each = len(faces) // (cfg.accumulate * (1 if cfg.global_batch else world_size()))
        raise InputError(f"{len(faces)} images are fewer than one batch: set batch_size to {each} or less.")


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
    """Applies `function` to all rows of `columns` in order, with `network` in eval mode: returns (N, ...) float32.

    Always computes in fp32, so embeddings and scores do not depend on the precision of training. With `parts`, only
    those ranges of rows are computed. With `receive`, it is called with the rows and the results of each batch, in
    order, and nothing is returned. Several ranks share the batches, and each gets all results.
    """
    device = device_of(cfg)
    count = len(next(iter(columns.values())).arrays[0])
    parts = [range(count)] if parts is None else parts
    batches = [rows for part in parts for rows in cut(part, cfg.infer_batch_size)]
    ranks, out = world_size(), None
    mine = batches[rank() :: ranks]
    if len(mine) * ranks < len(batches):
        mine.append(batches[-1])  # other ranks have one batch more, and every rank takes part in its all_gather
    was_training = network.training
    network.to(device).to(memory_format=torch.channels_last).eval()
    try:
        loaded = stream(columns, ((np.asarray(rows), None) for rows in mine), device, cfg.num_workers)
        bar = _Bar(title, count, count - sum(map(len, parts)))
        with eager_fp32(cfg.compile), contextlib.closing(loaded), bar:
            for k, batch in enumerate(loaded):
                results = _gathered(function(**batch).float(), cfg.infer_batch_size).cpu().numpy()
                for rows, result in zip(batches[k * ranks : (k + 1) * ranks], np.split(results, ranks), strict=False):
                    result = result[: len(rows)]  # without the padding of `_gathered`
                    if receive:
                        receive(rows, result)
                    else:
                        out = np.empty((count, *result.shape[1:]), np.float32) if out is None else out
                        out[rows.start : rows.stop] = result
                    bar.update(len(rows))
                _after_batch.get()()
    finally:
        network.train(was_training)
    return out


def _gathered(result: torch.Tensor, size: int) -> torch.Tensor:
    """All-gathers results: (b, ...), b at most `size`, padded with zeros to `size` -> (ranks * size, ...).

    With one rank, returns (b, ...) unchanged.
    """
    if world_size() == 1:
        return result
    return collectives.gathered(torch.cat((result, result.new_zeros(size - len(result), *result.shape[1:]))))


# Progress -------------------------------------------------------------------------------------------------------------


class _Bar(tqdm):
    """Progress bar that counts images; shows nothing if the output is not a terminal."""

    def __init__(self, title: str, total: int, initial: int = 0):
        super().__init__(desc=title, total=total, initial=initial, unit=" images", leave=False, disable=None)
        self._shown = 0.0

    def due(self) -> bool:
        """Returns True at most every half second."""
        now = time.monotonic()
        if now - self._shown < 0.5:
            return False
        self._shown = now
        return True


def _seed(*words: int) -> int:
    """Returns a seed of 63 bits that depends on all words."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


def duration(seconds: float) -> str:
    """Formats seconds as "3 h 07 min" or "7 min 03 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
