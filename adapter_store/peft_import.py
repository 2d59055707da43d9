"""Turns a directory that PEFT saved into an adapter image, or says everything that stands against it.

Nothing is skipped: an option or a tensor that cannot be applied to this base refuses the adapter.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from adapter_store.errors import AdapterCorruptError, SourceNotFoundError
from adapter_store.geometry import LORA_MODULES, BaseGeometry
from adapter_store.image import TORCH_DTYPES, AdapterImage, AdapterOrigin, ModuleWeights, build_image
from adapter_store.json_file import parse_json_object
from adapter_store.peft_config import LoraSetting, parse_peft_config
from adapter_store.peft_tensors import LoraPair, match_tensors
from adapter_store.safetensors_file import TensorEntry, read_index, read_tensor
from adapter_store.violations import ViolationList

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
MAX_CONFIG_BYTES = 1 << 20


def import_peft(directory: Path, geometry: BaseGeometry) -> AdapterImage:
    """Validates an adapter against the base and packs it.

    Raises:
        SourceNotFoundError: the directory or one of its two files is not there.
        AdapterRejectedError: the base cannot take it; has every violation that was found.
        AdapterCorruptError: a file is malformed or truncated, or a weight is not finite.
    """
    violations = ViolationList()
    config = parse_peft_config(_read_config(directory), geometry, violations)
    path = _weights_path(directory, violations)
    pairs = match_tensors(read_index(path), config.settings, geometry, violations)
    violations.raise_if_any()
    reader = _WeightReader(path, geometry, violations)
    weights = {
        module: reader.read_module(
            {key.layer: (config.settings[key], pair) for key, pair in pairs.items() if key.module == module}
        )
        for module in LORA_MODULES
        if any(key.module == module for key in pairs)
    }
    violations.raise_if_any()
    return build_image(geometry, weights, AdapterOrigin(config.base_model, config.alpha, config.rslora))


def _read_config(directory: Path) -> dict[str, object]:
    path = directory / CONFIG_FILE
    if not directory.is_dir():
        raise SourceNotFoundError(str(directory), "is not a directory")
    if not path.is_file():
        raise SourceNotFoundError(str(directory), f"has no {CONFIG_FILE}; it must be a directory that PEFT saved")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterCorruptError(CONFIG_FILE, "", f"has {path.stat().st_size} bytes; the limit is {MAX_CONFIG_BYTES}")
    return parse_json_object(path.read_bytes(), CONFIG_FILE)


def _weights_path(directory: Path, violations: ViolationList) -> Path:
    path = directory / WEIGHTS_FILE
    if not path.is_file() and (directory / PICKLE_FILE).is_file():
        described = f"is a pickle, which can run code; save the adapter as {WEIGHTS_FILE} (safe_serialization=True)"
        violations.add("UNSUPPORTED_FILE", PICKLE_FILE, described)
        violations.raise_if_any()
    if not path.is_file():
        raise SourceNotFoundError(str(directory), f"has no {WEIGHTS_FILE}")
    return path


class _WeightReader:
    """Reads weights as they go into the image: checked, scaled where layers differ, cast to the base's dtype."""

    def __init__(self, path: Path, geometry: BaseGeometry, violations: ViolationList) -> None:
        self._path = path
        self._dtype = TORCH_DTYPES[geometry.dtype]
        self._violations = violations

    def read_module(self, layers: Mapping[int, tuple[LoraSetting, LoraPair]]) -> ModuleWeights:
        """One module of all layers that have it.

        The image keeps one scaling per module. Where a configuration gives layers different ones, the largest is kept and
        B of the other layers takes the ratio, multiplied in float32 before the cast.
        """
        common = max((setting.scaling for setting, _ in layers.values()), key=abs)
        return ModuleWeights(
            rank=max(setting.rank for setting, _ in layers.values()),
            scaling=common,
            lora_a={layer: self._read(pair.lora_a, 1.0) for layer, (_, pair) in layers.items()},
            lora_b={
                layer: self._read(pair.lora_b, setting.scaling / common if common else 1.0)
                for layer, (setting, pair) in layers.items()
            },
        )

    def _read(self, entry: TensorEntry, factor: float) -> torch.Tensor:
        weights = read_tensor(self._path, entry)
        if not bool(torch.isfinite(weights).all()):
            row, column = (int(i) for i in (~torch.isfinite(weights)).nonzero()[0])
            found = f"holds {weights[row, column].item()} at [{row}, {column}]; weights must be finite"
            raise AdapterCorruptError(self._path.name, entry.name, found)
        cast = (weights if factor == 1.0 else weights.float() * factor).to(self._dtype)
        if not bool(torch.isfinite(cast).all()):
            largest = weights.abs().max().item()
            described = f"its largest weight, {largest:g}, is beyond {torch.finfo(self._dtype).max:g}, the limit of {self._dtype}"
            self._violations.add("VALUE_RANGE", entry.name, described)
        return cast
