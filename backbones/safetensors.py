"""Reads safetensors files without the package: a header in JSON, then the bytes of every tensor."""

import json
import math
from pathlib import Path

import torch

from config.errors import InputError

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(content: bytes, path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors by name; raises InputError if `content`, the bytes of `path`, is no safetensors file."""
    try:
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        return {name: _tensor(about, memoryview(content)[start:]) for name, about in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged or no safetensors file ({error}): replace it.") from error


def _tensor(about: dict, data: memoryview) -> torch.Tensor:
    first, last = about["data_offsets"]
    shape, dtype = about["shape"], TYPES[about["dtype"]]
    if not 0 <= first <= last <= len(data) or last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError("it ends too early, or a size is wrong")
    if first == last:
        return torch.empty(shape, dtype=dtype)
    # Copied into memory that PyTorch allocates: the last bits of a product depend on the operands' alignment.
    return torch.frombuffer(bytearray(data[first:last]), dtype=dtype).reshape(shape).clone()
