"""First come, first served: in which order requests are admitted, and who gives way when pages run out.

Knows no pages and no data planes: it ranks requests.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from controlplane.scheduling.request import Request

Rank = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class FcfsPolicy:
    """Higher priority first, then requests that ran before (preempted, or their data plane was lost), then by arrival.

    A request that does not fit may be passed over, so that a large one does not hold up small ones, but at most
    `max_overtakes` times; then nobody behind it is admitted where it could run until it fits. At most `window` requests are
    passed over at once, which bounds the work of a schedule.
    """

    max_overtakes: int = 32
    window: int = 16

    def rank(self, request: Request) -> Rank:
        """Smaller is admitted first. Constant while the request waits."""
        return (-request.spec.priority, 0 if request.has_run else 1, request.arrival)

    def is_overtaken_enough(self, request: Request) -> bool:
        """Whether nobody may overtake this request any more."""
        return request.overtaken >= self.max_overtakes

    def victim(self, running: Iterable[Request]) -> Request:
        """Who is preempted: lowest priority, then latest arrival. The oldest therefore always gets on, and waiting is bounded."""
        return max(running, key=lambda request: (-request.spec.priority, request.arrival))
