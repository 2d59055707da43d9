"""The dispatcher over real gRPC, against data planes that compute nothing: tokens reach their sinks whatever breaks."""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.null_data_plane import serve
from benchmarks.null_engine import NullConfig, null_tokens
from controlplane.dispatch.data_plane_session import SessionConfig
from controlplane.dispatch.dispatcher import Dispatcher, DispatcherConfig, RequestHandle
from controlplane.errors import AbortedError, DeadlineError, InternalError, QueueFullError, UnavailableError
from controlplane.messages import AdapterRef, DoesNotFit, FinishReason, RequestOutcome, RequestSpec
from controlplane.scheduling import Scheduler
from protos.planes import AdapterPlace, EngineSampling, StepLogprobs
from tests.waiting import PATIENCE_S, until

PLAIN = NullConfig()
SLOW = NullConfig(step_s=0.002)
CONFIG = DispatcherConfig(session=SessionConfig(backoff_min_s=0.001, backoff_max_s=0.01))


class Sink:
    """Keeps what it gets; stops after `stop_after` tokens, or breaks there."""

    def __init__(self, stop_after: int | None = None, is_broken: bool = False) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[StepLogprobs] = []
        self.started: list[tuple[float, float]] = []
        self.outcome: asyncio.Future[RequestOutcome] = asyncio.get_running_loop().create_future()
        self.first_token = asyncio.Event()
        self._stop_after = stop_after
        self._is_broken = is_broken

    def on_started(self, queue_s: float, adapter_wait_s: float) -> None:
        assert not self.started and not self.tokens
        self.started.append((queue_s, adapter_wait_s))

    def on_tokens(self, token_ids: Sequence[int], logprobs: Sequence[StepLogprobs]) -> bool:
        assert self.started and not self.outcome.done()
        assert not logprobs or len(logprobs) == len(token_ids)
        self.tokens += token_ids[: None if self._stop_after is None else self._stop_after - len(self.tokens)]
        self.logprobs += logprobs
        self.first_token.set()
        is_last = len(self.tokens) == self._stop_after
        if is_last and self._is_broken:
            raise RuntimeError("this sink is broken")
        return is_last

    def on_finished(self, outcome: RequestOutcome) -> None:
        self.outcome.set_result(outcome)

    async def wait(self) -> RequestOutcome:
        async with asyncio.timeout(PATIENCE_S):
            return await self.outcome


@pytest.fixture
def sockets() -> Iterator[list[str]]:
    """Two Unix socket addresses that are short enough for one."""
    with tempfile.TemporaryDirectory() as directory:
        yield [f"unix:{Path(directory) / name}" for name in ("a", "b")]


@contextlib.asynccontextmanager
async def dispatching(addresses: list[str], config: DispatcherConfig = CONFIG) -> AsyncIterator[Dispatcher]:
    dispatcher = Dispatcher(addresses, config)
    await dispatcher.start()
    try:
        yield dispatcher
    finally:
        await dispatcher.close()


def adapter(number: int) -> AdapterRef:
    return AdapterRef(f"adapter-{number}", f"{number:064x}", 2)


def spec(
    seed: int = 0,
    max_tokens: int = 10,
    adapter: AdapterRef | None = None,
    deadline: float | None = None,
    num_logprobs: int | None = None,
) -> RequestSpec:
    sampling = EngineSampling(max_tokens=max_tokens, seed=seed, num_logprobs=num_logprobs)
    return RequestSpec(f"r{seed}", (1, 2, 3), adapter, sampling, deadline=deadline)


def expected(request: RequestSpec) -> list[int]:
    digest = request.adapter.digest if request.adapter is not None else ""
    sampling = request.sampling
    return null_tokens(sampling.seed, digest, request.prompt_token_ids, sampling.max_tokens, PLAIN.vocab_size)


def submit_all(dispatcher: Dispatcher, specs: list[RequestSpec]) -> list[tuple[RequestSpec, Sink, RequestHandle]]:
    return [(each, sink, dispatcher.submit(each, sink)) for each in specs for sink in [Sink()]]


def test_many_requests_each_get_their_own_tokens(sockets: list[str]) -> None:
    async def play() -> None:
        async with serve(sockets[0], PLAIN), dispatching(sockets[:1]) as dispatcher:
            assert await dispatcher.wait_connected(PATIENCE_S)
            specs = [spec(n, 30, adapter(n % 5) if n % 5 else None, num_logprobs=2 if n % 2 else None) for n in range(300)]
            submitted = submit_all(dispatcher, specs)
            for request, sink, _ in submitted:
                outcome = await sink.wait()
                assert (outcome.reason, outcome.error) == (FinishReason.LENGTH, None)
                assert sink.tokens == expected(request)
                assert all((entry is not None) == (request.sampling.num_logprobs is not None) for entry in sink.logprobs)
            load = dispatcher.load()
            assert (load.num_waiting, load.num_running, load.draining) == (0, 0, False)
            assert load.output_tokens_per_s > 0
            assert load.data_planes[0].pool.kv_pages == 0
            assert {resident.digest for resident in load.data_planes[0].adapters} == {adapter(n).digest for n in range(1, 5)}

    asyncio.run(play())


def test_nothing_is_taken_while_no_data_plane_is_connected(sockets: list[str]) -> None:
    async def play() -> None:
        async with dispatching(sockets[:1]) as dispatcher:
            assert not await dispatcher.wait_connected(0.01)
            assert (dispatcher.geometry(), dispatcher.description(), dispatcher.pool_pages()) == (None, None, 0)
            with pytest.raises(UnavailableError, match="no data plane is connected"):
                dispatcher.submit(spec(), Sink())
            with pytest.raises(UnavailableError, match="no data plane is connected"):
                dispatcher.preload(adapter(1).digest)
            assert not dispatcher.load().data_planes[0].connected

    asyncio.run(play())


def test_a_full_queue_refuses_and_leaves_the_others_alone(sockets: list[str]) -> None:
    async def play() -> None:
        config = replace(CONFIG, max_waiting=3)
        async with serve(sockets[0], NullConfig(max_num_seqs=1)), dispatching(sockets[:1], config) as dispatcher:
            await dispatcher.wait_connected(PATIENCE_S)
            submitted = submit_all(dispatcher, [spec(n) for n in range(3)])
            with pytest.raises(QueueFullError):
                dispatcher.submit(spec(9), Sink())
            for request, sink, _ in submitted:
                await sink.wait()
                assert sink.tokens == expected(request)

    asyncio.run(play())


def test_another_scheduler_takes_the_place_of_the_real_one(sockets: list[str]) -> None:
    class TakesNone(Scheduler):
        def check_fits(self, spec: RequestSpec) -> DoesNotFit | None:
            return DoesNotFit(1, 0, 0)

    async def play() -> None:
        async with serve(sockets[0], PLAIN):
            dispatcher = Dispatcher(sockets[:1], CONFIG, make_scheduler=TakesNone)
            await dispatcher.start()
            try:
                await dispatcher.wait_connected(PATIENCE_S)
                assert dispatcher.check_fits(spec()) == DoesNotFit(1, 0, 0)
            finally:
                await dispatcher.close()

    asyncio.run(play())


def test_a_sink_that_wants_to_stop_sees_no_token_after_that(sockets: list[str]) -> None:
    async def play() -> None:
        async with serve(sockets[0], PLAIN) as data_plane, dispatching(sockets[:1]) as dispatcher:
            await dispatcher.wait_connected(PATIENCE_S)
            early, last = Sink(stop_after=3), Sink(stop_after=10)
            dispatcher.submit(spec(1, 5000), early)
            dispatcher.submit(spec(2, 10), last)
            assert (await early.wait()).reason is FinishReason.STOPPED
            assert (await last.wait()).reason is FinishReason.STOPPED  # the engine ended it with the same token
            assert early.tokens == expected(spec(1, 3))
            await until(lambda: not data_plane.engine.standing)
            assert len(early.tokens) == 3

    asyncio.run(play())


def test_a_sink_that_breaks_ends_its_own_request_only(sockets: list[str]) -> None:
    async def play() -> None:
        async with serve(sockets[0], PLAIN) as data_plane, dispatching(sockets[:1]) as dispatcher:
            await dispatcher.wait_connected(PATIENCE_S)
            broken, whole = Sink(stop_after=2, is_broken=True), Sink()
            dispatcher.submit(spec(1, 5000), broken)
            dispatcher.submit(spec(2), whole)
            assert isinstance((await broken.wait()).error, InternalError)
            assert (await whole.wait()).reason is FinishReason.LENGTH
            await until(lambda: not data_plane.engine.standing)

    asyncio.run(play())


def test_an_aborted_request_frees_its_pages_and_its_sink_hears_nothing_more(sockets: list[str]) -> None:
    async def play() -> None:
        async with serve(sockets[0], SLOW) as data_plane, dispatching(sockets[:1]) as dispatcher:
            await dispatcher.wait_connected(PATIENCE_S)
            sink = Sink()
            handle = dispatcher.submit(spec(1, 5000), sink)
            await sink.first_token.wait()
            dispatcher.abort(handle)
            dispatcher.abort(handle)
            num_tokens = len(sink.tokens)
            await until(lambda: data_plane.engine.counts.kv_pages == 0)
            await until(lambda: dispatcher.load().data_planes[0].pool.kv_pages == 0)
            assert len(sink.tokens) == num_tokens
            assert not sink.outcome.done()

    asyncio.run(play())


def test_a_deadline_ends_a_running_and_a_waiting_request(sockets: list[str]) -> None:
    async def play() -> None:
        async with serve(sockets[0], replace(SLOW, max_num_seqs=1)) as data_plane, dispatching(sockets[:1]) as dispatcher:
            await dispatcher.wait_connected(PATIENCE_S)
            deadline = time.monotonic() + 0.2
            submitted = submit_all(dispatcher, [spec(n, 5000, deadline=deadline) for n in range(2)])
            for _, sink, _ in submitted:
                assert isinstance((await sink.wait()).error, DeadlineError)
            await until(lambda: not data_plane.engine.standing)

    asyncio.run(play())


def test_streams_go_on_when_the_data_plane_comes_back(sockets: list[str]) -> None:
    async def play() -> None:
        async with dispatching(sockets[:1]) as dispatcher:
            changes: list[bool] = []
            dispatcher.on_connection_change(changes.append)
            async with serve(sockets[0], SLOW):
                await dispatcher.wait_connected(PATIENCE_S)
                submitted = submit_all(dispatcher, [spec(n, 60, adapter(n) if n % 2 else None) for n in range(6)])
                for _, sink, _ in submitted:
                    await sink.first_token.wait()
            await until(lambda: not dispatcher.is_connected)
            assert not any(sink.outcome.done() for _, sink, _ in submitted)
            async with serve(sockets[0], PLAIN):
                for request, sink, _ in submitted:
                    assert (await sink.wait()).reason is FinishReason.LENGTH
                    assert sink.tokens == expected(request)
                assert changes == [True, False, True]

    asyncio.run(play())


def test_streams_go_on_at_another_data_plane(sockets: list[str]) -> None:
    async def play() -> None:
        async with serve(sockets[1], PLAIN), dispatching(sockets) as dispatcher:
            async with serve(sockets[0], SLOW) as first:
                await until(lambda: all(data_plane.connected for data_plane in dispatcher.load().data_planes))
                submitted = submit_all(dispatcher, [spec(n, 200) for n in range(20)])
                await until(lambda: len(first.engine.standing) > 0)
            for request, sink, _ in submitted:
                assert (await sink.wait()).reason is FinishReason.LENGTH
                assert sink.tokens == expected(request)

    asyncio.run(play())


def test_requests_fail_when_no_data_plane_comes_back_in_time(sockets: list[str]) -> None:
    async def play() -> None:
        async with dispatching(sockets[:1], replace(CONFIG, outage_grace_s=0.05)) as dispatcher:
            async with serve(sockets[0], SLOW):
                await dispatcher.wait_connected(PATIENCE_S)
                sink = Sink()
                dispatcher.submit(spec(1, 5000), sink)
                await sink.first_token.wait()
            error = (await sink.wait()).error
            assert isinstance(error, UnavailableError)
            assert error.reason == "NO_DATA_PLANE"

    asyncio.run(play())


def test_a_data_plane_with_another_model_is_refused(sockets: list[str], caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        other = NullConfig(geometry=replace(PLAIN.geometry, fingerprint="1" * 64))
        async with serve(sockets[0], PLAIN), dispatching(sockets) as dispatcher:
            await dispatcher.wait_connected(PATIENCE_S)
            async with serve(sockets[1], other) as refused:
                # Each time that it is asked.
                await until(lambda: caplog.text.count("it serves another model than the rest") > 2)
                assert refused.num_sessions == 0
            assert dispatcher.geometry() == PLAIN.geometry

    asyncio.run(play())


def test_removing_an_adapter_fails_its_requests(sockets: list[str]) -> None:
    async def play() -> None:
        async with serve(sockets[0], replace(SLOW, max_num_seqs=2)), dispatching(sockets[:1]) as dispatcher:
            await dispatcher.wait_connected(PATIENCE_S)
            users = submit_all(dispatcher, [spec(n, 5000, adapter(1)) for n in range(4)])
            [(request, other, _)] = submit_all(dispatcher, [spec(9)])
            await users[0][1].first_token.wait()
            assert dispatcher.abort_adapter(adapter(1).digest) == 4
            for _, sink, _ in users:
                error = (await sink.wait()).error
                assert isinstance(error, AbortedError)
                assert error.reason == "ADAPTER_REMOVED"
            await other.wait()
            assert other.tokens == expected(request)

    asyncio.run(play())


def test_residency_follows_preloads_and_requests(sockets: list[str]) -> None:
    async def play() -> None:
        async with serve(sockets[0], PLAIN), dispatching(sockets[:1]) as dispatcher:
            await dispatcher.wait_connected(PATIENCE_S)
            changed: list[str] = []
            dispatcher.on_residency_change(changed.append)
            digest = adapter(1).digest
            assert dispatcher.residency(digest) == ()
            dispatcher.preload(digest)
            await until(lambda: [each.place for each in dispatcher.residency(digest)] == [AdapterPlace.DEVICE])
            assert digest in changed
            assert dispatcher.residency(digest)[0].last_used is None
            sink = Sink()
            dispatcher.submit(spec(1, adapter=adapter(1)), sink)
            await sink.wait()
            last_used = dispatcher.residency(digest)[0].last_used
            assert last_used is not None and abs(last_used - time.time()) < PATIENCE_S

    asyncio.run(play())


def test_draining_finishes_what_runs_and_takes_nothing_new(sockets: list[str]) -> None:
    async def play() -> None:
        async with serve(sockets[0], SLOW), dispatching(sockets[:1]) as dispatcher:
            await dispatcher.wait_connected(PATIENCE_S)
            submitted = submit_all(dispatcher, [spec(n, 20) for n in range(3)])
            drain = asyncio.create_task(dispatcher.drain(PATIENCE_S))
            await asyncio.sleep(0)
            with pytest.raises(UnavailableError, match="draining"):
                dispatcher.submit(spec(9), Sink())
            result = await drain
            assert (result.num_finished, result.num_aborted) == (3, 0)
            assert all(sink.tokens == expected(request) for request, sink, _ in submitted)

    asyncio.run(play())


def test_a_drain_that_takes_too_long_aborts_the_running_and_refuses_the_waiting(sockets: list[str]) -> None:
    async def play() -> None:
        async with serve(sockets[0], replace(SLOW, max_num_seqs=1)), dispatching(sockets[:1]) as dispatcher:
            await dispatcher.wait_connected(PATIENCE_S)
            submitted = submit_all(dispatcher, [spec(n, 5000) for n in range(2)])
            await submitted[0][1].first_token.wait()
            result = await dispatcher.drain(0.01)
            assert (result.num_finished, result.num_aborted) == (0, 2)
            running, waiting = [await sink.wait() for _, sink, _ in submitted]
            assert (running.reason, running.error) == (FinishReason.ABORTED, None)
            assert isinstance(waiting.error, UnavailableError)

    asyncio.run(play())
