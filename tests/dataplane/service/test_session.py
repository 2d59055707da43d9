"""The bridge between the engine's thread and the event loop."""

import asyncio
import threading
from collections import deque

import pytest

from dataplane.engine.inbox import SessionEnd
from dataplane.service.session import MAX_WAITING_REPORTS, MAX_WAITING_UPDATES, Session, SessionEndedError
from protos.planes import StepReport


def test_reports_of_another_thread_arrive_in_order() -> None:
    async def run() -> list[int]:
        room = threading.Event()
        session = Session("s", on_room=room.set)

        def produce() -> None:
            for sequence in range(1000):
                while not session.has_room():
                    room.wait()
                    room.clear()
                session.send(StepReport(sequence, 0))
            session.close(SessionEnd.SHUTTING_DOWN)

        thread = threading.Thread(target=produce)
        thread.start()
        read = []
        with pytest.raises(SessionEndedError) as raised:
            while True:
                read += [report.sequence for report in await session.next_reports()]
        await asyncio.to_thread(thread.join)
        assert raised.value.end is SessionEnd.SHUTTING_DOWN
        return read

    assert asyncio.run(run()) == list(range(1000))


def test_room_is_told_when_full_reports_are_read_and_not_before() -> None:
    async def run() -> None:
        told: list[int] = []
        session = Session("s", on_room=lambda: told.append(1))
        session.send(StepReport(0, 0))
        await session.next_reports()
        assert told == []
        for sequence in range(MAX_WAITING_REPORTS):
            assert session.has_room()
            session.send(StepReport(sequence, 0))
        assert not session.has_room()
        await session.next_reports()
        assert told == [1]
        assert session.has_room()

    asyncio.run(run())


def test_an_engine_that_fills_up_while_its_reports_are_read_is_told_of_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        told: list[int] = []
        session = Session("s", on_room=lambda: told.append(1))

        class ReadSlowly(deque[StepReport]):
            """The engine's thread runs just before the first report is taken out."""

            def popleft(self) -> StepReport:
                if session.has_room():
                    session.send(StepReport(99, 0))
                    assert not session.has_room(), "the engine waits for room from here on"
                return super().popleft()

        reports = ReadSlowly(StepReport(sequence, 0) for sequence in range(MAX_WAITING_REPORTS - 1))
        monkeypatch.setattr(session, "_reports", reports)
        await session.next_reports()
        assert told == [1]

    asyncio.run(run())


def test_the_first_reason_for_the_end_counts() -> None:
    async def run() -> None:
        session = Session("s", on_room=lambda: None)
        session.close(SessionEnd.TAKEN_OVER)
        session.close(SessionEnd.CLIENT_DONE)
        with pytest.raises(SessionEndedError) as raised:
            await session.next_reports()
        assert raised.value.end is SessionEnd.TAKEN_OVER

    asyncio.run(run())


def test_updates_wait_until_the_engine_took_earlier_ones() -> None:
    async def run() -> None:
        session = Session("s", on_room=lambda: None)
        for _ in range(MAX_WAITING_UPDATES):
            await session.wait_for_credit()
        waiter = asyncio.create_task(session.wait_for_credit())
        await asyncio.sleep(0)
        assert not waiter.done()
        threading.Thread(target=session.update_applied).start()
        await waiter

    asyncio.run(run())


def test_a_loop_that_has_ended_does_not_trouble_the_engine() -> None:
    async def make() -> Session:
        return Session("s", on_room=lambda: None)

    session = asyncio.run(make())
    session.send(StepReport(1, 0))
    session.close(SessionEnd.SHUTTING_DOWN)
