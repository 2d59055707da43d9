"""Maps the tensors of a PEFT adapter to the base's linear modules, and notes each that does not fit. Reads no weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from adapter_store.geometry import LORA_MODULES, BaseGeometry
from adapter_store.peft_config import LoraSetting
from adapter_store.peft_targets import ModuleKey
from adapter_store.safetensors_file import TORCH_DTYPES, TensorEntry
from adapter_store.violations import ViolationList

# PEFT leaves out the adapter's name when it saves; older versions and other writers keep `default`.
_NAME = re.compile(
    r"base_model\.model\.(?P<module>model\.layers\.(?P<layer>0|[1-9][0-9]{0,5})\.\w+\.(?P<name>\w+))"
    r"\.lora_(?P<half>[AB])\.(?:default\.)?weight",
    re.ASCII,
)

# Parts of names that PEFT gives to what is not applied here, and what each is.
_FOREIGN_PARTS = {
    "lora_magnitude_vector": "a DoRA magnitude; DoRA is not applied here",
    "lora_embedding_": "LoRA on an embedding, which is not applied here",
    "embed_tokens": "an embedding; only LoRA on the layers' linear modules is applied here",
    "lm_head": "the output head; only LoRA on the layers' linear modules is applied here",
    "modules_to_save": "a whole trained module, which is not applied here",
    ".bias": "a bias, which is not applied here",
}


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The two tensors of one module: A is [rank, in_features], B is [out_features, rank]."""

    lora_a: TensorEntry
    lora_b: TensorEntry


def match_tensors(
    entries: Mapping[str, TensorEntry],
    settings: Mapping[ModuleKey, LoraSetting],
    geometry: BaseGeometry,
    violations: ViolationList,
) -> Mapping[ModuleKey, LoraPair]:
    """Both tensors of every target, by module, where they are there."""
    halves: dict[tuple[ModuleKey, str], TensorEntry] = {}
    for name, entry in entries.items():
        place = _place(name, settings, geometry, violations)
        if place is None:
            continue
        if place in halves:
            violations.add("DUPLICATE_TENSOR", name, f"stands beside {halves[place].name}, for the same module")
        halves[place] = entry
        _check_entry(entry, place, settings[place[0]], geometry, violations)
    for key in settings:
        for half in ("A", "B"):
            if (key, half) not in halves:
                violations.add("MISSING_TENSOR", f"{key.name}.lora_{half}", "the configuration targets it, the file lacks it")
    return {key: LoraPair(halves[key, "A"], halves[key, "B"]) for key in settings if {(key, "A"), (key, "B")} <= halves.keys()}


def _place(
    name: str, settings: Mapping[ModuleKey, LoraSetting], geometry: BaseGeometry, violations: ViolationList
) -> tuple[ModuleKey, str] | None:
    """The module and half that a tensor's name means; None, and a violation, if that is none that is applied."""
    match = _NAME.fullmatch(name)
    if match is None or match["name"] not in LORA_MODULES:
        described = next(
            (text for part, text in _FOREIGN_PARTS.items() if part in name), "its name matches no module of this base"
        )
        violations.add("UNSUPPORTED_TENSOR", name, described)
        return None
    key = ModuleKey(int(match["layer"]), match["name"])
    if key.layer >= geometry.num_layers:
        violations.add("BASE_MISMATCH", name, f"this base has {geometry.num_layers} layers, 0 to {geometry.num_layers - 1}")
    elif match["module"] != key.name or geometry.module(key.module) is None:
        violations.add("UNSUPPORTED_TENSOR", name, "its name matches no module of this base")
    elif key not in settings:
        violations.add("UNTARGETED_TENSOR", name, "the configuration (target_modules and the like) does not select its module")
    else:
        return key, match["half"]
    return None


def _check_entry(
    entry: TensorEntry, place: tuple[ModuleKey, str], setting: LoraSetting, geometry: BaseGeometry, violations: ViolationList
) -> None:
    """Shape and dtype of one tensor."""
    key, half = place
    shape = geometry.module(key.module)
    assert shape is not None, f"{key} was matched against this base"
    wanted = (setting.rank, shape.in_features) if half == "A" else (shape.out_features, setting.rank)
    if entry.shape != wanted:
        described = f"shape {list(entry.shape)}; this base and the configured rank {setting.rank} make it {list(wanted)}"
        violations.add("SHAPE_MISMATCH", entry.name, described)
    if entry.dtype not in TORCH_DTYPES:
        violations.add("UNSUPPORTED_DTYPE", entry.name, f"dtype {entry.dtype}; weights must be {', '.join(TORCH_DTYPES)}")
