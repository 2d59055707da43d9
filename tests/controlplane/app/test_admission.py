"""Requests that do not fit or must wait: what they are told, and who is next."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf import duration_pb2

from protos.loraplane.v1 import system_pb2
from tests.controlplane.app.served import NULL, Client, refused, sampling
from tests.waiting import until


def test_a_request_larger_than_every_pool_is_refused_with_its_pages(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        code, message, details = await refused(client.generate(text="x", sampling=sampling(max_tokens=200)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details["ErrorInfo"].reason == "POOL_TOO_SMALL"
        assert "need 13 pages; the largest data plane has 4" in message

    play(scenario, replace(NULL, num_pages=4))


def test_a_full_queue_is_told_with_a_delay_and_harms_no_running_stream(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        long = asyncio.create_task(client.generate(text="x", sampling=sampling(max_tokens=250, seed=0)))
        await until(lambda: bool(client.null.engine.standing))
        waiting = [asyncio.create_task(client.generate(text="x", sampling=sampling(max_tokens=2))) for _ in range(8)]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        full = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
        assert full
        for error in full:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            _, _, details = await refused(_raise(error))
            assert {"QuotaFailure", "RetryInfo", "ErrorInfo"} == set(details)
        assert (await long).token_ids[0] == client.expected("x", 0, 250)

    play(scenario, replace(NULL, max_num_seqs=1, step_s=0.005), max_waiting=2)


def test_a_request_that_cannot_start_in_time_is_aborted_early(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        long = asyncio.create_task(client.generate(text="x", sampling=sampling(max_tokens=250, seed=0)))
        await until(lambda: bool(client.null.engine.standing))
        slo = duration_pb2.Duration(nanos=50_000_000)
        code, _, details = await refused(client.generate(text="x", ttft_slo=slo))
        assert code is grpc.StatusCode.ABORTED
        assert details["ErrorInfo"].reason == "SLO_EARLY_ABORT"
        assert "RetryInfo" in details
        long.cancel()

    play(scenario, replace(NULL, max_num_seqs=1, step_s=0.02))


def test_the_larger_priority_is_served_first_and_equals_by_arrival(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        ended: list[str] = []

        async def ask(request_id: str, **fields: Any) -> None:
            await client.generate(text="x", request_id=request_id, sampling=sampling(max_tokens=2), **fields)
            ended.append(request_id)

        first = asyncio.create_task(client.generate(text="x", sampling=sampling(max_tokens=100, seed=0)))
        tasks = []
        await until(lambda: bool(client.null.engine.standing))
        asked = [("low", -100), ("unset", None), ("zero", 0), ("high", 100), ("higher than none", 1)]
        for number, (request_id, priority) in enumerate(asked, start=1):
            tasks.append(asyncio.create_task(ask(request_id, priority=priority)))
            while (await client.system.GetLoad(system_pb2.GetLoadRequest())).num_waiting < number:
                await asyncio.sleep(0)
        await asyncio.gather(first, *tasks)
        assert ended == ["high", "higher than none", "unset", "zero", "low"]

    play(scenario, replace(NULL, max_num_seqs=1, step_s=0.005))


async def _raise(error: BaseException) -> None:
    raise error
