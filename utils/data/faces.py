"""The training set of one stage: its images, labels, inputs and targets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from config.config import Config
from config.readers import EXTRACT, script_that_trains
from utils.data.columns import Batch, Column
from utils.data.embeddings import check_weights, read_embeddings, say_if_collapsed
from utils.data.index import Index, find_images
from utils.data.sources import Sources, digest_of, index_of, never_flipped, shared
from utils.data.split import read_quarter, require_split
from utils.distributed.world import is_first, rank, total_batch, world_size
from utils.errors import InputError
from utils.process import command_of_run
from utils.storage.files import sha256

ORDER, FLIPS, STEP = 1, 2, 3  # the first word of a seed: separates random streams by purpose


class Faces:
    """The training set of one stage.

    `teacher` restricts it to the identities of that teacher: one group, or one quarter of each group for the baseline.
    `inputs` adds the column `embedding` from these teachers, and `target` adds the column `target` from `cfg.source`.
    With `cfg.flip_targets`, both columns hold both views of every image. `flip` flips each image with probability 1/2.
    `data` may name several data sets (see utils.data.sources). `pairs` are the verification sets that choose the best
    epoch (see utils.data.pairs); their digests become sources of the run. Pass `store` to reuse an image store that is
    already open.

    Labels count the identities of the set from 0, in order of group and name. Raises InputError if a file is missing
    or was made from another data folder; where possible, before any image is decoded.
    """

    _never_flipped: np.ndarray | None = None  # (N,) bool, the rows whose data set has `data_flip` off

    def __init__(
        self,
        cfg: Config,
        teacher: str = "",
        inputs: tuple[str, ...] = (),
        target: bool = False,
        flip: bool = False,
        pairs: dict | None = None,
        store: Sources | None = None,
    ):
        self.cfg, self.flip = cfg, flip
        if teacher and cfg.is_teacher_baseline:
            require_split(cfg)
        if inputs:
            self._require(
                [cfg.teacher_embeddings(name, view) for name in inputs for view in cfg.target_views],
                EXTRACT,
                cfg.teacher_dir(inputs[0]),
            )
        if target:
            self._require(
                [cfg.source_embeddings(view) for view in cfg.target_views], self._source_script, cfg.source_dir
            )
        if cfg.leave_out and store is None:
            left_out(cfg, index_of(cfg, find_images))  # refuses a wrong list before the images are decoded
        self.store = store or Sources(cfg, checked=not inputs)  # adaptors read embeddings and no images
        index = self.store.index
        chosen = _of_teacher(cfg, teacher, index) if teacher else np.ones(len(index.identities), bool)
        usable = self.store.usable & ~left_out(cfg, index)
        if cfg.data_share:
            usable &= shared(cfg, index, self.store.source)
        self.rows = np.flatnonzero(chosen[index.identity] & usable)
        self._never_flipped = never_flipped(cfg, self.store.source) if flip else None
        if cfg.leave_out and not len(self.rows):
            raise InputError(f"{cfg.leave_out} leaves out every image of {teacher or cfg.data}: shorten it.")
        present, labels = np.unique(index.identity[self.rows], return_inverse=True)
        self.identities = tuple(index.identities[i] for i in present)
        label = np.full(len(index.paths), -1, np.int64)
        label[self.rows] = labels
        self.columns = {"image": Column((self.store.images,)), "label": Column((label,))}
        identities = digest_of(*self.identities)
        self.sources: dict[str, Any] = {"images": self.store.digest, "identities": identities}
        if cfg.leave_out:
            self.sources["left out"] = sha256(Path(cfg.leave_out))
        if teacher and cfg.is_teacher_baseline and (group := cfg.group_of(teacher)):
            self.sources["group that decides the best epoch"] = group
        self.sources |= {f"pairs {name}": one.digest for name, one in (pairs or {}).items()}
        self.origins: dict[Path, dict] = {}  # made_from of each array of embeddings
        if inputs:
            self._add_inputs(inputs)
        if target:
            self._add_target()

    @property
    def num_classes(self) -> int:
        """Number of identities in the set."""
        return len(self.identities)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def _source_script(self) -> str:
        """Name of the script that writes the targets."""
        return script_that_trains(self.cfg.source) if self.cfg.ada_source == "adaptor" else EXTRACT

    def _require(self, paths: list[Path], script: str, run: Path) -> None:
        """Raises InputError that names the missing files and the command that writes them, of the run folder `run`."""
        missing = [str(path) for path in paths if not path.exists()]
        if missing:
            raise InputError(f"Missing: {', '.join(missing)}. Run first: {command_of_run(self.cfg, script, run)}")

    def _read(self, path: Path, flipped: bool, run: Path, script: str, size: int | None = None) -> np.ndarray:
        """Memory-maps one view's embeddings (N, D) of all images; checks that the weights in `run` made them.

        `size` is D; None: any, as the teacher has.
        """
        shape = (len(self.store.index.paths), size)
        again = command_of_run(self.cfg, script, run)
        precision = self.cfg.infer_precision
        array, self.origins[path] = read_embeddings(path, shape, self.store.digest, flipped, precision, again)
        check_weights(path, self.origins[path].get("weights"), run, self.cfg.weights, again)
        return array

    def _add_inputs(self, teachers: tuple[str, ...]) -> None:
        """Adds the column `embedding` (N, sum of the teachers' sizes) from the teachers, in order."""
        arrays = {False: [], True: []}
        for name in teachers:
            for flipped in self.cfg.target_views:
                path = self.cfg.teacher_embeddings(name, flipped)
                arrays[flipped].append(self._read(path, flipped, self.cfg.teacher_dir(name), EXTRACT))
            # Only the unflipped view is a source: adaptors are not trained on the flipped one.
            self.sources[f"embedding {name}"] = self.origins[self.cfg.teacher_embeddings(name)]
            if is_first():
                say_if_collapsed(self.cfg.teacher_embeddings(name), arrays[False][-1])
        self.columns["embedding"] = Column(tuple(arrays[False]), tuple(arrays[True]))

    def _add_target(self) -> None:
        """Adds the column `target` (N, D) from an adaptor or one teacher."""
        views = []
        for flipped in self.cfg.target_views:
            path = self.cfg.source_embeddings(flipped)
            size = self.cfg.embedding_size if self.cfg.ada_source == "adaptor" else None
            views.append(self._read(path, flipped, self.cfg.source_dir, self._source_script, size))
            if self.cfg.ada_source == "adaptor":
                self._check_teachers_of(path)
            self.sources[f"target{' flipped' if flipped else ''}"] = self.origins[path]
        if is_first():
            say_if_collapsed(self.cfg.source_embeddings(), views[0])
        self.columns["target"] = Column((views[0],), tuple(views[1:]))

    def _check_teachers_of(self, path: Path) -> None:
        """Raises InputError unless the teachers are those that the adaptor was trained on."""
        inputs = self.origins[path].get("inputs", {})
        if tuple(inputs) != self.cfg.teachers:
            raise InputError(
                f"{path} was made from the teachers {', '.join(inputs)}, in this order: set ethnicities so."
            )
        extract = command_of_run(self.cfg, EXTRACT, self.cfg.teacher_dir(self.cfg.teachers[0]))
        again = f"{extract} and {command_of_run(self.cfg, self._source_script, self.cfg.source_dir)}"
        for name, made_from in inputs.items():
            check_weights(path, made_from.get("weights"), self.cfg.teacher_dir(name), self.cfg.weights, again)

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Yields this rank's part of each batch of an epoch, from step `first` on.

        All rows are visited in random order; the incomplete last batch is dropped. Order and flips depend on (seed,
        epoch, step) only, so a run can be resumed within an epoch.
        """
        seed, size, order = self.cfg.seed, total_batch(self.cfg), self._order(epoch)
        each = size // world_size()
        part = slice(rank() * each, (rank() + 1) * each)
        for step in range(first, len(self.rows) // size):
            rows = order[step * size : (step + 1) * size]
            flips = np.random.default_rng((FLIPS, seed, epoch, step)).random(size) < 0.5 if self.flip else None
            if flips is not None and self._never_flipped is not None:
                flips &= ~self._never_flipped[rows]
            yield rows[part], flips if flips is None else flips[part]

    def _order(self, epoch: int) -> np.ndarray:
        """Returns all rows in the order in which an epoch visits them."""
        return self.rows[np.random.default_rng((ORDER, self.cfg.seed, epoch)).permutation(len(self.rows))]

    def repeats(self, epoch: int) -> int:
        """Returns how many images of one identity a batch of all ranks holds at most in an epoch."""
        size = total_batch(self.cfg)
        whole = self._order(epoch)[: len(self.rows) // size * size]
        label = np.sort(self.columns["label"].arrays[0][whole].reshape(-1, size))
        count = 1
        while count < size and (label[:, count:] == label[:, :-count]).any():
            count += 1
        return count


def left_out(cfg: Config, index: Index) -> np.ndarray:
    """Returns a mask (N,) bool of the images that `cfg.leave_out` lists, individually or by identity.

    Raises InputError if the list cannot be read or names an image or identity that the index does not hold.
    """
    out = np.zeros(len(index.paths), bool)
    if not cfg.leave_out:
        return out
    try:
        text = Path(cfg.leave_out).read_bytes().decode(errors="surrogateescape")
    except OSError as error:
        raise InputError(f"{cfg.leave_out} cannot be read ({error.strerror}): set leave_out to a list.") from error
    known, named = {*index.identities, *index.paths}, set()
    for line in text.removeprefix("\ufeff").split("\n"):
        named.add(line if line in known else line.strip())  # a name may begin or end with blanks
    named.discard("")
    if unknown := sorted(named - known):
        raise InputError(
            f"{cfg.leave_out} names {unknown[0]!r}, which {cfg.data} does not hold ({len(unknown)} of {len(named)} "
            "lines): each line is <ethnicity>/<identity> or <ethnicity>/<identity>/<image>."
        )
    identities = np.array([name in named for name in index.identities])
    return identities[index.identity] | np.array([path in named for path in index.paths])


def _of_teacher(cfg: Config, teacher: str, index: Index) -> np.ndarray:
    """Returns a mask (I,) bool of the identities that a teacher is trained on."""
    if cfg.setting == "standalone":
        return np.ones(len(index.identities), bool)
    chosen = set(read_quarter(cfg, teacher, index) if cfg.is_teacher_baseline else index.identities_of(teacher))
    return np.array([name in chosen for name in index.identities])
