"""Trained weights: finds them in a run folder and loads them, verified by their SHA-256."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from backbones import build_adaptor, build_backbone
from backbones.onnx_model import OnnxNetwork
from backbones.safetensors import read_safetensors
from backbones.state_dicts import adaptor_sizes_of, embedding_size_of, fit_state_dict
from config.config import Config
from utils.errors import Damaged, InputError
from utils.storage.files import sha256
from utils.storage.tensors import OURS, load_with_digest

SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors", ".onnx")
IDENTITIES = "identities"
"""Key in the metadata of a header's state dict, under which the identities of its classes are listed.

It is no parameter, so `load_state_dict` ignores it.
"""


def weights_in(folder: Path) -> list[Path]:
    """Returns every file of a backbone's weights in a run folder, our own and released ones, sorted by name.

    Released are `*backbone.pth`, and any name with another of SUFFIXES. Of files with the same stem the first by
    SUFFIXES counts, since export.py writes the others beside it. Headers are no backbones.
    """
    if not folder.is_dir():
        return []
    found: dict[str, Path] = {}
    for suffix in SUFFIXES:
        for path in folder.glob(f"*backbone{suffix}" if suffix == ".pth" else f"*{suffix}"):
            if not path.stem.endswith("header"):
                found.setdefault(path.stem, path)
    return sorted(found.values())


def find_weights(folder: Path, which: str) -> Path | None:
    """Returns the path of the backbone's weights in a run folder; None if there are none.

    That is a released file (see `weights_in`), or else our own `which` (best or last). Raises InputError if the folder
    holds several released files, or a released one beside our own.
    """
    found = weights_in(folder)
    released = [path for path in found if not OURS.fullmatch(path.name)]
    if released and len(found) > 1:
        raise InputError(f"{folder} holds {', '.join(path.name for path in found)}: keep the one that is to be used.")
    mine = folder / f"{which}_backbone.pth"
    return released[0] if released else mine if mine in found else None


def need_weights(folders: list[Path], which: str) -> list[Path]:
    """Returns `find_weights` of several run folders. Raises InputError that names all folders without weights."""
    found = [find_weights(folder, which) for folder in folders]
    missing = [str(folder) for folder, path in zip(folders, found, strict=True) if path is None]
    if missing:
        raise InputError(
            f"No {which}_backbone.pth in {', '.join(missing)}: train it first, or put a released *backbone.pth, or a "
            f"file of any name that ends with {', '.join(SUFFIXES[1:])}, there."
        )
    return found


def given_teachers(cfg: Config, names: tuple[str, ...]) -> list[Path]:
    """Returns the files that `cfg.teacher` names for the teachers `names`; raises InputError for another number."""
    paths = [Path(path) for path in cfg.teacher]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise InputError(f"There is no file {', '.join(missing)}: set teacher to files of weights.")
    if paths and len(paths) != len(names):
        raise InputError(f"teacher names {len(paths)} files: expected those of {', '.join(names)}, in this order.")
    return paths


def load_centres(weights: Path) -> tuple[torch.Tensor, tuple[str, ...], str]:
    """Returns the class centres (D, C) of the header that was trained with a backbone's `weights`.

    Also returns the identities of its classes, empty if the file does not list them (released ones do not), and the
    SHA-256 of the file. Raises InputError if there is no such header.
    """
    path = weights.with_name(weights.name.replace("backbone", "header"))
    if path == weights:
        raise InputError(f"{weights} has no header: its centres are needed beside it, in a file <step>header.pth.")
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
    """Returns the path of the backbone in a run folder whose SHA-256 is `digest`; None if there is none."""
    return next((path for path in weights_in(folder) if digest_of(path) == digest), None)


def digest_of(path: Path) -> str:
    """Returns the SHA-256 of a file of weights; of an .onnx file with weights in <name>.data, that of both digests."""
    beside = path.with_name(f"{path.name}.data")
    if path.suffix != ".onnx" or not beside.is_file():
        return sha256(path)
    return hashlib.sha256(f"{sha256(path)} {sha256(beside)}".encode()).hexdigest()


def load_weights(module: nn.Module, path: Path) -> str:
    """Loads a file of weights, of any tool (see `fit_state_dict`), and returns its SHA-256.

    Prints what was taken off, if the file holds more than the state dict. Raises InputError also if the file is one of
    ours and is corrupted.
    """
    content, digest = _load_verified(Path(path))
    _fit(module, content, path)
    return digest


def _fit(module: nn.Module, content: Any, path: Path) -> None:
    if note := fit_state_dict(module, content, path):
        print(f"Loaded {path}: {note}.")


def _load_verified(path: Path) -> tuple[Any, str]:
    """Returns the content and the SHA-256 of a file of weights. Raises InputError if it is corrupted."""
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        return read_safetensors(content, path), hashlib.sha256(content).hexdigest()
    try:
        return load_with_digest(path)
    except Damaged as error:
        raise InputError(f"{error}: start its training again, which writes it anew if it can.") from error


def load_backbone(name: str, path: Path, cfg: Config) -> tuple[nn.Module, str]:
    """Returns a trained network in eval mode, and the SHA-256 of the file that it was loaded from.

    Its embeddings have the size of those in the file, whatever `embedding_size` is. An .onnx file is the network
    itself, whatever `name` is; what is known of its input is printed.
    """
    if path.suffix == ".onnx":
        given = {"channel_order": cfg.onnx_channels, "input_mean": cfg.onnx_mean, "input_std": cfg.onnx_std}
        network = OnnxNetwork(path, given)
        print(network.described)
        return network.eval(), digest_of(path)
    content, digest = _load_verified(path)
    backbone = build_backbone(name, embedding_size_of(name, content) or cfg.embedding_size)
    _fit(backbone, content, path)
    return backbone.eval(), digest


def load_adaptor(name: str, path: Path, inputs: int, cfg: Config) -> tuple[nn.Module, str]:
    """Returns a trained adaptor of `inputs` dimensions, and the SHA-256 of its file, which gives its other sizes."""
    content, digest = _load_verified(path)
    middle, size = adaptor_sizes_of(content)
    sizes = {"embedding_size": size or cfg.embedding_size, "middle_layer_size": middle or cfg.middle_layer_size}
    adaptor = build_adaptor(name, replace(cfg, **sizes), inputs)  # type: ignore[arg-type]
    _fit(adaptor, content, path)
    return adaptor, digest


def size_of(network: nn.Module, cfg: Config) -> int:
    """Returns the number of dimensions of the outputs of a network or adaptor.

    Those that are built by name or read from an .onnx file have it as `embedding_size`; for others it is the setting.
    """
    return getattr(network, "embedding_size", cfg.embedding_size)


def input_of(*networks: nn.Module) -> dict[str, list[str]]:
    """Returns what `made_from` says of the input of `networks` beside their weights: of .onnx files, if unusual."""
    conventions = [network.convention if isinstance(network, OnnxNetwork) else "" for network in networks]
    return {"input": conventions} if any(conventions) else {}
