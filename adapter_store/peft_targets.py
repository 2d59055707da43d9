"""Which linear modules of which layers a PEFT configuration targets, by PEFT's own rules (check_target_module_exists)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adapter_store.errors import shorten
from adapter_store.geometry import BaseGeometry
from adapter_store.peft_patterns import PatternError, full_matches
from adapter_store.violations import ViolationList

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class ModuleKey:
    """One linear module of one layer."""

    layer: int
    module: str

    @property
    def name(self) -> str:
        """Its name within the base model, which is what PEFT's patterns are matched against."""
        group = "self_attn" if self.module in ATTENTION_MODULES else "mlp"
        return f"model.layers.{self.layer}.{group}.{self.module}"


def select_targets(fields: Mapping[str, object], geometry: BaseGeometry, violations: ViolationList) -> tuple[ModuleKey, ...]:
    """The targets, by layer; what names no module of this base is noted."""
    keys = [ModuleKey(layer, shape.name) for layer in range(geometry.num_layers) for shape in geometry.modules]
    try:
        excluded = _excluded(fields.get("exclude_modules"), keys, violations)
        found = _targeted(fields.get("target_modules"), keys, geometry, violations)
    except PatternError as error:
        violations.add("INVALID_VALUE", "target_modules or exclude_modules", str(error))
        return ()
    layers = _layers(fields, geometry, violations)
    targets = tuple(key for key in keys if key in found and key not in excluded and (key.layer in layers or found[key]))
    if not targets and not len(violations):
        violations.add("NO_TARGETS", "target_modules", "with the other options it selects no module of this base")
    return targets


def _targeted(
    value: object, keys: Sequence[ModuleKey], geometry: BaseGeometry, violations: ViolationList
) -> Mapping[ModuleKey, bool]:
    """The keys that target_modules names; True for those named in full, which layers_to_transform does not narrow."""
    if isinstance(value, str):
        if value.lower() == ALL_LINEAR:
            return dict.fromkeys(keys, False)
        return {key: True for key, match in zip(keys, full_matches(value, [k.name for k in keys]), strict=True) if match}
    names = _name_list("target_modules", value, violations)
    found: dict[ModuleKey, bool] = {}
    for name in names:
        named = _ending_in([name], keys)
        found.update({key: found.get(key, False) or key.name == name for key in named})
        if not named:
            have = ", ".join(shape.name for shape in geometry.modules)
            violations.add(
                "UNSUPPORTED_MODULE", f"target_modules: {shorten(name)}", f"names no linear module of this base's layers ({have})"
            )
    if not names:
        violations.add("NO_TARGETS", "target_modules", "is not set; it must name the modules that the adapter changes")
    return found


def _excluded(value: object, keys: Sequence[ModuleKey], violations: ViolationList) -> set[ModuleKey]:
    """The keys that exclude_modules takes out again."""
    if not value:
        return set()
    if isinstance(value, str):
        return {key for key, match in zip(keys, full_matches(value, [k.name for k in keys]), strict=True) if match}
    return set(_ending_in(_name_list("exclude_modules", value, violations), keys))


def _ending_in(names: Sequence[str], keys: Sequence[ModuleKey]) -> list[ModuleKey]:
    return [key for key in keys if any(key.name == name or key.name.endswith(f".{name}") for name in names)]


def _name_list(option: str, value: object, violations: ViolationList) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        violations.add("INVALID_VALUE", option, f"is {shorten(repr(value))}; it must be a list of names or one expression")
        return []
    return value


def _layers(fields: Mapping[str, object], geometry: BaseGeometry, violations: ViolationList) -> frozenset[int]:
    """The layers that layers_to_transform leaves; all without it."""
    pattern, chosen = fields.get("layers_pattern"), fields.get("layers_to_transform")
    if pattern and pattern not in ("layers", ["layers"]):
        violations.add("UNSUPPORTED_OPTION", "layers_pattern", f"is {shorten(repr(pattern))}; this base's layers are 'layers'")
    if chosen is None or chosen == []:
        return frozenset(range(geometry.num_layers))
    indices = chosen if isinstance(chosen, list) else [chosen]
    if not all(type(index) is int and 0 <= index < geometry.num_layers for index in indices):
        violations.add(
            "INVALID_VALUE",
            "layers_to_transform",
            f"is {shorten(repr(chosen))}; this base has layers 0 to {geometry.num_layers - 1}",
        )
        return frozenset()
    return frozenset(indices)
