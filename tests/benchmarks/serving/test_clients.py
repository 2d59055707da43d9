"""Several client processes make one run."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from benchmarks.serving.clients import ClientFailedError, Clients, Progress
from benchmarks.serving.driver import Driver, Prompts
from benchmarks.serving.openai_driver import OpenAiTarget
from benchmarks.serving.outcome import PlannedRequest

if TYPE_CHECKING:
    from tests.benchmarks.serving.conftest import OpenAiServer

StartServer = Callable[..., "OpenAiServer"]


@dataclass(frozen=True)
class NoTarget:
    """A target whose clients end at once."""

    def open(self) -> Driver:
        raise SystemExit(3)


def test_processes_share_a_trace_and_take_one_run_after_another(openai_server: StartServer) -> None:
    server = openai_server()
    requests = [PlannedRequest(i, 0.01 * i, f"adapter-{i % 3}", 5 + i, 3 + i) for i in range(9)]
    seen: list[Progress] = []
    with Clients(OpenAiTarget(server.url, "llama"), num_processes=2) as clients:
        first = asyncio.run(clients.run(requests, Prompts((42, 0), 1000), seen.append))
        again = asyncio.run(clients.run(requests[:1], Prompts((42, 1), 1000)))
    assert [outcome.request for outcome in first.outcomes] == requests
    assert [outcome.num_tokens for outcome in first.outcomes] == [request.output_tokens for request in requests]
    assert first.wall_s == max(outcome.finished_s for outcome in first.outcomes) >= 0.08
    assert len(first.cpu_s) == 2
    assert all(progress.num_finished <= progress.num_sent <= len(requests) for progress in seen)
    bodies = [body for _, body in server.requests]
    assert sorted(len(body["prompt"]) for body in bodies[:9]) == [5 + i for i in range(9)]
    # A server that remembers prompts gains nothing from the run before.
    assert bodies[9]["prompt"] not in [body["prompt"] for body in bodies[:9]]
    assert again.outcomes[0].is_ok


def test_a_process_that_ends_is_told_and_not_waited_for() -> None:
    with pytest.raises(ClientFailedError, match="client-0 ended with exit code 3"), Clients(NoTarget(), 1) as clients:
        asyncio.run(clients.run([PlannedRequest(0, 0.0, "", 1, 1)], Prompts((0,), 10)))
