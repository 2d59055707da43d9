"""Waiting for what happens beside a test: a condition is looked at again and again, for so long at most; no time is guessed."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from inspect import isawaitable

PATIENCE_S = 60.0
_PAUSE_S = 0.002


async def until(is_so: Callable[[], bool | Awaitable[bool]]) -> None:
    """Returns once the condition holds, and lets the event loop run meanwhile."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            answer = is_so()
            if await answer if isawaitable(answer) else answer:
                return
            await asyncio.sleep(_PAUSE_S)


def block_until(is_so: Callable[[], bool]) -> None:
    """As `until`, where there is no event loop that must run."""
    give_up_at = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < give_up_at, f"not so after {PATIENCE_S:g} s"
        time.sleep(_PAUSE_S)
