"""A request id makes a call that is sent again the same call."""

import asyncio

from controlplane.registry.redis_registry import RequestMark
from tests.controlplane.services.adapter_service.refusal import Code, Refused
from tests.controlplane.services.adapter_service.served import Run, Served


def test_a_repeated_request_id_gets_the_first_answer(run: Run) -> None:
    async def scenario(s: Served) -> None:
        first, second = await asyncio.gather(*(s.register("a", 1, request_id="r1") for _ in range(2)))
        assert first == second == await s.register("a", 1, request_id="r1")
        with Refused(Code.INVALID_ARGUMENT, "used within a day for a different request") as refusal:
            await s.register("b", 1, request_id="r1")
        assert refusal.fields == ["request_id"]
        updated = await s.update("a", ["source"], seed=2, request_id="r2")
        assert await s.update("a", ["source"], seed=2, request_id="r2") == updated
        assert len(updated.versions) == 2

    run(scenario)


def test_calls_with_one_request_id_never_run_beside_each_other(run: Run) -> None:
    async def scenario(s: Served) -> None:
        num_inside, most = 0, 0

        async def call(times: int) -> None:
            nonlocal num_inside, most
            for _ in range(times):
                async with s.service._once(RequestMark("r1", "fingerprint")):
                    num_inside += 1
                    most = max(most, num_inside)
                    await asyncio.sleep(0)
                    num_inside -= 1

        # The first comes again at once, while the second has been woken and does not run yet.
        await asyncio.gather(call(3), call(1), call(1))
        assert most == 1
        assert not s.service._request_locks

    run(scenario)
