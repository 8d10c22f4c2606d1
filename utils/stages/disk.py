"""Disk space that the stages need on each file system, and the check that it is free."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from config.config import Config
from utils.data.store import printed_bytes
from utils.errors import InputError
from utils.stages.paper import Stage
from utils.stages.work import IMAGE, Counts, bytes_of, bytes_while_saving


@dataclass(frozen=True)
class Item:
    """A group of files that a setting (`cache` or `output`) places, with their bytes in the end and at present."""

    what: str
    setting: str  # cache | output, the folder that holds the files
    needed: int  # bytes in the end
    there: int  # bytes that exist already


@dataclass(frozen=True)
class Room:
    """A file system, with the bytes that are needed on it, exist already, and are free."""

    settings: tuple[str, ...]  # settings whose folders are on it
    folder: Path
    needed: int  # bytes in the end
    there: int  # bytes that exist already
    free: int  # bytes

    @property
    def suffices(self) -> bool:
        """True if the missing bytes are free."""
        return self.needed - self.there <= self.free

    def __str__(self) -> str:
        sizes = f"{printed_bytes(self.needed)} needed, {printed_bytes(self.there)} of it there already"
        return f"{' and '.join(self.settings)} ({self.folder}): {sizes}, {printed_bytes(self.free)} free"


def items(stages: list[Stage], cfg: Config, counts: Counts, slots: int) -> list[Item]:
    """Returns all files that the stages write; `slots` stages run, and may save, at the same time."""
    images = counts.images["All"] * IMAGE
    pairs = sum(counts.pairs.values()) * IMAGE
    folder = Path(cfg.cache, "pairs")
    cached = [path for file in cfg.pairs_files.values() for path in folder.glob(f"{file.stem}-*.npy*")]
    found = [
        _item("decoded images", "cache", [(images, cfg.cache_dir.glob("images.npy*"))]),
        _item("decoded pairs", "cache", [(pairs, cached)]),
    ]
    written = {path: size for stage in stages for path, size in bytes_of(stage, counts).items()}
    arrays = [(size, [path, *path.parent.glob(f"{path.name}.*")]) for path, size in written.items() if path.suffix]
    runs = [(size, path.glob("*.pth")) for path, size in written.items() if not path.suffix]
    saving = sorted(bytes_while_saving(stage, counts) for stage in stages)[-slots:]
    return [
        *found,
        _item("embeddings", "output", arrays),
        _item("weights and checkpoints", "output", runs),
        Item("checkpoints while they are written", "output", sum(saving), 0),
    ]


def _item(what: str, setting: str, parts: Sequence[tuple[int, Iterable[Path]]]) -> Item:
    there = sum(min(size, sum(path.stat().st_size for path in paths if path.is_file())) for size, paths in parts)
    return Item(what, setting, sum(size for size, _ in parts), there)


def rooms(found: list[Item], cfg: Config) -> list[Room]:
    """Groups items by file system; returns one Room for each."""
    by_device: dict[int, tuple[Path, list[Item]]] = {}
    for item in found:
        folder = Path(getattr(cfg, item.setting)).absolute()
        folder = next(path for path in (folder, *folder.parents) if path.is_dir())
        by_device.setdefault(_file_system(folder), (folder, []))[1].append(item)
    return [
        Room(
            tuple(dict.fromkeys(item.setting for item in own)),
            folder,
            sum(item.needed for item in own),
            sum(item.there for item in own),
            shutil.disk_usage(folder).free,
        )
        for folder, own in by_device.values()
    ]


def _file_system(folder: Path) -> int:
    return folder.stat().st_dev


def require_room(found: list[Room]) -> None:
    """Raises InputError, with the sizes, if a file system does not have enough free space."""
    for room in found:
        if not room.suffices:
            lacking = printed_bytes(room.needed - room.there - room.free)
            advice = f"free {lacking}, or set {' or '.join(room.settings)} to a larger disk"
            raise InputError(f"The disk does not suffice for {room}: {advice}.")
