"""Typed reading of a JSON object that remembers everything that is wrong with it. Knows no field by name."""

from collections.abc import Mapping

Json = Mapping[str, object]


class FieldReader:
    """Reads fields of one JSON object into `violations`; a bad field reads as its default so that reading goes on."""

    def __init__(self, fields: Json, prefix: str = "", violations: list[str] | None = None) -> None:
        self.fields = fields
        self.prefix = prefix
        self.violations: list[str] = violations if violations is not None else []

    def refuse(self, name: str, why: str) -> None:
        """Notes that field `name` cannot be honoured."""
        self.violations.append(f"{self.prefix}{name} = {self.fields.get(name)!r}: {why}")

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.fields.get(name) is not None

    def required_int(self, name: str) -> int:
        """A positive integer that has no default."""
        if not self.has(name):
            self.violations.append(f"{self.prefix}{name} is missing")
            return 1
        return self.positive_int(name, 1)

    def positive_int(self, name: str, default: int) -> int:
        """An integer of at least 1."""
        value = self.fields.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(name, "must be an integer of at least 1")
            return default
        return value

    def non_negative_int(self, name: str, default: int) -> int:
        """An integer of at least 0."""
        return 0 if self.fields.get(name) == 0 else self.positive_int(name, default)

    def positive_float(self, name: str, default: float | None) -> float:
        """A number above 0; without a default it must be there."""
        value = self.fields.get(name)
        if value is None:
            if default is None:
                self.violations.append(f"{self.prefix}{name} is missing")
            return default or 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self.refuse(name, "must be a finite number above 0")
            return default or 1.0
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.fields.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, "must be true or false")
            return default
        return value

    def object(self, name: str) -> Json:
        """A nested object, empty if absent."""
        value = self.fields.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.refuse(name, "must be an object")
            return {}
        return value
