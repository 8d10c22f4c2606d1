"""Run folders: weights in the published format, the checkpoint a run continues from, and what decided the run.

best_backbone.pth  best_header.pth   state dicts of the best epoch
last_backbone.pth  last_header.pth   state dicts of the last finished epoch
checkpoint.pth                       everything the run needs to go on: weights, optimizer, position, log
config.json                          settings, data and versions
identities.txt                       the identity of each class, in order
log.jsonl                            one line of metrics per epoch
"""

import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from config.config import Config
from utils.errors import InputError
from utils.files import replaced, sha256, write_json, write_text


def save(path: Path, value: Any) -> None:
    with replaced(path) as partial:
        try:
            torch.save(value, partial)
        except RuntimeError as error:  # how PyTorch reports a disk that is full
            raise OSError(str(error).strip().split("\n")[0]) from error


def load(path: Path, mapped: bool = False) -> Any:
    """Reads tensors and plain values to the CPU; refuses whatever else a file holds, so that none can run code.

    `mapped` leaves the tensors on the disk until they are used.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except Exception as error:
        # torch.load has no exception of its own: what it raises on a damaged file depends on where the damage is.
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{path} is damaged or holds more than tensors ({reason}): replace it, or move its folder away."
        ) from error


def find_weights(folder: Path, which: str) -> Path | None:
    """The backbone's state dict in a run folder: the released `<step>backbone.pth`, else our own `which` (best, last).

    None where there is none. Raises InputError where it cannot be known which file is meant.
    """
    own = [folder / f"{kind}_backbone.pth" for kind in ("best", "last")]
    released = sorted(set(folder.glob("*backbone.pth")).difference(own))
    if released and len(found := released + [path for path in own if path.exists()]) > 1:
        raise InputError(f"{folder} holds {', '.join(path.name for path in found)}: keep the one that is to be used.")
    mine = folder / f"{which}_backbone.pth"
    return released[0] if released else mine if mine.exists() else None


def need_weights(folders: list[Path], which: str) -> list[Path]:
    """Like `find_weights` for several run folders; raises InputError that names all where there is none."""
    found = [find_weights(folder, which) for folder in folders]
    missing = [str(folder) for folder, path in zip(folders, found, strict=True) if path is None]
    if missing:
        raise InputError(
            f"No {which}_backbone.pth in {', '.join(missing)}: train it first, or put a released *backbone.pth there."
        )
    return found


def weights_with_digest(folder: Path, digest: str) -> Path | None:
    """The backbone in a run folder whose SHA-256 is `digest`, be it the best, the last or a released one."""
    return next((path for path in sorted(folder.glob("*backbone.pth")) if sha256(path) == digest), None)


class Run:
    """One run folder: belongs to the settings and data that its first checkpoint was made with."""

    def __init__(self, folder: Path, cfg: Config, sources: dict, identities: tuple[str, ...]):
        """Raises InputError where the folder holds a run of other settings or data."""
        self.folder = folder
        self.checkpoint = folder / "checkpoint.pth"
        self.identities = identities
        self.decided_by = {"settings": _plain(cfg.decisive(kind_of(folder))), "sources": sources}
        self.about = {**self.decided_by, "all settings": asdict(cfg), "versions": versions()}
        if self.checkpoint.exists() and (different := _differences(decided_by(self.checkpoint), self.decided_by)):
            raise InputError(
                f"{self.folder} holds a run with other settings or data ({'; '.join(different)}): "
                "set them as they were, set another output, or move the folder away to train anew."
            )

    def load(self) -> dict | None:
        """The state of the last checkpoint, or None where the run has none."""
        return load(self.checkpoint) if self.checkpoint.exists() else None

    def save(self, state: dict) -> None:
        if not self.checkpoint.exists():
            write_text(self.folder / "identities.txt", "".join(f"{name}\n" for name in self.identities))
            write_json(self.folder / "config.json", self.about)
        save(self.checkpoint, {**state, "decided_by": self.decided_by})

    def save_weights(self, which: str, backbone: nn.Module, header: nn.Module | None) -> None:
        save(self.folder / f"{which}_backbone.pth", backbone.state_dict())
        if header is not None:
            save(self.folder / f"{which}_header.pth", header.state_dict())


def decided_by(checkpoint: Path) -> dict:
    """The settings and sources that decided the run of a checkpoint, without reading its weights."""
    state = load(checkpoint, mapped=True)
    if not isinstance(state, dict) or "decided_by" not in state:
        raise InputError(f"{checkpoint} is no checkpoint of a run: move its folder away to train anew.")
    return state["decided_by"]


def kind_of(folder: Path) -> str:
    """teachers, adaptors or students: the folder that a run folder lies in, <output>/<setting>/<network>/<kind>/..."""
    return next(part for part in reversed(folder.parts) if part in ("teachers", "adaptors", "students"))


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": metadata.version("torchvision"),
        "numpy": np.__version__,
        "cuda": str(torch.version.cuda),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
    }


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as config.json shows them: tuples become lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def _differences(stored: dict, now: dict) -> list[str]:
    found = []
    for part in now:
        before, after = stored.get(part, {}), now[part]
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                change = f" was {before.get(name)!r}, now {after.get(name)!r}" if part == "settings" else " changed"
                found.append(name + change)
    return found
