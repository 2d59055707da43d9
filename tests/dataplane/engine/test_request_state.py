"""When a request ends, and what phase it is in."""

from typing import Any

import pytest

from dataplane.engine.request_state import RequestPhase, RequestState
from protos.planes import AdmittedRequest, EngineFinishReason, EngineSampling

EOS = (7, 8)


def _after(output: list[int], max_model_len: int = 100, **sampling: Any) -> EngineFinishReason | None:
    """Why a request with a prompt of 3 tokens ends after the last of these, when it came that far."""
    params = EngineSampling(**{"max_tokens": 50, **sampling})
    request = RequestState(AdmittedRequest(1, "r", (1, 2, 3), 0, "", params), 0.0, max_model_len)
    for token_id in output:
        request.launch(request.num_pending_tokens)
        request.append(token_id)
    return request.finish_reason(EOS)


@pytest.mark.parametrize(
    ("output", "sampling", "reason"),
    [
        ([4], {}, None),
        ([4, 7], {}, EngineFinishReason.EOS),
        ([8], {}, EngineFinishReason.EOS),
        ([8], {"ignore_eos": True}, None),
        ([8], {"ignore_eos": True, "stop_token_ids": (8,)}, EngineFinishReason.STOP_TOKEN),
        ([9], {"stop_token_ids": (4, 9)}, EngineFinishReason.STOP_TOKEN),
        ([7], {"min_tokens": 1}, None),
        ([4, 7], {"min_tokens": 1}, EngineFinishReason.EOS),
        ([9], {"min_tokens": 1, "stop_token_ids": (9,)}, None),
        ([4, 4, 4], {"max_tokens": 3}, EngineFinishReason.LENGTH),
        ([4, 4, 7], {"max_tokens": 3}, EngineFinishReason.EOS),
    ],
)
def test_finish_reason(output: list[int], sampling: dict[str, Any], reason: EngineFinishReason | None) -> None:
    assert _after(output, **sampling) is reason


def test_the_models_length_limit_ends_a_request() -> None:
    assert _after([4], max_model_len=5) is None
    assert _after([4, 4], max_model_len=5) is EngineFinishReason.LENGTH


def test_output_of_an_earlier_admission_counts_and_is_prefilled() -> None:
    admitted = AdmittedRequest(1, "r", (1, 2, 3, 4, 5), 2, "", EngineSampling(max_tokens=3))
    request = RequestState(admitted, 0.0, 100)
    assert (request.num_prompt_tokens, request.num_output_tokens) == (3, 2)
    phases = []
    for num_tokens in (4, 1):
        request.launch(num_tokens)
        phases.append(request.phase)
    assert phases == [RequestPhase.PREFILL, RequestPhase.DECODE]
    request.append(6)
    assert request.finish_reason(EOS) is EngineFinishReason.LENGTH


def test_a_token_that_no_step_was_to_choose_is_a_bug() -> None:
    request = RequestState(AdmittedRequest(1, "r", (1, 2), 0, "", EngineSampling(max_tokens=3)), 0.0, 100)
    request.launch(1)
    with pytest.raises(AssertionError, match="not on its way"):
        request.append(1)
    with pytest.raises(AssertionError, match="2 of 1"):
        request.launch(2)


def test_a_token_on_its_way_counts_before_it_is_known() -> None:
    request = RequestState(AdmittedRequest(1, "r", (1, 2), 0, "", EngineSampling(max_tokens=2)), 0.0, 100)
    request.launch(2)
    assert (request.num_tokens, request.num_pending_tokens, request.num_output_tokens, request.is_full) == (3, 1, 0, False)
    request.launch(1)
    assert (request.num_tokens, request.num_pending_tokens, request.is_full) == (4, 1, True)
    request.append(7)
    request.append(8)
    assert request.token_ids.tolist() == [1, 2, 7, 8]
    assert request.finish_reason(EOS) is EngineFinishReason.EOS
