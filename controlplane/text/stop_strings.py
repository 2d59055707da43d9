"""Finds stop strings in text that arrives in pieces, and holds back what may still become one.

Knows nothing of tokens: the result is the same however the text is cut into pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopScan:
    """What one piece of text brought: text that may be shown now, and the stop string that it completed, if any."""

    text: str
    matched: str | None = None


class _Pattern:
    """One stop string as a Knuth-Morris-Pratt automaton: `num_matched` characters at the end of the text are its beginning."""

    __slots__ = ("_borders", "num_matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._borders = _borders(text)

    def feed(self, char: str) -> bool:
        """Takes one character; True when it completes the stop string."""
        matched = self.num_matched
        if matched == len(self.text):
            matched = self._borders[matched]
        while matched and self.text[matched] != char:
            matched = self._borders[matched]
        if self.text[matched] == char:
            matched += 1
        self.num_matched = matched
        return matched == len(self.text)

    @property
    def num_held(self) -> int:
        """Characters at the end of the text that may still become this stop string."""
        if self.num_matched == len(self.text):
            return self._borders[self.num_matched]
        return self.num_matched


class StopMatcher:
    """Watches one stream of text for stop strings.

    The first stop string to be complete wins, and of several that end at the same character the longest.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._patterns = [_Pattern(stop) for stop in stops]
        self._include_stop = include_stop
        self._held = ""
        self._is_done = False

    def feed(self, piece: str, armed: bool = True) -> StopScan:
        """Takes the next piece. Stop strings that become complete while not `armed` are ordinary text."""
        assert not self._is_done, "no text may follow a match"
        if not self._patterns or not piece:
            return StopScan(piece)
        for index, char in enumerate(piece):
            completed = [pattern for pattern in self._patterns if pattern.feed(char)]
            if completed and armed:
                self._is_done = True
                stop = max((pattern.text for pattern in completed), key=len)
                text = self.flush() + piece[: index + 1]
                return StopScan(text if self._include_stop else text[: len(text) - len(stop)], stop)
        text = self._held + piece
        num_held = max(pattern.num_held for pattern in self._patterns)
        shown = len(text) - num_held
        self._held = text[shown:]
        return StopScan(text[:shown])

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        text, self._held = self._held, ""
        return text


def _borders(text: str) -> list[int]:
    """borders[k]: length of the longest proper prefix of text[:k] that is also its suffix."""
    borders = [0] * (len(text) + 1)
    matched = 0
    for end in range(1, len(text)):
        while matched and text[matched] != text[end]:
            matched = borders[matched]
        if text[matched] == text[end]:
            matched += 1
        borders[end + 1] = matched
    return borders
