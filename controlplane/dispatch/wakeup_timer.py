"""One timer on the event loop, set again and again to the next time something is due. Knows nothing of what that is."""

import asyncio
from collections.abc import Callable


class WakeupTimer:
    """Calls back when the time comes that was set last. Times are on the caller's clock, which runs as fast as the loop's."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._due: float | None = None
        self._handle: asyncio.TimerHandle | None = None

    def set(self, due: float | None, now: float) -> None:
        """Replaces the time; None for never. Cheap if it is the same as before."""
        if due == self._due:
            return
        self.cancel()
        if due is not None:
            self._due = due
            self._handle = asyncio.get_running_loop().call_later(max(0.0, due - now), self._fire)

    def cancel(self) -> None:
        """Sets it to never."""
        if self._handle is not None:
            self._handle.cancel()
        self._due = self._handle = None

    def _fire(self) -> None:
        self._due = self._handle = None
        self._callback()
