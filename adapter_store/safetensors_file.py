"""Reads a safetensors file, of an adapter or of a base model; of a damaged one says which tensor is, and what was found instead.

The safetensors library reports damage without naming the tensor; what it accepts is the same. Knows nothing about what is in it.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from adapter_store.errors import AdapterCorruptError, shorten
from adapter_store.image import tensor_bytes
from adapter_store.json_file import parse_json_object

LENGTH_BYTES = 8
# An adapter's header is never longer.
MAX_HEADER_BYTES = 16 << 20
# Far beyond any tensor, and small enough that sums and products of sizes stay cheap to compute and short to print.
MAX_DIMENSIONS = 8
MAX_SIZE = 1 << 48

# Bytes of an element of every dtype of the format that takes whole bytes.
DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}

# The dtypes that `read_tensor` gives.
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the file; its bytes are [start, end) of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_index(path: Path, max_header_bytes: int = MAX_HEADER_BYTES) -> Mapping[str, TensorEntry]:
    """The tensors of the file by name, checked to be all there and to cover the file exactly.

    Raises:
        AdapterCorruptError: the file is truncated or malformed.
    """
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        start = file.read(LENGTH_BYTES)
        header_bytes = int.from_bytes(start, "little")
        if len(start) < LENGTH_BYTES or header_bytes > file_bytes - LENGTH_BYTES or header_bytes > max_header_bytes:
            found = (
                f"a header of {header_bytes} bytes is announced; the file has {file_bytes} bytes, the limit is {max_header_bytes}"
            )
            if len(start) < LENGTH_BYTES:
                found = f"the file has {file_bytes} bytes, less than the {LENGTH_BYTES} of the header's length"
            raise AdapterCorruptError(path.name, "", found)
        fields = parse_json_object(file.read(header_bytes), path.name, "header: ")
    fields.pop("__metadata__", None)
    data_start = LENGTH_BYTES + header_bytes
    entries = [_parse_entry(path.name, name, value, data_start) for name, value in fields.items()]
    _check_coverage(path.name, sorted(entries, key=lambda entry: (entry.start, entry.end)), data_start, file_bytes)
    return {entry.name: entry for entry in entries}


def read_tensor(path: Path, entry: TensorEntry) -> torch.Tensor:
    """The tensor of an entry whose dtype is in TORCH_DTYPES.

    Raises:
        AdapterCorruptError: the file became shorter since its index was read.
    """
    tensor = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
    with path.open("rb") as file:
        file.seek(entry.start)
        num_bytes = file.readinto(tensor_bytes(tensor))
    if num_bytes != entry.end - entry.start:
        raise AdapterCorruptError(path.name, entry.name, f"{num_bytes} bytes found where {entry.end - entry.start} belong")
    return tensor


def _parse_entry(file: str, name: str, value: object, data_start: int) -> TensorEntry:
    """One entry of the header, checked by itself."""
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            pass
        case _:
            raise AdapterCorruptError(file, name, "its header entry lacks dtype, shape or data_offsets")
    if dtype not in DTYPE_BYTES:
        raise AdapterCorruptError(file, name, f"dtype {shorten(dtype)} is not known")
    if len(shape) > MAX_DIMENSIONS:
        raise AdapterCorruptError(file, name, f"its shape has {len(shape)} dimensions; the limit is {MAX_DIMENSIONS}")
    if not all(type(size) is int and 0 <= size <= MAX_SIZE for size in shape) or not 0 <= start <= end <= MAX_SIZE:
        given = shorten(f"shape {shape} or data_offsets [{start}, {end}]")
        raise AdapterCorruptError(file, name, f"{given} are not sizes of at most {MAX_SIZE}")
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if needed != end - start:
        raise AdapterCorruptError(
            file, name, f"shape {shape} of {dtype} takes {needed} bytes, data_offsets [{start}, {end}] hold {end - start}"
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + start, data_start + end)


def _check_coverage(file: str, entries: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    """The tensors follow each other without gap or overlap and end where the file ends."""
    position = data_start
    for entry in entries:
        if entry.start != position:
            raise AdapterCorruptError(file, entry.name, f"begins at byte {entry.start}; the tensor before it ends at {position}")
        if entry.end > file_bytes:
            raise AdapterCorruptError(
                file, entry.name, f"takes bytes {entry.start} to {entry.end}, but the file ends at {file_bytes}: it is truncated"
            )
        position = entry.end
    if position != file_bytes:
        raise AdapterCorruptError(file, "", f"{file_bytes - position} bytes follow the last tensor")
