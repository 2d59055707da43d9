"""Another server is asked for the same and measured by the same rules, and its failures are told."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from benchmarks.serving.driver import RequestFailedError
from benchmarks.serving.openai_driver import OpenAiTarget, TokenCounter
from benchmarks.serving.outcome import PlannedRequest

if TYPE_CHECKING:
    from tests.benchmarks.serving.conftest import OpenAiServer

StartServer = Callable[..., "OpenAiServer"]
PROMPT = [7, 11, 13]


def ask(target: OpenAiTarget, adapter: str = "", output_tokens: int = 9) -> list[int]:
    """How many tokens each message brought."""

    async def scenario() -> list[int]:
        driver = target.open()
        try:
            counts: list[int] = []
            request = PlannedRequest(0, 0.0, adapter, len(PROMPT), output_tokens)
            assert await driver.prepare(request, PROMPT)(counts.append) is None
            return counts
        finally:
            await driver.close()

    return asyncio.run(scenario())


def test_a_request_asks_for_exactly_that_many_greedy_tokens_of_that_adapter(openai_server: StartServer) -> None:
    server = openai_server()
    target = OpenAiTarget(server.url, "llama", api_key="secret", extra={"priority": 3})
    ask(target, "adapter-5")
    ask(target)
    assert server.requests[0] == (
        "/v1/completions",
        {
            "model": "adapter-5",
            "prompt": PROMPT,
            "max_tokens": 9,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "priority": 3,
        },
    )
    assert server.requests[1][1]["model"] == "llama"
    assert server.headers[0]["authorization"] == "bearer secret"


@pytest.mark.parametrize(("tokens_per_chunk", "counts"), [(1, [1] * 9), (4, [4, 4, 1])])
def test_tokens_that_come_together_are_counted_by_the_usage_so_far(
    openai_server: StartServer, tokens_per_chunk: int, counts: list[int]
) -> None:
    assert ask(OpenAiTarget(openai_server(tokens_per_chunk=tokens_per_chunk).url, "llama")) == counts


def test_without_usage_a_chunk_is_a_token_and_the_end_is_none(openai_server: StartServer) -> None:
    assert ask(OpenAiTarget(openai_server(tells_usage=False).url, "llama")) == [1] * 9


@pytest.mark.parametrize(
    ("adapter", "status", "detail"),
    [
        ("unknown", "HTTP_404", "the model `unknown` does not exist"),
        ("fails", "ERROR", "out of memory"),
        ("babbles", "MALFORMED", r"JSONDecodeError in the chunk \{\]"),
        ("dies", "CONNECTION", "RemoteProtocolError"),
    ],
)
def test_failures_have_a_status(openai_server: StartServer, adapter: str, status: str, detail: str) -> None:
    with pytest.raises(RequestFailedError, match=detail) as caught:
        ask(OpenAiTarget(openai_server().url, "llama"), adapter)
    assert caught.value.status == status


def test_nobody_there_is_a_failed_connection() -> None:
    with pytest.raises(RequestFailedError, match="ConnectError") as caught:
        ask(OpenAiTarget("http://127.0.0.1:1", "llama"))
    assert caught.value.status == "CONNECTION"


def test_a_usage_that_falls_back_counts_for_nothing() -> None:
    counter = TokenCounter()
    assert [counter.take(f'{{"usage": {{"completion_tokens": {n}}}}}') for n in (2, 1, 3)] == [2, 0, 1]
