"""Strict loading of state dicts, published or written by this project."""

from pathlib import Path

import torch
from torch import nn

from backbones.adaptors import DualLayerAdaptor, SingleLayerAdaptor
from backbones.build import build_backbone
from backbones.iresnet import IResNet
from config.errors import InputError
from config.registry import NETWORKS, class_of


class UnexpectedAdaptor(InputError):
    """The state dict is that of an adaptor, but a face network was expected."""


# The published dual-layer adaptor saves these parameters but never uses them.
UNUSED_IN_PUBLISHED_ADAPTOR = ("attention.", "key_vector", "value_vector")


def load_weights(module: nn.Module, path: Path) -> None:
    """Loads the state dict in the file `path` strictly into `module`. Raises InputError as `fit_state_dict` does."""
    fit_state_dict(module, torch.load(path, map_location="cpu", weights_only=True), path)


def fit_state_dict(module: nn.Module, state: object, path: Path) -> None:
    """Loads a state dict, read from `path`, strictly into `module`.

    Ignores only the unused parameters of the published dual-layer adaptor. Raises InputError that lists the parameters
    that do not fit; the module is then unchanged. The error is UnexpectedAdaptor if a face network gets an adaptor.
    """
    if isinstance(state, dict) and "decided_by" in state:
        raise InputError(f"{path} is the checkpoint of a run: its weights are in best_backbone.pth beside it.")
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path} is no state dict: expected the parameters of one network.")
    if isinstance(module, DualLayerAdaptor):
        state = {name: value for name, value in state.items() if not name.startswith(UNUSED_IN_PUBLISHED_ADAPTOR)}
    expected = module.state_dict()
    wrong = {
        "missing": [name for name in expected if name not in state],
        "unknown": [name for name in state if name not in expected],
        "of another shape": [name for name in expected if name in state and state[name].shape != expected[name].shape],
    }
    found = [f"{len(names)} {what} ({', '.join(names[:2])})" for what, names in wrong.items() if names]
    if found:
        shapes = [
            f"{n} is {tuple(state[n].shape)}, not {tuple(expected[n].shape)}" for n in wrong["of another shape"][:1]
        ]
        text = "; ".join([f"parameters {', '.join(found)}", *shapes])
        is_adaptor = _is_adaptor(state) and not isinstance(module, SingleLayerAdaptor | DualLayerAdaptor)
        error = UnexpectedAdaptor if is_adaptor else InputError
        raise error(f"{path} does not fit this {type(module).__name__}: {text}. {_guess_network(state)}")
    module.load_state_dict(state)


def embedding_size_of(state: dict[str, torch.Tensor]) -> int:
    """Returns the number of dimensions of the outputs of a network or adaptor from its state dict; 0 if it is empty."""
    for name in ("fc2.weight", "fc.weight"):
        if _is_adaptor(state) and name in state:  # the last parameter of a published dual-layer one is unused
            return len(state[name])
    # The last parameter or statistic of every network has a row for each dimension.
    return next((len(value) for value in reversed(state.values()) if value.ndim), 0)


def _guess_network(state: dict[str, torch.Tensor]) -> str:
    """Returns a sentence that names the network that a state dict fits, by parameter names and shapes."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    size = embedding_size_of(state)
    with_se = [name for name, network in NETWORKS.items() if class_of(network) is IResNet]
    known = [(name, {}) for name in NETWORKS] + [(name, {"use_se": True}) for name in with_se]
    for name, options in known:
        with torch.device("meta"):
            expected = build_backbone(name, size, **options).state_dict()
        if shapes == {key: tuple(value.shape) for key, value in expected.items()}:
            return f"It looks like {name}{' with SE blocks' if options else ''}, embeddings of {size} numbers."
    if _is_adaptor(state) and "fc.weight" in shapes:
        return f"It looks like a single-layer adaptor from {shapes['fc.weight'][1]} to {size} numbers."
    if _is_adaptor(state):
        out, into = (
            shapes["fc2.weight"][0],
            shapes["fc1.weight"][1],
        )  # the last parameter of a published one is an unused one
        return f"It looks like a dual-layer adaptor from {into} to {out} numbers."
    if len(shapes.get("kernel", ())) == 2:
        return f"It looks like the header of {shapes['kernel'][1]} identities."
    return "It looks like none of the networks here."


def _is_adaptor(state: dict[str, torch.Tensor]) -> bool:
    """Returns True if the parameter names are those of an adaptor."""
    return state.keys() == {"fc.weight", "fc.bias"} or {"fc1.weight", "fc2.weight"} <= state.keys()
