"""Any face network in an ONNX file, as a module: it needs no definition in PyTorch, only onnxruntime."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from config.errors import InputError

SIDE = 112
NEUTRAL = (127.5,) * 3
"""Mean and standard deviation of each channel with which values of 0 ... 255 become [-1, 1]."""
NUMBERS = ("input_mean", "input_std")
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxNetwork(nn.Module):
    """Face network: RGB images (B, 3, 112, 112) in [-1, 1] -> features (B, embedding_size), as the file computes them.

    The file takes one image tensor, as (B, 3, 112, 112) or (B, 112, 112, 3), of any or of one fixed batch size. Its
    metadata may say `channel_order` (RGB or BGR), `input_mean` and `input_std` (of values 0 ... 255, one number or
    three, separated by commas); `given` holds the same for a file that does not say. Defaults: RGB, 127.5 and 127.5.

    Raises InputError if onnxruntime is not installed or cannot read the file, if the file does not take such images, or
    if it is not clear which of its outputs is the embedding.
    """

    def __init__(self, path: Path, given: Mapping[str, Any] | None = None):
        super().__init__()
        self.path, self._sessions = path, {}
        session = self._session(torch.device("cpu"))
        metadata = session.get_modelmeta().custom_metadata_map
        given = {name: value for name, value in (given or {}).items() if value is not None}
        own = {name: metadata[name] for name in ("channel_order", *NUMBERS) if name in metadata}
        said = given | own
        sources = {"its metadata": own, "settings": given.keys() - own.keys(), "defaults": len(said) < 3}
        self._source = ", ".join(name for name, used in sources.items() if used)
        self.channels = str(said.get("channel_order", "RGB")).upper()
        if self.channels not in ("RGB", "BGR"):
            raise InputError(f"{path}: its channel_order is {self.channels}: expected RGB or BGR.")
        self.mean, self.std = (_numbers(path, name, said.get(name, NEUTRAL)) for name in NUMBERS)
        self._read_input(session)
        self._read_output(session)

    @property
    def convention(self) -> str:
        """The input that the file gets, as part of a file name; "" if it is the default: RGB, scaled to [-1, 1]."""
        scaling = "" if self.mean == self.std == NEUTRAL else f"mean {_short(self.mean)} std {_short(self.std)}"
        return " ".join(filter(None, ("BGR" if self.channels == "BGR" else "", scaling)))

    @property
    def described(self) -> str:
        """A sentence that says what the file gets and gives."""
        batch = f"batches of {self._batch}" if self._batch else "batches of any size"
        scaling = f"mean {_short(self.mean)}, std {_short(self.std)}"
        return f"{self.path}: {self.channels}, {scaling} ({self._source}), {batch}; {self.embedding_size} numbers."

    def _session(self, device: torch.device):
        """Returns the session for a device, made when it is first needed."""
        if device not in self._sessions:
            self._sessions[device] = _session(self.path, device)
        return self._sessions[device]

    def _read_input(self, session: Any) -> None:
        inputs = session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in TYPES:
            found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
            raise InputError(f"{self.path} takes {found}: expected one image tensor (batch, 3, 112, 112) of floats.")
        self._input, self._type = inputs[0].name, TYPES[inputs[0].type]
        batch, *shape = (size if isinstance(size, int) and size > 0 else None for size in inputs[0].shape)
        self._batch = batch
        self._channels_last = shape[2] == 3 and shape[0] != 3
        channels, *sides = [shape[2], *shape[:2]] if self._channels_last else shape
        if channels not in (3, None) or any(side not in (SIDE, None) for side in sides):
            raise InputError(f"{self.path} takes images of shape {tuple(shape)}: faces here are 3 x {SIDE} x {SIDE}.")

    def _read_output(self, session: Any) -> None:
        """Finds the output that holds one vector per image, by computing some; a batch may be fixed without saying."""
        count = self._batch or 2
        arrays = self._outputs(session, count)
        if not self._batch and not any(len(array) == count for array in arrays.values()):
            self._batch = count = 1
            arrays = self._outputs(session, count)
        if not arrays:
            raise InputError(f"{self.path} cannot be computed for images of {SIDE} x {SIDE}: {self._failure}")
        sizes = {name: array.size // count for name, array in arrays.items() if len(array) == count}
        vectors = {name: size for name, size in sizes.items() if size == max(arrays[name].shape[1:], default=0) > 1}
        if len(vectors) != 1:
            found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise InputError(f"{self.path} gives {found}: expected one output (batch, size), the embedding.")
        ((self._output, self.embedding_size),) = vectors.items()

    def _outputs(self, session: Any, count: int) -> dict[str, np.ndarray]:
        """Returns the outputs for black images by name, none if the file cannot compute so many at once."""
        image = np.zeros((count, 3, SIDE, SIDE), np.float32)
        names = [one.name for one in session.get_outputs()]
        try:
            arrays = session.run(names, {self._input: self._as_input(image)})
        except Exception as error:  # onnxruntime's exceptions have no base class of their own
            self._failure = _line(error)
            return {}
        return {name: one for name, one in zip(names, arrays, strict=True) if isinstance(one, np.ndarray) and one.ndim}

    def _as_input(self, image: np.ndarray) -> np.ndarray:
        image = image.transpose(0, 2, 3, 1) if self._channels_last else image
        return np.ascontiguousarray(image, self._type)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        session, scaled = self._session(image.device), self._scaled(image.float()).cpu().numpy()
        batch = self._batch or len(scaled)
        features = []
        for first in range(0, len(scaled), batch):
            part = scaled[first : first + batch]
            filled = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), part.dtype)])
            (found,) = session.run([self._output], {self._input: self._as_input(filled)})
            features.append(np.asarray(found, np.float32).reshape(batch, -1)[: len(part)])
        return torch.from_numpy(np.concatenate(features)).to(image.device)

    def _scaled(self, image: torch.Tensor) -> torch.Tensor:
        """Turns RGB images in [-1, 1] into what the file expects."""
        image = image.flip(1) if self.channels == "BGR" else image
        if self.mean == self.std == NEUTRAL:
            return image
        mean, std = (image.new_tensor(numbers).view(1, 3, 1, 1) for numbers in (self.mean, self.std))
        return ((image + 1) * 127.5 - mean) / std


def _session(path: Path, device: torch.device) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(f"{path} needs a package that is not installed: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors: a warning for every batch of another size than the file declares
    providers: list = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        else:
            print(f"{path} is computed on the CPU: for the GPU, pip install onnxruntime-gpu.")
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no base class of their own
        raise InputError(f"onnxruntime {onnxruntime.__version__} cannot read {path} ({_line(error)}).") from error


def _numbers(path: Path, name: str, value: str | Sequence[float]) -> tuple[float, ...]:
    """Returns three numbers from one or three, in a list or separated by commas."""
    try:
        numbers = tuple(float(part) for part in (value.split(",") if isinstance(value, str) else value))
    except ValueError:
        numbers = ()
    numbers = numbers * 3 if len(numbers) == 1 else numbers
    if len(numbers) != 3 or not np.isfinite(numbers).all() or (name == "input_std" and min(numbers) <= 0):
        raise InputError(f"{path}: its {name} is {value!r}: expected one number or three, for values of 0 to 255.")
    return numbers


def _short(numbers: tuple[float, ...]) -> str:
    return ",".join(f"{number:g}" for number in (numbers[:1] if len(set(numbers)) == 1 else numbers))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
