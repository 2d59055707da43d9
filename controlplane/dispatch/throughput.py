"""Output tokens per second over the last ten seconds, in buckets of one second."""

WINDOW_S = 10


class ThroughputMeter:
    """Counts into ten buckets, each emptied when its second comes round again."""

    def __init__(self, now: float) -> None:
        self._started_at = now
        self._buckets = [(-1, 0)] * WINDOW_S  # (second, tokens)

    def add(self, num_tokens: int, now: float) -> None:
        """Counts tokens made now."""
        second = int(now)
        index = second % WINDOW_S
        held_second, count = self._buckets[index]
        self._buckets[index] = (second, num_tokens + (count if held_second == second else 0))

    def rate(self, now: float) -> float:
        """Tokens per second over the window, or over the time since the start if that is shorter."""
        oldest = now - WINDOW_S
        total = sum(count for second, count in self._buckets if second > oldest)
        return total / max(1.0, min(float(WINDOW_S), now - self._started_at))
