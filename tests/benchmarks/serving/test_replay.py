"""The loop is open: what is sent when depends on the plan alone, and a client that cannot keep it says so."""

import asyncio
import time
from collections.abc import Sequence

from benchmarks.serving.driver import OnTokens, Prompts, RequestFailedError, Send
from benchmarks.serving.outcome import Outcome, PlannedRequest, ServerTimings
from benchmarks.serving.replay import Replay

PROMPTS = Prompts((1, 2), 100)
TIMINGS = ServerTimings(0.0, 0.0, 0)


def planned(*times_s: float) -> list[PlannedRequest]:
    return [PlannedRequest(index, at_s, "", 4, 2) for index, at_s in enumerate(times_s)]


class Driver:
    """Answers no request before as many as `num_expected` have been sent."""

    def __init__(self, num_expected: int = 0, blocks_s: float = 0.0, status: str = "") -> None:
        self._num_expected = num_expected
        self._blocks_s = blocks_s
        self._status = status
        self._all_sent = asyncio.Event()
        self.prompts: list[list[int]] = []
        self.num_sent = 0

    def prepare(self, request: PlannedRequest, prompt_token_ids: list[int]) -> Send:
        self.prompts.append(prompt_token_ids)

        async def send(on_tokens: OnTokens) -> ServerTimings | None:
            time.sleep(self._blocks_s)  # a client that is too slow
            self.num_sent += 1
            if self.num_sent >= self._num_expected:
                self._all_sent.set()
            await self._all_sent.wait()
            on_tokens(1)
            on_tokens(0)
            if self._status:
                raise RequestFailedError(self._status, "told so")
            on_tokens(1)
            return TIMINGS

        return send

    async def close(self) -> None:
        """Nothing to close."""


def replay(driver_of: "type[Driver]", requests: Sequence[PlannedRequest], **options: object) -> tuple[Driver, list[Outcome]]:
    async def scenario() -> tuple[Driver, list[Outcome]]:
        driver = driver_of(**options)  # type: ignore[arg-type]
        return driver, await Replay(driver, requests, PROMPTS).run(time.monotonic())

    return asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_request_is_sent_at_its_time_whatever_became_of_those_before() -> None:
    # No answer comes before the last request is sent: in a closed loop this would never end.
    _, outcomes = replay(Driver, planned(0.0, 0.0, 0.01, 0.05), num_expected=4)
    assert [outcome.status for outcome in outcomes] == ["OK"] * 4
    assert all(outcome.late_s >= 0 for outcome in outcomes)
    assert outcomes[0].finished_s >= 0.05


def test_a_client_that_is_late_says_so_and_its_latencies_hold_it() -> None:
    _, outcomes = replay(Driver, planned(0.0, 0.01), blocks_s=0.1)
    assert outcomes[1].late_s >= 0.08
    assert outcomes[1].ttft_s is not None and outcomes[1].ttft_s >= 0.18  # it blocks once more, for itself


def test_outcomes_hold_every_message_that_brought_tokens() -> None:
    _, (outcome,) = replay(Driver, planned(0.0))
    assert outcome.token_counts == [1, 1]
    assert outcome.sent_s <= outcome.arrivals_s[0] <= outcome.arrivals_s[1] <= outcome.finished_s
    assert outcome.server == TIMINGS


def test_a_request_that_fails_is_an_outcome_too() -> None:
    _, outcomes = replay(Driver, planned(0.0, 0.0), status="UNAVAILABLE")
    assert [(outcome.status, outcome.detail, outcome.num_tokens) for outcome in outcomes] == [("UNAVAILABLE", "told so", 1)] * 2


def test_prompts_are_random_by_seed_and_index_unless_the_trace_has_them() -> None:
    requests = [*planned(0.0, 0.0), PlannedRequest(2, 0.0, "", 2, 2, (5, 6))]
    prompts = replay(Driver, requests)[0].prompts
    assert [len(prompt) for prompt in prompts] == [4, 4, 2]
    assert prompts[0] != prompts[1] and prompts[2] == [5, 6]
    assert prompts == replay(Driver, requests)[0].prompts
    assert prompts[0] != Prompts((1, 3), 100).token_ids(requests[0])
    assert all(3 <= token_id < 100 for prompt in prompts for token_id in prompt)
