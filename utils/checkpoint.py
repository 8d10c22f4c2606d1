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
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn

from config.config import Config
from utils.errors import InputError
from utils.files import read_json, replaced, write_json, write_text


def save(path: Path, value: Any) -> None:
    with replaced(path) as partial:
        torch.save(value, partial)


def load(path: Path) -> Any:
    """Reads tensors and plain values to the CPU; refuses whatever else a file holds, so that none can run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except Exception as error:
        # torch.load has no exception of its own: what it raises on a damaged file depends on where the damage is.
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path} is damaged or no checkpoint of tensors ({reason}).") from error


def find_released(folder: Path) -> Path | None:
    """The `<step>backbone.pth` of the published code that was put into a run folder, or None.

    Raises InputError where it is not alone, and it cannot be known which file is meant.
    """
    own = [folder / f"{which}_backbone.pth" for which in ("best", "last")]
    released = sorted(set(folder.glob("*backbone.pth")).difference(own))
    if released and len(found := released + [path for path in own if path.exists()]) > 1:
        raise InputError(f"{folder} holds {', '.join(path.name for path in found)}: keep the one that is to be used.")
    return released[0] if released else None


def find_weights(folder: Path, which: str) -> Path | None:
    """The backbone's state dict in a run folder: the released one, else our `<which>_backbone.pth`, else None."""
    own = folder / f"{which}_backbone.pth"
    return find_released(folder) or (own if own.exists() else None)


def need_weights(folder: Path, which: str) -> Path:
    """Like `find_weights`, but raises InputError where there is none."""
    found = find_weights(folder, which)
    if found is None:
        raise InputError(
            f"{folder} holds no {which}_backbone.pth: train it first, or put a released *backbone.pth there."
        )
    return found


class Run:
    """One run folder: claims it for these settings and this data, and keeps its files."""

    def __init__(self, folder: Path, cfg: Config, sources: dict, identities: tuple[str, ...]):
        """Raises InputError where the folder holds a run of other settings or data."""
        self.folder = folder
        kind = folder.relative_to(cfg.network_dir).parts[0]
        self.decided_by = {"settings": _plain(cfg.decisive(kind)), "sources": sources}
        config = folder / "config.json"
        if config.exists():
            different = _differences(read_json(config), self.decided_by)
            if different:
                raise InputError(
                    f"{folder} holds a run with other settings or data ({'; '.join(different)}): "
                    "set them as they were, set another output, or move the folder away to train anew."
                )
        else:
            write_text(folder / "identities.txt", "".join(f"{name}\n" for name in identities))
            write_json(config, {**self.decided_by, "all settings": _plain(asdict(cfg)), "versions": versions()})

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pth"

    def save_weights(self, which: str, backbone: nn.Module, header: nn.Module | None) -> None:
        save(self.folder / f"{which}_backbone.pth", backbone.state_dict())
        if header is not None:
            save(self.folder / f"{which}_header.pth", header.state_dict())


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "cuda": str(torch.version.cuda),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
    }


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as JSON gives them back: tuples become lists."""
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
