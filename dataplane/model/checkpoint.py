"""The safetensors files of a model directory: which tensors lie where, whether the files are whole, and their fingerprint.

Knows nothing about what the tensors mean.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from adapter_store.errors import AdapterCorruptError
from adapter_store.safetensors_file import LENGTH_BYTES, read_index
from dataplane.model.config import CONFIG_FILE
from dataplane.model.errors import ModelWeightsError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Stored types that are weights; anything else (fp8, packed integers) would be a quantization that is not applied here.
STORED_DTYPES = {"F64", "F32", "F16", "BF16"}

# A header longer than this is refused by the format itself.
MAX_HEADER_BYTES = 100_000_000

# Bytes of each tensor that enter the fingerprint: enough to tell two fine-tunings of one shape apart without reading all.
FINGERPRINT_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as a header describes it. begin, end: byte offsets in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin


def read_checkpoint(model_dir: Path) -> dict[str, StoredTensor]:
    """All tensors of the directory by name, from one file or from the shards that the index names.

    Raises:
        ModelWeightsError: a file is missing, malformed or shorter than its header says, or the index names what is not there.
    """
    index_path = model_dir / INDEX_FILE
    if not index_path.exists():
        path = model_dir / WEIGHTS_FILE
        if not path.exists():
            others = sorted(p.name for p in model_dir.glob("*.bin")) + sorted(p.name for p in model_dir.glob("*.safetensors"))
            found = f"found only {', '.join(others)}" if others else "no weights found"
            raise ModelWeightsError(model_dir, [f"neither {WEIGHTS_FILE} nor {INDEX_FILE} exists; {found}"])
        return read_header(path)
    weight_map = _read_weight_map(index_path)
    headers = {name: read_header(model_dir / name) for name in sorted(set(weight_map.values()))}
    lost = [f"{tensor} is not in {file}" for tensor, file in weight_map.items() if tensor not in headers[file]]
    unlisted = [
        f"{tensor} of {file} is not in the index" for file, header in headers.items() for tensor in header.keys() - weight_map
    ]
    if lost or unlisted:
        raise ModelWeightsError(index_path, lost + unlisted)
    return {tensor: headers[file][tensor] for tensor, file in weight_map.items()}


def _read_weight_map(index_path: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelWeightsError(index_path, [f"not an index with a weight_map: {error!r}"]) from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelWeightsError(index_path, ["weight_map must map tensor names to file names"])
    strays = sorted({file for file in weight_map.values() if Path(file).name != file})
    if strays:
        raise ModelWeightsError(index_path, [f"{file!r} is not a file of this directory" for file in strays])
    return weight_map


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, after checking that the file is whole."""
    try:
        entries = read_index(path, MAX_HEADER_BYTES)
    except OSError as error:
        raise ModelWeightsError(path, [f"not readable: {error.strerror}"]) from error
    except AdapterCorruptError as error:
        where = f"tensor {error.tensor}: " if error.tensor else ""
        raise ModelWeightsError(path, [f"not a whole safetensors file: {where}{error.found}"]) from error
    return {name: StoredTensor(path, entry.dtype, entry.shape, entry.start, entry.end) for name, entry in entries.items()}


def stream_tensors(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor on the CPU, file by file, in the order in which it lies there; one at a time is in memory."""
    by_path: dict[Path, list[str]] = {}
    for name, stored in tensors.items():
        by_path.setdefault(stored.path, []).append(name)
    for path, names in by_path.items():
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in sorted(names, key=lambda name: tensors[name].begin):
                yield name, file.get_tensor(name)


def fingerprint(model_dir: Path) -> str:
    """SHA-256 that tells base models apart: config.json, every header, and the first bytes of every tensor.

    A directory without weights (random weights are made instead) has the fingerprint of its config.json alone.
    """
    digest = hashlib.sha256((model_dir / CONFIG_FILE).read_bytes())
    if not (model_dir / WEIGHTS_FILE).exists() and not (model_dir / INDEX_FILE).exists():
        return digest.hexdigest()
    tensors = read_checkpoint(model_dir)
    for path in sorted({stored.path for stored in tensors.values()}):
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
            digest.update(path.name.encode() + b"\0" + file.read(header_bytes))
            for stored in sorted((s for s in tensors.values() if s.path == path), key=lambda s: s.begin):
                file.seek(stored.begin)
                digest.update(file.read(min(stored.size_bytes, FINGERPRINT_SAMPLE_BYTES)))
    return digest.hexdigest()
