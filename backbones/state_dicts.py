"""Finds the state dict of a network or adaptor in what a file holds, and loads it strictly.

Other tools save more than a state dict: wrappers put a prefix before every name (`module.`, `_orig_mod.`, `model.`),
trainers put it into a dictionary (`state_dict`, `model`, `state_dict_backbone`), and some keep the classifier with it.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from backbones.adaptors import DualLayerAdaptor, SingleLayerAdaptor
from backbones.build import build_backbone
from backbones.iresnet import IResNet
from backbones.safetensors import read_safetensors
from config.errors import InputError
from config.registry import NETWORKS, class_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
State = dict[str, torch.Tensor]


class UnexpectedAdaptor(InputError):
    """The state dict is that of an adaptor, but a face network was expected."""


# The published dual-layer adaptor saves these parameters but never uses them.
UNUSED_IN_PUBLISHED_ADAPTOR = ("attention.", "key_vector", "value_vector")
COUNTER = "num_batches_tracked"  # of BatchNorm, which uses it only if its momentum is None: some tools leave it out
DEPTH = 3  # dictionaries in dictionaries that are searched for a state dict


@dataclass(frozen=True)
class Found:
    """A state dict in a file that fits a network."""

    where: str  # the keys of the nested dictionary that holds it, "" for the file itself
    prefix: str  # what stands before every name
    state: State  # the parameters under their own names
    left_out: tuple[str, ...]  # names beside the network

    @property
    def place(self) -> str:
        return f"{self.where or 'the file'}{f' under {self.prefix!r}' if self.prefix else ''}"


def load_weights(module: nn.Module, path: Path) -> str:
    """Loads the weights in the file `path` into `module`; raises InputError and returns text as `fit_state_dict` does.

    Reads `.safetensors`, and else what torch.load reads with weights_only=True.
    """
    if path.suffix == ".safetensors":
        content = read_safetensors(path.read_bytes(), path)
    else:
        content = torch.load(path, map_location="cpu", weights_only=True)
    return fit_state_dict(module, content, path)


def fit_state_dict(module: nn.Module, content: object, path: Path) -> str:
    """Loads the one state dict in `content`, read from `path`, that fits `module`; every parameter must be there.

    Returns what was taken off or left out as text, "" if `content` is exactly the state dict. Raises InputError if
    several state dicts fit, or if none does, with the parameters that do not fit; the module is then unchanged. The
    error is UnexpectedAdaptor if a face network gets an adaptor.
    """
    if isinstance(content, dict) and "decided_by" in content:
        raise InputError(f"{path} is the checkpoint of a run: its weights are in best_backbone.pth beside it.")
    candidates = [*_nested(content)]
    if not candidates:
        raise InputError(f"{path} is no state dict: expected the parameters of one network.")
    if isinstance(module, DualLayerAdaptor):
        candidates = [(where, _without_unused(state)) for where, state in candidates]
    expected = module.state_dict()
    found = [one for where, state in candidates for one in _fits(where, state, expected)]
    if len(found) > 1 and not _are_equal(found):
        places = ", ".join(one.place for one in found)
        raise InputError(
            f"{path} holds several state dicts that fit this {type(module).__name__} ({places}): "
            "save the one you mean in a file of its own."
        )
    if not found:
        raise _misfit(module, expected, candidates, path)
    _require_floats(found[0].state, expected, path)
    missing = expected.keys() - found[0].state.keys()  # counters only
    module.load_state_dict(found[0].state | {name: expected[name] for name in missing})
    return _described(found[0], len(missing))


def _require_floats(state: State, expected: State, path: Path) -> None:
    """Raises InputError for weights that PyTorch would convert without a word, or that are not finite."""
    for name, value in state.items():
        if not expected[name].is_floating_point():
            continue
        if value.layout != torch.strided or value.dtype not in FLOATS:
            kind = str(value.layout if value.layout != torch.strided else value.dtype).removeprefix("torch.")
            raise InputError(f"{path} holds {name} as {kind}: save the weights as dense floating-point numbers.")
        if not value.isfinite().all():
            raise InputError(f"{path} holds numbers in {name} that are not finite: its training has failed.")


def _nested(content: object, where: str = "", depth: int = DEPTH) -> Iterator[tuple[str, State]]:
    """Yields every dictionary in `content`, itself included, that holds tensors by name, reduced to these."""
    if not isinstance(content, dict) or depth < 0:
        return
    state = {name: value for name, value in content.items() if isinstance(name, str) and torch.is_tensor(value)}
    if state:
        yield where, state
    for name, value in content.items():
        if isinstance(name, str):
            yield from _nested(value, f"{where}.{name}" if where else name, depth - 1)


def _without_unused(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith(UNUSED_IN_PUBLISHED_ADAPTOR)}


def _fits(where: str, state: State, expected: State) -> Iterator[Found]:
    """Yields each part of `state` whose names, without a common prefix, and shapes are the `expected` ones."""
    for prefix in _prefixes(state, expected):
        inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        own = {name: value for name, value in inside.items() if name in expected}
        if any(value.shape != expected[name].shape for name, value in own.items()):
            continue
        beside = {name: value for name, value in inside.items() if name not in expected}
        if _are_heads(beside, expected):
            outside = [name for name in state if not name.startswith(prefix)]
            yield Found(where, prefix, own, (*outside, *(prefix + name for name in beside)))


def _prefixes(names: State, expected: State) -> list[str]:
    """Returns every prefix under which all `expected` names are among `names`, counters of BatchNorm aside."""
    needed = [name for name in expected if not name.endswith(COUNTER)]
    ends = [name.removesuffix(needed[0]) for name in names if name.endswith(needed[0])]
    return [
        prefix
        for prefix in ends
        if (not prefix or prefix.endswith(".")) and all(prefix + name in names for name in needed)
    ]


def _are_heads(beside: State, expected: State) -> bool:
    """Whether parameters beside those of a network are classifiers on its output, not layers that it lacks.

    A head has a name of its own, no convolution, and a matrix with one side as long as the network's output.
    """
    sizes = {value.shape[0] for value in expected.values() if value.ndim == 2}
    own = {name.split(".")[0] for name in expected}
    groups: dict[str, list[torch.Tensor]] = {}
    for name, value in beside.items():
        groups.setdefault(name.split(".")[0], []).append(value)
    return all(
        name not in own
        and max(value.ndim for value in values) <= 2
        and any(value.ndim == 2 and sizes & {*value.shape} for value in values)
        for name, values in groups.items()
    )


def _are_equal(found: list[Found]) -> bool:
    first = found[0].state
    return all(
        one.state.keys() == first.keys() and all(torch.equal(one.state[name], first[name]) for name in first)
        for one in found[1:]
    )


def _described(found: Found, missing: int) -> str:
    parts = [f"its {found.where}"] if found.where else []
    parts += [f"prefix {found.prefix!r} taken off"] if found.prefix else []
    if found.left_out:
        more = f" and {len(found.left_out) - 3} more" if len(found.left_out) > 3 else ""
        parts.append(f"left out: {', '.join(found.left_out[:3])}{more}")
    parts += [f"{missing} counters ({COUNTER}) are missing and not needed"] if missing else []
    return "; ".join(parts)


# Files that do not fit ------------------------------------------------------------------------------------------------


def _misfit(module: nn.Module, expected: State, candidates: list[tuple[str, State]], path: Path) -> InputError:
    """Returns the error that lists the parameters of the closest candidate that do not fit."""
    stripped = [_stripped(state) for _, state in candidates]
    state = max(stripped, key=lambda one: (len(one.keys() & expected.keys()), len(one)))
    wrong = {
        "missing": [name for name in expected if name not in state],
        "unknown": [name for name in state if name not in expected],
        "of another shape": [name for name in expected if name in state and state[name].shape != expected[name].shape],
    }
    found = [f"{len(names)} {what} ({', '.join(names[:2])})" for what, names in wrong.items() if names]
    shapes = [f"{n} is {tuple(state[n].shape)}, not {tuple(expected[n].shape)}" for n in wrong["of another shape"][:1]]
    text = "; ".join([f"parameters {', '.join(found)}", *shapes])
    is_adaptor = _is_adaptor(state) and not isinstance(module, SingleLayerAdaptor | DualLayerAdaptor)
    error = UnexpectedAdaptor if is_adaptor else InputError
    return error(f"{path} does not fit this {type(module).__name__}: {text}. {_guess_network(candidates, state)}")


def embedding_size_of(name: str, content: object) -> int:
    """Returns the embedding size with which the network `name` fits a state dict in `content`; 0 if none fits."""
    names = _shaped(name, 512, False)
    for where, state in _nested(content):
        sizes = {value.shape[0] for value in state.values() if value.ndim == 2} if _prefixes(state, names) else ()
        for size in sizes:
            if any(_fits(where, state, _shaped(name, size, False))):
                return size
    return 0


def adaptor_sizes_of(content: object) -> tuple[int, int]:
    """Returns the dimensions between the layers (0 for a single layer) and of the outputs of an adaptor in `content`.

    Returns (0, 0) if there is none.
    """
    for _, nested in _nested(content):
        state = _stripped(nested)
        if _is_adaptor(state):
            single = "fc.weight" in state
            return (0, len(state["fc.weight"])) if single else (len(state["fc1.weight"]), len(state["fc2.weight"]))
    return 0, 0


def _stripped(state: State) -> State:
    """Returns the state dict without the prefix that all of its names share, "fc." of an adaptor aside."""
    first = next(iter(state))
    while "." in first and not _is_adaptor(state) and all(name.startswith(first.split(".")[0] + ".") for name in state):
        state = {name.split(".", 1)[1]: value for name, value in state.items()}
        first = next(iter(state))
    return state


def _guess_network(candidates: list[tuple[str, State]], state: State) -> str:
    """Returns a sentence that names the networks that one of the candidates fits, by parameter names and shapes."""
    if _is_adaptor(state) and "fc.weight" in state:
        size, inputs = state["fc.weight"].shape
        return f"It looks like a single-layer adaptor from {inputs} to {size} numbers."
    if _is_adaptor(state):
        inputs, size = state["fc1.weight"].shape[1], state["fc2.weight"].shape[0]
        return f"It looks like a dual-layer adaptor from {inputs} to {size} numbers."
    if state.keys() == {"kernel"} and state["kernel"].ndim == 2:
        return f"It looks like the header of {state['kernel'].shape[1]} identities."
    found: dict[int, list[str]] = {}
    for name, use_se in _known():
        names = _shaped(name, 512, use_se)
        for where, one in candidates:
            sizes = {value.shape[0] for value in one.values() if value.ndim == 2} if _prefixes(one, names) else ()
            for size in sizes:
                if any(_fits(where, one, _shaped(name, size, use_se))):
                    found.setdefault(size, []).append(f"{name}{' with SE blocks' if use_se else ''}")
    if not found:
        return "It looks like none of the networks here."
    size, fitting = next(iter(found.items()))
    return f"It looks like {' or '.join(dict.fromkeys(fitting))}, embeddings of {size} numbers."


def _known() -> list[tuple[str, bool]]:
    """Returns the names of all networks, iresnets without and with squeeze-and-excitation (True)."""
    with_se = [name for name, network in NETWORKS.items() if class_of(network) is IResNet]
    return [(name, False) for name in NETWORKS] + [(name, True) for name in with_se]


@functools.cache
def _shaped(name: str, embedding_size: int, use_se: bool) -> State:
    """Returns the state dict of a network without its numbers."""
    with torch.device("meta"):
        return build_backbone(name, embedding_size, **({"use_se": True} if use_se else {})).state_dict()


def _is_adaptor(state: State) -> bool:
    """Returns True if the parameter names are those of an adaptor."""
    return state.keys() == {"fc.weight", "fc.bias"} or {"fc1.weight", "fc2.weight"} <= state.keys()
