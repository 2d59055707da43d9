"""Ends a background task for certain."""

import asyncio

_AGAIN_S = 0.1


async def end_task(task: "asyncio.Task[None]") -> None:
    """Cancels until the task has ended. Once is not enough before Python 3.12: its asyncio.wait_for, with which redis-py sends
    each command, swallows a cancellation that comes just as it finishes."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_AGAIN_S)
