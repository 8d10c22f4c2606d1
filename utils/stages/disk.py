"""What the stages take on each file system, and whether there is room for it."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from config.config import Config
from utils.data.store import printed_bytes
from utils.errors import InputError
from utils.stages.paper import Stage
from utils.stages.work import IMAGE, Counts, bytes_of, bytes_while_saving


@dataclass(frozen=True)
class Item:
    """Files that will take so many bytes together, and what of them is there already."""

    what: str
    setting: str  # that decides where they lie: cache or output
    needed: int
    there: int


@dataclass(frozen=True)
class Room:
    """A file system: which settings lead to it, and how much is needed on it, there already and free."""

    settings: tuple[str, ...]
    folder: Path
    needed: int
    there: int
    free: int

    @property
    def suffices(self) -> bool:
        return self.needed - self.there <= self.free

    def __str__(self) -> str:
        sizes = f"{printed_bytes(self.needed)} needed, {printed_bytes(self.there)} of it there already"
        return f"{' and '.join(self.settings)} ({self.folder}): {sizes}, {printed_bytes(self.free)} free"


def items(stages: list[Stage], cfg: Config, counts: Counts, slots: int) -> list[Item]:
    """All that is written; with so many `slots` as many checkpoints may be written at once."""
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


def _item(what: str, setting: str, parts: list[tuple[int, Iterable[Path]]]) -> Item:
    there = sum(min(size, sum(path.stat().st_size for path in paths if path.is_file())) for size, paths in parts)
    return Item(what, setting, sum(size for size, _ in parts), there)


def rooms(found: list[Item], cfg: Config) -> list[Room]:
    """One for each file system that the items lie on."""
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
    """Raises InputError for a file system that is too small, with the numbers."""
    for room in found:
        if not room.suffices:
            lacking = printed_bytes(room.needed - room.there - room.free)
            advice = f"free {lacking}, or set {' or '.join(room.settings)} to a larger disk"
            raise InputError(f"The disk does not suffice for {room}: {advice}.")
