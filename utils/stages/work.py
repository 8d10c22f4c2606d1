"""The work of each stage, in images by kind of work and network, and the bytes that it writes."""

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from backbones import build_adaptor, build_backbone
from config.config import Config
from config.registry import ADAPTORS
from utils.data.faces import left_out
from utils.data.index import scan
from utils.data.pairs import read_bin
from utils.data.sources import folders, index_of
from utils.data.split import split_of
from utils.data.store import SIZE
from utils.distributed.world import total_batch
from utils.errors import InputError
from utils.stages.paper import STUDENTS, Stage
from utils.stages.rates import ADAPT, INFER, TRAIN, Rates

IMAGE = SIZE * SIZE * 3  # bytes
PAPER_IMAGES = {"African": 324_106, "Asian": 324_202, "Caucasian": 326_070, "Indian": 274_554}
PAPER_IDENTITIES = {"African": 7_000, "Asian": 7_000, "Caucasian": 7_000, "Indian": 6_997}
"""Sizes of the published training set; it is not known which of the first two groups has 324,106 images."""

RFW_IMAGES = 12_000  # images in 6,000 pairs of one group, if no image is in two pairs
TRAINED = ("teacher", *ADAPTORS, *STUDENTS)  # kinds of stages that train
STATES_IN_CHECKPOINT, CHECKPOINTS, WEIGHTS = 2, 2, 2
"""Parameters and momentum; newest and previous checkpoint; best and last weights."""

Work = Counter[tuple[str, str]]
"""Numbers of images (or rows) by (kind of work, network), as in `Rates`."""


@dataclass(frozen=True)
class Counts:
    """Numbers of images and identities that each teacher is trained on, and of distinct images per verification set.

    The key "All" stands for all groups together. `digest` is the SHA-256 of the data folder's index.
    """

    images: dict[str, int]
    identities: dict[str, int]
    pairs: dict[str, int]  # images, not pairs
    digest: str = ""

    @property
    def verified(self) -> int:
        """Images that one verification embeds: every distinct image, and flipped."""
        return 2 * sum(self.pairs.values())


def counted(cfg: Config, pairs: dict[str, int]) -> Counts:
    """Counts the images and identities of the data folder; `pairs` are distinct images per verification set.

    Raises InputError for a folder that cannot be used.
    """
    index = index_of(cfg, lambda one: scan(Path(one.data), one.selected_ethnicities, nested=one.nested_images))
    used = index.identity[~left_out(cfg, index)]
    of_identity = dict(zip(index.identities, np.bincount(used, minlength=len(index.identities)).tolist(), strict=True))
    seen = {"All": list(index.identities)}
    for group in cfg.ethnicities:
        seen[group] = index.identities_of(group)
        for quarter, names in split_of(cfg, group, seen[group]).items():
            seen.setdefault(quarter, []).extend(names)
    images = {name: sum(of_identity[one] for one in identities) for name, identities in seen.items()}
    identities = {name: sum(of_identity[one] > 0 for one in identities) for name, identities in seen.items()}
    return Counts(images, identities, pairs, index.digest)


def papers_counts(cfg: Config, pairs: dict[str, int]) -> Counts | None:
    """Returns the counts of the published training set, with equal quarters; None for groups other than the paper's."""
    if not set(cfg.ethnicities) <= PAPER_IMAGES.keys():
        return None

    def by_teacher(of: dict[str, int]) -> dict[str, int]:
        own = {name: of[name] for name in cfg.ethnicities}
        total = sum(own.values())
        parts = dict(zip(cfg.quarters, map(len, np.array_split(np.arange(total), len(own))), strict=True))
        return {**own, **parts, "All": total}

    return Counts(by_teacher(PAPER_IMAGES), by_teacher(PAPER_IDENTITIES), pairs)


def counts_of(cfg: Config, may_assume: bool) -> tuple[Counts, list[str]]:
    """Counts images and identities; returns the counts, and a line for each assumption.

    With `may_assume`, as for a plan, missing data is replaced by the numbers of the paper; otherwise raises InputError.
    """
    missing = [path for path in cfg.pairs_files.values() if not path.is_file()]
    assumed = []
    if missing and not may_assume:
        raise InputError(f"Missing: {', '.join(map(str, missing))}. Set pairs to the folder of these files.")
    if missing:
        assumed = [f"{cfg.pairs} lacks {missing[0].name}: sets that are not there count as {RFW_IMAGES:,} images.\n"]
    pairs = {name: RFW_IMAGES if p in missing else len({*read_bin(p)[0]}) for name, p in cfg.pairs_files.items()}
    papers = papers_counts(cfg, pairs)
    if may_assume and papers and not all(folder.is_dir() for folder in folders(cfg)):
        number = papers.images["All"]
        return papers, [f"{cfg.data} is not there: counted with the paper's {number:,} images.\n", *assumed]
    return counted(cfg, pairs), assumed


def work_of(stage: Stage, counts: Counts) -> Work:
    """Returns the work of one stage other than the evaluation: training, verification after each epoch, embeddings."""
    cfg, images = stage.cfg, counts.images["All"]
    if stage.kind in ("teacher", *STUDENTS):
        is_teacher = stage.kind == "teacher"
        network = cfg.network if is_teacher else cfg.student_network
        seen = counts.images[cfg.ethnicity] if is_teacher else images
        return Work({(TRAIN, network): _seen(stage, seen), (INFER, network): epochs(stage) * counts.verified})
    if stage.kind in ADAPTORS:
        return Work({(ADAPT, ""): _seen(stage, images) + images * len(cfg.target_views)})
    if stage.kind == "embeddings":
        return Work({(INFER, cfg.network): len(stage.needs) * images * len(cfg.target_views)})
    return Work()


def work_of_all(stages: list[Stage], counts: Counts) -> dict[str, Work]:
    """Returns the work of each stage by name; the evaluation verifies every network that another stage trains."""
    work = {stage.name: work_of(stage, counts) for stage in stages}
    for stage in stages:
        if stage.kind == "evaluation":
            networks = [network for name in stage.needs for kind, network in work[name] if kind == TRAIN]
            work[stage.name] = Work({(INFER, network): 0 for network in networks})
            for network in networks:
                work[stage.name][INFER, network] += counts.verified
    return work


def epochs(stage: Stage) -> int:
    """Returns the number of epochs of a stage that trains."""
    return stage.cfg.schedule(stage.kind).epochs


def _seen(stage: Stage, images: int) -> int:
    """Returns the number of images in all epochs, each without its incomplete last batch."""
    size = total_batch(stage.cfg)
    return epochs(stage) * (images // size) * size


def seconds(work: Mapping[tuple[str, str], int], rates: Rates) -> float:
    """Returns the time in seconds for `work` on one device."""
    return sum(count / rates[kind] for kind, count in work.items())


def share_done(stage: Stage) -> float:
    """Returns the share of its epochs, in [0, 1], that a stage has logged; 0 for a stage that does not train."""
    log = stage.writes[0] / "log.jsonl" if stage.writes else None
    if stage.kind not in TRAINED or not log.is_file():
        return 0.0
    return min(1.0, log.read_bytes().count(b"\n") / epochs(stage))


def makespan(durations: dict[str, float], stages: list[Stage], slots: int) -> float:
    """Returns the time for all stages in `durations` on so many slots, each of which runs the first ready stage.

    `durations` by stage and the result are in the same unit.
    """
    waiting = [stage for stage in stages if stage.name in durations]
    unfinished, ends, now = {stage.name for stage in waiting}, {}, 0.0
    while waiting or ends:
        for stage in [*waiting]:
            if len(ends) < slots and unfinished.isdisjoint(stage.needs):
                ends[stage.name] = now + durations[stage.name]
                waiting.remove(stage)
        name = min(ends, key=ends.__getitem__)
        now = ends.pop(name)
        unfinished.discard(name)
    return now


# Disk -----------------------------------------------------------------------------------------------------------------


def bytes_of(stage: Stage, counts: Counts) -> dict[Path, int]:
    """Returns the bytes of each array and run folder that a stage writes, without tables and lists."""
    found = {}
    for path in stage.writes:
        if path.suffix == ".npy":
            found[path] = counts.images["All"] * stage.cfg.embedding_size * 4
        elif stage.kind in TRAINED:
            states = WEIGHTS + STATES_IN_CHECKPOINT * CHECKPOINTS
            found[path] = states * _state(stage, counts)
    return found


def bytes_while_saving(stage: Stage, counts: Counts) -> int:
    """Returns the bytes of the partial file from which an atomic write makes the newest checkpoint."""
    trains = stage.kind in TRAINED
    return STATES_IN_CHECKPOINT * _state(stage, counts) if trains else 0


def _state(stage: Stage, counts: Counts) -> int:
    """Returns the bytes of the parameters and buffers of a stage's network and header."""
    cfg = stage.cfg
    if stage.kind in ADAPTORS:
        own = _bytes_of_adaptor(stage.kind, cfg)
    else:
        own = _bytes_of_network(cfg.network if stage.kind == "teacher" else cfg.student_network, cfg.embedding_size)
    if stage.kind == "a-KD":
        return own
    classes = counts.identities[cfg.ethnicity if stage.kind == "teacher" else "All"]
    return own + 4 * cfg.embedding_size * classes


@functools.cache
def _bytes_of_network(network: str, embedding_size: int) -> int:
    with torch.device("meta"):
        return _bytes(build_backbone(network, embedding_size))


@functools.cache
def _bytes_of_adaptor(name: str, cfg: Config) -> int:
    with torch.device("meta"):
        return _bytes(build_adaptor(name, cfg))


def _bytes(module: torch.nn.Module) -> int:
    return sum(math.prod(value.shape) * value.element_size() for value in module.state_dict().values())
