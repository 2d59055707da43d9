"""Token ids that say when they were made, so that a client on the same machine can tell how long they were on their way."""

import time

UNITS_PER_S = 100_000
# A stamp repeats after ten seconds; no token is on its way for that long.
VOCAB_SIZE = 1 << 20


def stamp(at: float | None = None) -> int:
    """A time (time.monotonic), now unless given, as a token id."""
    return int((time.monotonic() if at is None else at) * UNITS_PER_S) % VOCAB_SIZE


def age_s(token_id: int, now: float) -> float:
    """Seconds from when the stamp was made to `now` (time.monotonic)."""
    return ((int(now * UNITS_PER_S) - token_id) % VOCAB_SIZE) / UNITS_PER_S
