"""Collects the reasons for which an adapter is refused; what repeats for many layers is listed once, with a count."""

from adapter_store.errors import AdapterRejectedError, Violation, shorten


class ViolationList:
    """Violations in the order in which they were found. Equal kind and description count as one reason."""

    def __init__(self) -> None:
        self._subjects: dict[tuple[str, str], list[str]] = {}

    def __len__(self) -> int:
        return len(self._subjects)

    def add(self, kind: str, subject: str, description: str) -> None:
        """Notes one reason. `subject` is the option, file or tensor it is about."""
        self._subjects.setdefault((kind, description), []).append(subject)

    def raise_if_any(self) -> None:
        """Raises AdapterRejectedError with everything that was noted."""
        if self._subjects:
            raise AdapterRejectedError(
                [Violation(kind, _summarize(subjects), text) for (kind, text), subjects in self._subjects.items()]
            )


def _summarize(subjects: list[str]) -> str:
    if len(subjects) == 1:
        return shorten(subjects[0])
    return f"{shorten(subjects[0])} and {len(subjects) - 1} more"
