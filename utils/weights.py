"""Trained weights: finds them in a run folder and loads them, verified by their SHA-256."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backbones import build_adaptor, build_backbone
from backbones.state_dicts import embedding_size_of, fit_state_dict
from config.config import Config
from utils.errors import Damaged, InputError
from utils.storage.files import sha256
from utils.storage.tensors import load_with_digest

IDENTITIES = "identities"
"""Key in the metadata of a header's state dict, under which the identities of its classes are listed.

It is no parameter, so `load_state_dict` ignores it.
"""


def find_weights(folder: Path, which: str) -> Path | None:
    """Returns the path of the backbone's state dict in a run folder; None if there is none.

    That is the released `<step>backbone.pth`, or else our own `which` (best or last). Raises InputError if the folder
    holds several released files, or a released one beside our own.
    """
    own = [folder / f"{kind}_backbone.pth" for kind in ("best", "last")]
    released = sorted(set(folder.glob("*backbone.pth")).difference(own))
    if released and len(found := released + [path for path in own if path.exists()]) > 1:
        raise InputError(f"{folder} holds {', '.join(path.name for path in found)}: keep the one that is to be used.")
    mine = folder / f"{which}_backbone.pth"
    return released[0] if released else mine if mine.exists() else None


def need_weights(folders: list[Path], which: str) -> list[Path]:
    """Returns `find_weights` of several run folders. Raises InputError that names all folders without weights."""
    found = [find_weights(folder, which) for folder in folders]
    missing = [str(folder) for folder, path in zip(folders, found, strict=True) if path is None]
    if missing:
        raise InputError(
            f"No {which}_backbone.pth in {', '.join(missing)}: train it first, or put a released *backbone.pth there."
        )
    return found


def load_centres(weights: Path) -> tuple[torch.Tensor, tuple[str, ...], str]:
    """Returns the class centres (D, C) of the header that was trained with a backbone's `weights`.

    Also returns the identities of its classes, empty if the file does not list them (released ones do not), and the
    SHA-256 of the file. Raises InputError if there is no such header.
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
    """Returns the path of the backbone in a run folder whose SHA-256 is `digest`, best, last or released; else None."""
    return next((path for path in sorted(folder.glob("*backbone.pth")) if sha256(path) == digest), None)


def load_weights(module: nn.Module, path: Path) -> str:
    """Loads a published or own state dict strictly (see `fit_state_dict`) and returns the SHA-256 of the file.

    Raises InputError if it does not fit, or if the file is one of ours and corrupted.
    """
    state, digest = _load_verified(Path(path))
    fit_state_dict(module, state, path)
    return digest


def _load_verified(path: Path) -> tuple[Any, str]:
    """Returns the content and the SHA-256 of a file of weights. Raises InputError if it is corrupted."""
    try:
        return load_with_digest(path)
    except Damaged as error:
        raise InputError(f"{error}: start its training again, which writes it anew if it can.") from error


def load_backbone(name: str, path: Path, cfg: Config) -> tuple[nn.Module, str]:
    """Returns a trained network in eval mode, and the SHA-256 of the file that it was loaded from.

    Its embeddings have the size of those in the file, whatever `embedding_size` is.
    """
    state, digest = _load_verified(path)
    backbone = build_backbone(name, _size_of(state) or cfg.embedding_size)
    fit_state_dict(backbone, state, path)
    return backbone.eval(), digest


def load_adaptor(name: str, path: Path, inputs: int, cfg: Config) -> tuple[nn.Module, str]:
    """Returns a trained adaptor of `inputs` dimensions, and the SHA-256 of its file, which gives its other sizes."""
    state, digest = _load_verified(path)
    first = state.get("fc1.weight") if isinstance(state, dict) else None
    middle = len(first) if isinstance(first, torch.Tensor) and first.ndim else cfg.middle_layer_size
    sizes = replace(cfg, embedding_size=_size_of(state) or cfg.embedding_size, middle_layer_size=middle)
    adaptor = build_adaptor(name, sizes, inputs)
    fit_state_dict(adaptor, state, path)
    return adaptor, digest


def size_of(network: nn.Module) -> int:
    """Returns the number of dimensions of the outputs of a network or adaptor."""
    return embedding_size_of(network.state_dict())


def _size_of(state: Any) -> int:
    """Returns `embedding_size_of` the content of a file; 0 if it is no state dict."""
    is_state = isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())
    return embedding_size_of(state) if is_state else 0
