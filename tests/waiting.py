"""Waiting for what happens beside a test: a condition is looked at again and again, for so long at most; no time is guessed."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from inspect import isawaitable

PATIENCE_S = 60.0
_PAUSE_S = 0.002


async def until(is_so: Callable[[], bool | Awaitable[bool]], what: str = "what was waited for") -> None:
    """Returns once the condition holds, and lets the event loop run meanwhile. what: does not come about, says a failure."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                answer = is_so()
                if await answer if isawaitable(answer) else answer:
                    return
                await asyncio.sleep(_PAUSE_S)
    except TimeoutError as error:  # or one of the condition's own, which is to be seen then
        raise AssertionError(_message(what)) from error


def block_until(is_so: Callable[[], bool], what: str = "what was waited for") -> None:
    """As `until`, where there is no event loop that must run."""
    give_up_at = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < give_up_at, _message(what)
        time.sleep(_PAUSE_S)


def _message(what: str) -> str:
    return f"{what} did not come about within {PATIENCE_S:g} s"
