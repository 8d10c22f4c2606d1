"""Trained weights: where they lie in a run folder, and loading them, verified by their SHA-256."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backbones import build_backbone
from backbones.safetensors import read_safetensors
from backbones.state_dicts import fit_state_dict
from config.config import Config
from utils.errors import Damaged, InputError
from utils.storage.files import sha256
from utils.storage.tensors import load_with_digest

IDENTITIES = "identities"
"""Where a header's state dict says which identity each of its classes is: no parameter, whoever loads it skips it."""


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


def load_centres(weights: Path) -> tuple[torch.Tensor, tuple[str, ...], str]:
    """Class centres (D, C) of the header that was trained with a backbone's `weights`.

    Also the identities of its classes, empty where it does not say (released ones do not), and the file's SHA-256.
    Raises InputError where there is no such header.
    """
    path = weights.with_name(weights.name.replace("backbone", "header"))
    state, digest = _load_verified(path)
    kernel = state.get("kernel") if isinstance(state, dict) else None
    is_dense = isinstance(kernel, torch.Tensor) and kernel.layout == torch.strided and kernel.is_floating_point()
    if not is_dense or kernel.ndim != 2:
        raise InputError(f"{path} is no header: expected its centres, kernel (dimensions, classes).")
    about = getattr(state, "_metadata", {})
    about = about.get("") if isinstance(about, dict) else None
    identities = about.get(IDENTITIES, ()) if isinstance(about, dict) else ()
    return kernel, tuple(identities), digest


def weights_with_digest(folder: Path, digest: str) -> Path | None:
    """The backbone in a run folder whose SHA-256 is `digest`, be it the best, the last or a released one."""
    return next((path for path in sorted(folder.glob("*backbone.pth")) if sha256(path) == digest), None)


def load_weights(module: nn.Module, path: Path) -> str:
    """Loads a file of weights, of any tool (see `fit_state_dict`), and returns its SHA-256.

    Prints what was taken off, if the file holds more than the state dict. Raises InputError also if the file is one of
    ours and is corrupted.
    """
    content, digest = _load_verified(Path(path))
    if note := fit_state_dict(module, content, path):
        print(f"Loaded {path}: {note}.")
    return digest


def _load_verified(path: Path) -> tuple[Any, str]:
    """Returns the content and the SHA-256 of a file of weights; InputError for a damaged one says how to restore it."""
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        return read_safetensors(content, path), hashlib.sha256(content).hexdigest()
    try:
        return load_with_digest(path)
    except Damaged as error:
        raise InputError(f"{error}: start its training again, which writes it anew if it can.") from error


def load_backbone(name: str, path: Path, cfg: Config) -> tuple[nn.Module, str]:
    """A trained network in eval mode, and the SHA-256 of the file that it was loaded from."""
    backbone = build_backbone(name, cfg.embedding_size)
    digest = load_weights(backbone, path)
    return backbone.eval(), digest
