"""Resolves a PEFT LoRA configuration, as PEFT does, to the rank and scaling of each module of each layer.

Knows nothing about tensors. Every value that is not what PEFT would take is noted as a violation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from adapter_store.errors import shorten
from adapter_store.geometry import BaseGeometry
from adapter_store.peft_options import check_options
from adapter_store.peft_patterns import PatternError, first_suffix_matches
from adapter_store.peft_targets import ModuleKey, select_targets
from adapter_store.violations import ViolationList

MAX_NAME_CHARS = 1024
# PEFT's defaults, for a configuration that leaves them out.
DEFAULT_RANK = 8
DEFAULT_ALPHA = 8
# Far beyond any rank, and small enough to divide by as a float.
MAX_RANK = 1 << 20


@dataclass(frozen=True, slots=True)
class LoraSetting:
    """What the configuration says about one module of one layer."""

    rank: int
    scaling: float


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A configuration, resolved. `settings` has exactly the modules that the adapter targets."""

    base_model: str
    alpha: float
    rslora: bool
    settings: Mapping[ModuleKey, LoraSetting]


def parse_peft_config(fields: Mapping[str, object], geometry: BaseGeometry, violations: ViolationList) -> PeftConfig:
    """Resolves adapter_config.json; what cannot be honoured goes to `violations`."""
    check_options(fields, violations)
    reader = _Reader(fields, violations)
    rslora = reader.flag("use_rslora")
    alpha = reader.number("lora_alpha", fields.get("lora_alpha", DEFAULT_ALPHA))
    targets = select_targets(fields, geometry, violations)
    ranks = reader.by_pattern("rank_pattern", reader.rank, targets, reader.rank("r", fields.get("r", DEFAULT_RANK)))
    alphas = reader.by_pattern("alpha_pattern", reader.number, targets, alpha)
    settings: dict[ModuleKey, LoraSetting] = {}
    for key, module_rank, module_alpha in zip(targets, map(int, ranks), alphas, strict=True):
        divisor = math.sqrt(module_rank) if rslora else module_rank
        settings[key] = LoraSetting(module_rank, module_alpha / divisor)
        if module_rank > geometry.max_lora_rank:
            limit = geometry.max_lora_rank
            violations.add("RANK_LIMIT", key.name, f"rank {module_rank} exceeds this service's max_lora_rank of {limit}")
    return PeftConfig(reader.base_model(), alpha, rslora, settings)


class _Reader:
    """Reads values of the configuration; one that is wrong is noted and replaced by 1, so that reading goes on."""

    def __init__(self, fields: Mapping[str, object], violations: ViolationList) -> None:
        self._fields = fields
        self._violations = violations

    def base_model(self) -> str:
        """What the author says it was trained for."""
        value = self._fields.get("base_model_name_or_path") or ""
        if isinstance(value, str) and len(value) <= MAX_NAME_CHARS:
            return value
        self._invalid("base_model_name_or_path", value, f"text of at most {MAX_NAME_CHARS} characters")
        return ""

    def flag(self, name: str) -> bool:
        """A switch; off when it is not there."""
        value = self._fields.get(name)
        if value is not None and not isinstance(value, bool):
            self._invalid(name, value, "true or false")
        return value is True

    def rank(self, name: str, value: object) -> float:
        """A whole number of at least 1 that a float holds exactly."""
        if type(value) is int and 1 <= value <= MAX_RANK:
            return value
        self._invalid(name, value, f"a whole number of at least 1, at most {MAX_RANK}")
        return 1

    def number(self, name: str, value: object) -> float:
        """A finite number that float32 can hold, so that the scaling is finite as well."""
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30:
            return float(value)
        self._invalid(name, value, "a finite number")
        return 1.0

    def by_pattern(
        self, name: str, read: Callable[[str, object], float], targets: Sequence[ModuleKey], default: float
    ) -> list[float]:
        """A value for each target: that of the first pattern that matches it, else the default."""
        patterns = self._fields.get(name) or {}
        if not isinstance(patterns, dict):
            self._invalid(name, patterns, "an object of patterns and values")
            return [default] * len(targets)
        values = [read(f"{name}[{shorten(pattern)}]", value) for pattern, value in patterns.items()]
        try:
            matches = first_suffix_matches(tuple(patterns), [key.name for key in targets])
        except PatternError as error:
            self._violations.add("INVALID_VALUE", name, str(error))
            return [default] * len(targets)
        return [default if match is None else values[match] for match in matches]

    def _invalid(self, name: str, value: object, wanted: str) -> None:
        self._violations.add("INVALID_VALUE", name, f"is {shorten(repr(value))}; it must be {wanted}")
