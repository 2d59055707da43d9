"""How far two runs of the same requests agree, and whether what differs is rounding. Pure arithmetic over answers.

Where two runs have said the same so far, each has an opinion on the same question: how far one token leads over another. The
*shift* at a position is by how much the two opinions differ, in units of the logits (natural logarithms of probabilities differ
as logits do). At the first token that differs, the two runs prefer different tokens, so the shift there is at least the gap
between them. Beyond it they answer different questions, and nothing is compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.percentiles import percentiles
from benchmarks.soak.clients import Answer, Pair


@dataclass(frozen=True, slots=True)
class Agreement:
    """Over all pairs. shifts: at every position compared. shifts_at_difference: at the first token that differs, one a pair."""

    num_pairs: int
    shifts: tuple[float, ...]
    shifts_at_difference: tuple[float, ...]

    @property
    def num_equal(self) -> int:
        """Pairs with the same tokens."""
        return self.num_pairs - len(self.shifts_at_difference)

    @property
    def max_shift(self) -> float:
        """The largest at any position."""
        return max(self.shifts, default=0.0)

    @property
    def max_at_difference(self) -> float:
        """The largest where tokens differ."""
        return max(self.shifts_at_difference, default=0.0)

    def summary(self) -> dict[str, object]:
        """For the result file."""
        p50, p99 = percentiles(self.shifts or (0.0,), 50, 99)
        return {
            "pairs": self.num_pairs,
            "equal": self.num_equal,
            "positions": len(self.shifts),
            "shift_p50": p50,
            "shift_p99": p99,
            "shift_max": self.max_shift,
            "shift_at_difference_max": self.max_at_difference,
        }


def compare(pairs: Sequence[Pair]) -> Agreement:
    """Of answers with logprobs, or there are no shifts; the second of a pair may end at the first token that differs."""
    shifts: list[float] = []
    at_difference: list[float] = []
    for first, second in pairs:
        end = first_difference(first, second)
        num_compared = len(first.token_ids) if end is None else end + 1
        of_pair = [_shift(first, second, i) for i in range(min(num_compared, len(first.tops)))]
        shifts += of_pair
        if end is not None:
            at_difference.append(of_pair[end] if end < len(of_pair) else math.inf)
    return Agreement(len(pairs), tuple(shifts), tuple(at_difference))


def first_difference(first: Answer, second: Answer) -> int | None:
    """The first position at which the tokens differ; None if they do not."""
    for i, (a, b) in enumerate(zip(first.token_ids, second.token_ids, strict=False)):
        if a != b:
            return i
    assert len(first.token_ids) == len(second.token_ids), "an answer ended before the first token that differs"
    return None


def _shift(first: Answer, second: Answer, position: int) -> float:
    """At a position before which both answers are the same."""
    a, b = first.token_ids[position], second.token_ids[position]
    if a == b:
        # The best against the second best of the first run; a seeded request may have drawn any token.
        a, b = list(first.tops[position])[:2]
    return abs(_lead(first.tops[position], a, b) - _lead(second.tops[position], a, b))


def _lead(top: dict[int, float], a: int, b: int) -> float:
    """Of token a over token b. A token that is not among the most likely ones is at least below them."""
    lowest = min(top.values())
    return top.get(a, lowest) - top.get(b, lowest)
