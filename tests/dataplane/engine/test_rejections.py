"""Admissions that the engine refuses, with the reason, and without harm to others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from protos.planes import EngineFinishReason

if TYPE_CHECKING:
    from tests.dataplane.conftest import Admit, Expect, MakeWorld


@pytest.mark.parametrize(
    ("request_options", "message"),
    [
        ({"prompt": []}, "0 token_ids of which 0 are output: at least one must be prompt"),
        ({"prompt": [], "output": [1]}, "1 token_ids of which 1 are output"),
        ({"prompt": [1, 50_000]}, "token id 50000 is outside the vocabulary of 50000"),
        ({"prompt": [1] * 200}, "200 tokens leave no room for another: max_model_len is 200"),
        ({"prompt": [1], "output": [1, 2], "max_tokens": 2}, "2 output tokens are there already, max_tokens is 2"),
    ],
)
def test_a_malformed_admission_is_rejected_with_the_reason(
    make_world: MakeWorld, admit: Admit, expect: Expect, request_options: dict[str, object], message: str
) -> None:
    world = make_world()
    world.update(admit=[admit(1, **request_options), admit(2, [1], 3)])
    world.run_until_idle()
    reason, error = world.finished[1]
    assert reason is EngineFinishReason.REJECTED
    assert error.startswith(message)
    assert world.tokens == {2: expect([1], 3)}


def test_a_prompt_larger_than_the_pool_is_rejected(make_world: MakeWorld, admit: Admit) -> None:
    world = make_world(num_pages=4)
    world.update(admit=[admit(1, [1] * 17)])
    world.run_until_idle()
    assert world.finished[1] == (EngineFinishReason.REJECTED, "17 tokens take 5 pages; the whole pool has 4")


def test_more_requests_than_max_num_seqs_are_rejected(make_world: MakeWorld, admit: Admit) -> None:
    world = make_world(max_num_seqs=2)
    world.update(admit=[admit(key, [1], 3) for key in range(3)])
    world.run_until_idle()
    assert world.finished[2] == (EngineFinishReason.REJECTED, "2 requests are running, the limit max_num_seqs is 2")


def test_a_key_used_twice_ends_both(make_world: MakeWorld, admit: Admit) -> None:
    world = make_world()
    world.update(admit=[admit(1, [1], 30)])
    world.turn()
    world.update(admit=[admit(1, [2], 30)])
    world.run_until_idle()
    assert world.finished[1] == (EngineFinishReason.REJECTED, "request_key 1 is running already")
    assert world.engine.num_running == 0
