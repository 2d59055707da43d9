"""Collects the reasons for which an adapter is refused; what repeats for many layers is listed once, with a count."""

import re

from adapter_store.errors import AdapterRejectedError, Violation, shorten

_LAYER = re.compile(r"layers\.\d+\.")


class ViolationList:
    """Violations in the order in which they were found. What differs in the layer alone counts as one."""

    def __init__(self) -> None:
        self._subjects: dict[tuple[str, str, str], list[str]] = {}

    def __len__(self) -> int:
        return len(self._subjects)

    def add(self, kind: str, subject: str, description: str) -> None:
        """Notes one reason. `subject` is the option, file or tensor it is about."""
        key = (kind, _LAYER.sub("layers.*.", subject), description)
        self._subjects.setdefault(key, []).append(subject)

    def raise_if_any(self) -> None:
        """Raises AdapterRejectedError with everything that was noted."""
        if self._subjects:
            raise AdapterRejectedError(
                [Violation(kind, _summarize(subjects), text) for (kind, _, text), subjects in self._subjects.items()]
            )


def _summarize(subjects: list[str]) -> str:
    others = len(subjects) - 1
    return shorten(subjects[0]) + (f" and {others} more layer{'s' if others > 1 else ''}" if others else "")
