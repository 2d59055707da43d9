"""A session against servers that keep the protocol and servers that break it: it fails closed, says so, and comes back."""

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace

import grpc
import pytest

from benchmarks.null_data_plane import NullDataPlane, serve
from benchmarks.null_engine import NullConfig
from controlplane.dispatch.data_plane_session import (
    DataPlaneRefusedError,
    DataPlaneSession,
    SessionBrokenError,
    SessionConfig,
    description_from_proto,
)
from controlplane.messages import DataPlaneDescription
from protos.loraplane.v1 import data_plane_pb2 as pb
from protos.loraplane.v1 import data_plane_pb2_grpc as pb_grpc
from protos.planes import AdmittedRequest, BatchUpdate, EngineSampling, EngineState, StepReport, reports_to_proto
from tests.waiting import PATIENCE_S, until

QUICK = SessionConfig(describe_timeout_s=5.0, hello_timeout_s=5.0, backoff_min_s=0.001, backoff_max_s=0.01)


class Listener:
    """Writes down what it hears and wakes whoever waits for it."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.reports: list[StepReport] = []
        self.states: list[EngineState] = []
        self.refusal = ""
        self._news = asyncio.Event()

    async def wait_for(self, is_enough: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not is_enough():
                self._news.clear()
                await self._news.wait()

    def count(self, what: str) -> int:
        return self.heard.count(what)

    def on_described(self, address: str, description: DataPlaneDescription) -> None:
        self._hear("described")
        if self.refusal:
            raise DataPlaneRefusedError(self.refusal)

    def on_connected(self, address: str, description: DataPlaneDescription, state: EngineState) -> None:
        self.states.append(state)
        self._hear("connected")

    def on_reports(self, address: str, reports: Sequence[StepReport]) -> None:
        self.reports += reports
        self._hear("report")

    def on_lost(self, address: str) -> None:
        self._hear("lost")

    def _hear(self, what: str) -> None:
        self.heard.append(what)
        self._news.set()


class Misbehaving(NullDataPlane):
    """Describes itself properly and then answers hello with the given reports."""

    def __init__(self, reports: list[StepReport]) -> None:
        super().__init__(NullConfig(), epoch=5)
        self._reports = reports

    async def Run(
        self, request_iterator: AsyncIterator[pb.RunRequest], context: grpc.aio.ServicerContext[pb.RunRequest, pb.RunResponse]
    ) -> AsyncIterator[pb.RunResponse]:
        await anext(request_iterator)
        for report in self._reports:
            yield reports_to_proto([report])
        await asyncio.Event().wait()


@pytest.fixture
def address() -> Iterator[str]:
    """A Unix socket address that is short enough for one."""
    with tempfile.TemporaryDirectory() as directory:
        yield f"unix:{directory}/dp"


@contextlib.asynccontextmanager
async def serving(address: str, servicer: NullDataPlane) -> AsyncIterator[None]:
    server = grpc.aio.server()
    pb_grpc.add_DataPlaneServiceServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    await server.start()
    try:
        yield
    finally:
        await server.stop(grace=None)


@contextlib.asynccontextmanager
async def session_with(address: str, listener: Listener) -> AsyncIterator[DataPlaneSession]:
    session = DataPlaneSession(address, listener, QUICK)
    session.start()
    try:
        yield session
    finally:
        await session.close()


def _admit(key: int, max_tokens: int) -> BatchUpdate:
    return BatchUpdate(1, admit=(AdmittedRequest(key, "r", (1, 2, 3), 0, "", EngineSampling(max_tokens=max_tokens)),))


def test_a_session_says_hello_and_hears_every_report(address: str) -> None:
    async def play() -> None:
        listener = Listener()
        async with serve(address, NullConfig()), session_with(address, listener) as session:
            await listener.wait_for(lambda: bool(listener.reports))
            session.send(_admit(1, max_tokens=4))
            await listener.wait_for(lambda: any(report.finished for report in listener.reports))
            assert [report.sequence for report in listener.reports] == list(range(1, len(listener.reports) + 1))
            assert sum(len(report.token_ids) for report in listener.reports) == 4
        assert listener.heard[:3] == ["described", "connected", "report"]
        assert listener.heard[-1] == "lost"

    asyncio.run(play())


@pytest.mark.parametrize("callback", ["connected", "lost"])
def test_a_listener_that_fails_hears_of_the_loss_and_of_the_next_session(address: str, callback: str) -> None:
    class Failing(Listener):
        def _hear(self, what: str) -> None:
            super()._hear(what)
            if what == callback and self.count(what) == 1:
                raise RuntimeError("this listener is broken")

    async def play() -> None:
        listener = Failing()
        data_plane = Misbehaving([StepReport(7, 0, state=EngineState(5))])
        async with serving(address, data_plane), session_with(address, listener):
            await listener.wait_for(lambda: listener.count("connected") == 3)
        assert [each for each in listener.heard if each != "described"][:4] == ["connected", "lost", "connected", "lost"]

    asyncio.run(play())


def test_a_session_waits_for_a_data_plane_that_is_not_there_yet(address: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def play() -> None:
        listener = Listener()
        async with session_with(address, listener):
            await until(lambda: caplog.text.count("code=UNAVAILABLE") > 1)
            assert listener.heard == []
            async with serve(address, NullConfig()):
                await listener.wait_for(lambda: bool(listener.reports))

    asyncio.run(play())


def test_a_restarted_data_plane_is_found_again_under_its_new_epoch(address: str) -> None:
    async def play() -> None:
        listener = Listener()
        async with session_with(address, listener):
            for epoch in (1, 2):
                async with serve(address, NullConfig(), epoch):
                    await listener.wait_for(lambda: len(listener.states) >= epoch)  # noqa: B023 - awaited in the same turn
            assert [state.epoch for state in listener.states] == [1, 2]
            await listener.wait_for(lambda: listener.count("lost") == 2)

    asyncio.run(play())


def test_a_session_that_is_taken_over_comes_back_with_what_is_held(address: str) -> None:
    async def play() -> None:
        first, second = Listener(), Listener()
        async with serve(address, NullConfig(step_s=0.01)) as data_plane, session_with(address, first) as session:
            await first.wait_for(lambda: bool(first.reports))
            session.send(_admit(77, max_tokens=5000))
            await first.wait_for(lambda: any(report.token_ids for report in first.reports))
            async with session_with(address, second):
                await second.wait_for(lambda: bool(second.states))
                assert second.states[0].held_request_keys == (77,)
                await first.wait_for(lambda: first.count("lost") >= 1)
            assert 77 in data_plane.engine.standing

    asyncio.run(play())


def test_control_planes_that_take_over_from_each_other_do_so_less_and_less_often(address: str) -> None:
    async def play() -> None:
        rivals = [Listener(), Listener()]
        config = replace(QUICK, backoff_min_s=0.01, backoff_max_s=60.0)
        async with serve(address, NullConfig()):
            sessions = [DataPlaneSession(address, rival, config) for rival in rivals]
            for session in sessions:
                session.start()
            await asyncio.sleep(0.5)  # how often they connect within a time is what is counted
            # Twice in 0.01 + 0.02 + 0.04 + ... seconds at most, and half of that with the jitter.
            assert max(rival.count("connected") for rival in rivals) <= 8
            for session in sessions:
                await session.close()

    asyncio.run(play())


STATE = EngineState(5)


@pytest.mark.parametrize(
    ("reports", "num_connected"),
    [
        pytest.param([StepReport(1, 0)], 0, id="the first report has no state"),
        pytest.param([StepReport(1, 0, state=EngineState(6))], 0, id="the state is of another epoch"),
        pytest.param([StepReport(1, 0, state=STATE), StepReport(3, 0)], 2, id="a gap in sequence numbers"),
        pytest.param([StepReport(1, 0, state=STATE), StepReport(1, 0)], 2, id="a report comes twice"),
        pytest.param([StepReport(1, 0, state=STATE), StepReport(2, 4)], 2, id="an update was applied that was never sent"),
    ],
)
def test_a_broken_protocol_ends_the_session_and_starts_another(
    address: str, reports: list[StepReport], num_connected: int
) -> None:
    async def play() -> None:
        listener = Listener()
        async with serving(address, Misbehaving(reports)), session_with(address, listener):
            await listener.wait_for(lambda: listener.count("described") >= 3)
            assert listener.count("lost") == listener.count("connected") >= num_connected
            assert listener.count("report") == listener.count("connected")

    asyncio.run(play())


def test_a_refused_data_plane_is_never_connected(address: str) -> None:
    async def play() -> None:
        listener = Listener()
        listener.refusal = "another model"
        async with serve(address, NullConfig()) as data_plane, session_with(address, listener):
            await listener.wait_for(lambda: listener.count("described") >= 2)
            assert data_plane.num_sessions == 0
        assert listener.count("connected") == listener.count("lost") == 0

    asyncio.run(play())


def test_a_gap_in_what_is_sent_is_a_bug_of_ours(address: str) -> None:
    async def play() -> None:
        listener = Listener()
        async with serve(address, NullConfig()), session_with(address, listener) as session:
            await listener.wait_for(lambda: bool(listener.reports))
            with pytest.raises(AssertionError, match="update 2 after 0"):
                session.send(replace(_admit(1, 1), sequence=2))

    asyncio.run(play())


def test_a_page_geometry_that_does_not_follow_from_the_model_is_refused() -> None:
    message = NullDataPlane(NullConfig()).describe()
    assert description_from_proto(message).geometry == NullConfig().geometry
    message.pool.page_tokens = 32
    with pytest.raises(SessionBrokenError, match="same version"):
        description_from_proto(message)
