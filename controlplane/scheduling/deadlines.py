"""Which request must be given up next. Knows only deadlines and whether a request has ended."""

import heapq

from controlplane.scheduling.request import Request, RequestState

_COMPACT_AT = 1024


class Deadlines:
    """A heap of (time, request). A deadline that is out of date is dropped when it comes up, or when such ones abound."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._compact_at = _COMPACT_AT

    @property
    def num_watched(self) -> int:
        """Entries, those out of date included."""
        return len(self._heap)

    def watch(self, request: Request) -> None:
        """Watches a request's next deadline, if it has one."""
        deadline = request.next_deadline
        if deadline is None:
            return
        heapq.heappush(self._heap, (deadline, request.arrival, request))
        if len(self._heap) > self._compact_at:
            self._heap = [entry for entry in self._heap if entry[2].state is not RequestState.FINISHED]
            heapq.heapify(self._heap)
            self._compact_at = max(_COMPACT_AT, 2 * len(self._heap))

    def next(self) -> float | None:
        """When take_expired() should be called next; None if nothing is watched."""
        while self._heap and self._heap[0][2].state is RequestState.FINISHED:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take_expired(self, now: float) -> list[Request]:
        """The unfinished requests whose deadline has passed, earliest first."""
        expired = []
        while self._heap and self._heap[0][0] <= now:
            _, _, request = heapq.heappop(self._heap)
            if request.state is RequestState.FINISHED:
                continue
            deadline = request.next_deadline
            if deadline is not None and deadline <= now:
                expired.append(request)
            else:
                self.watch(request)  # it was the time of the first token, which came
        return expired
