"""Whatever comes in whatever order, with any delay on the wire: no request is lost or doubled, every token is right, the ledger
is never below the pool, and nobody waits for ever. The harness checks the laws after every single move.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from benchmarks.null_engine import NullConfig
from controlplane.messages import AdapterRef, FinishReason, RequestSpec
from controlplane.scheduling import FcfsPolicy

if TYPE_CHECKING:
    from tests.controlplane.scheduling.conftest import Harness, Wire

# Fixtures here are plain factories without state.
LAWS = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])

NUM_PAGES = 12
PAGE_TOKENS = 16
MOVES = ("submit", "submit", "abort", "apply", "step", "step", "report", "report", "turn", "lose", "lose_and_keep", "time")
ADAPTER_MOVES = ("pin", "offer", "withdraw")


class Move(NamedTuple):
    """One thing that happens; the numbers choose sizes and which."""

    kind: str
    a: int
    b: int


moves = st.lists(
    st.builds(Move, st.sampled_from(MOVES + ADAPTER_MOVES), st.integers(0, 100), st.integers(0, 100)), min_size=5, max_size=120
)


class World:
    """Plays moves on a harness."""

    def __init__(self, world: "Harness", spec: Callable[..., RequestSpec], adapter: Callable[..., AdapterRef]) -> None:
        self.world = world
        self.spec = spec
        self.adapter = adapter
        self.lost: dict[int, Wire | None] = {}

    def play(self, move: Move) -> None:
        world, a, b = self.world, move.a, move.b
        number = a % len(world.configs)
        wire = world.wires.get(f"dp{number}")
        if move.kind == "submit":
            self.submit(a, b)
        elif move.kind == "abort" and world.tokens:
            world.abort(list(world.tokens)[a % len(world.tokens)])
        elif move.kind == "turn":
            world.turn()
        elif move.kind == "time":
            world.now += b / 100
            world.expire()
        elif move.kind == "pin":
            world.scheduler.set_pinned([self.adapter(n).digest for n in range(2) if a >> n & 1])
            world.schedule()
        elif move.kind in ("offer", "withdraw"):
            digest = self.adapter(a % 7).digest
            world.scheduler.offer(digest, 2) if move.kind == "offer" else world.scheduler.withdraw(digest)
            world.schedule()
        elif wire is None:
            self.reconnect(number)
        elif move.kind == "apply":
            wire.apply_update()
        elif move.kind == "step":
            wire.step()
        elif move.kind == "report":
            world.deliver_report(f"dp{number}")
        elif move.kind in ("lose", "lose_and_keep") and b < 30:
            lost = world.lose(number)
            self.lost[number] = lost if move.kind == "lose_and_keep" else None

    def submit(self, a: int, b: int) -> None:
        spec = self.spec(
            prompt_tokens=1 + a,
            max_tokens=1 + b,
            adapter=self.adapter(a % 5) if b % 2 else None,
            priority=b % 3 - 1,
            deadline=self.world.now + 3.0 if a % 7 == 0 else None,
            seed=len(self.world.tokens),
        )
        kv_pages = -(-(2 + a + b) // PAGE_TOKENS)
        shortfall = self.world.scheduler.check_fits(spec)
        if shortfall is None:
            assert kv_pages + (2 if spec.adapter else 0) <= NUM_PAGES
            self.world.submit(spec)

    def reconnect(self, number: int) -> None:
        self.world.connect(number, keep_engine=self.lost.pop(number, None))

    def settle(self) -> None:
        self.world.scheduler.set_pinned([])
        self.world.schedule()
        for number in range(len(self.world.configs)):
            if f"dp{number}" not in self.world.wires:
                self.reconnect(number)
        self.world.run()


@LAWS
@given(moves=moves, num_planes=st.integers(1, 2), runs_ahead=st.booleans())
def test_no_request_is_lost_and_every_token_is_right(
    moves: list[Move],
    num_planes: int,
    runs_ahead: bool,
    spec: Callable[..., RequestSpec],
    adapter: Callable[..., AdapterRef],
    harness: "Callable[..., Harness]",
) -> None:
    config = NullConfig(num_pages=NUM_PAGES, max_num_seqs=6, token_budget=24, vocab_size=1000, runs_ahead=runs_ahead)
    world = World(harness([config] * num_planes), spec, adapter)
    for move in moves:
        world.play(move)
    world.settle()
    for request, ended in world.world.ended.items():
        tokens, expected = world.world.tokens[request], world.world.expected(request)
        assert tokens == expected[: len(tokens)]
        if ended.outcome.reason is FinishReason.LENGTH:
            assert tokens == expected
        else:
            assert ended.outcome.reason in (FinishReason.ABORTED, FinishReason.ERROR)
        event(f"{ended.outcome.reason.value}{' preempted' if request.num_preemptions else ''}")
        assert not tokens or request in world.world.started
    assert len(world.world.started) == len(set(world.world.started))


@LAWS
@given(
    sizes=st.lists(st.tuples(st.integers(1, 100), st.integers(1, 60)), min_size=3, max_size=30),
    max_overtakes=st.integers(0, 4),
    window=st.integers(0, 4),
)
def test_nobody_is_overtaken_more_often_than_allowed(
    sizes: list[tuple[int, int]],
    max_overtakes: int,
    window: int,
    spec: Callable[..., RequestSpec],
    harness: "Callable[..., Harness]",
) -> None:
    world = harness([NullConfig(num_pages=NUM_PAGES, max_num_seqs=4)], FcfsPolicy(max_overtakes, window))
    requests = [world.submit(spec(p, m, seed=n)) for n, (p, m) in enumerate(sizes)]
    world.run()
    order = list(world.admitted)
    for place, request in enumerate(order):
        assert sum(other.arrival > request.arrival for other in order[:place]) <= max_overtakes
        assert request.overtaken <= max_overtakes
    assert all(world.tokens[request] == world.expected(request) for request in requests)
