"""What `loraplane generate` sends and shows."""

import io
import json
from collections.abc import Callable
from typing import Any

import pytest

# Test modules of one folder cannot import one another; the fixtures' types are known by shape.
Cli = Callable[..., Any]


def test_text_goes_to_stdout_and_the_summary_to_stderr(cli: Cli) -> None:
    result = cli("generate", "Tell me")
    assert result.exit_code == 0
    assert result.out == "Once upon a time\n"
    assert "3 tokens in, 4 out" in result.err and "stop at 'The End'" in result.err and "first token 20 ms" in result.err


def test_quiet_leaves_the_text_alone(cli: Cli) -> None:
    result = cli("generate", "Tell me", "--quiet")
    assert (result.out, result.err) == ("Once upon a time\n", "")


def test_every_option_reaches_its_field(cli: Cli, running: Any) -> None:
    options = (
        "--max-tokens 9 --min-tokens 2 --temperature 0.5 --top-p 0.25 --top-k 7 --min-p 0.125 --seed 18446744073709551615 "
        "--repetition-penalty 1.5 --presence-penalty 0.5 --frequency-penalty -0.5 --n 2 --stop-token-id 3 --stop-token-id 4 "
        "--ignore-eos --logprobs 0 --priority 5 --ttft-slo 1.5 --request-id mine --include-stop --show-special-tokens --at-end"
    )
    result = cli("generate", "Tell me", "--stop", "The End", "--stop", "\n", *options.split())
    assert result.exit_code == 0, result.err
    request = running.service.requests[-1]
    sampling = request.sampling
    assert request.text == "Tell me" and request.request_id == "mine"
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature, sampling.top_p) == (9, 2, 0.5, 0.25)
    assert (sampling.top_k, sampling.min_p, sampling.seed, sampling.n) == (7, 0.125, 2**64 - 1, 2)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, 0.5, -0.5)
    assert list(sampling.stop) == ["The End", "\n"] and list(sampling.stop_token_ids) == [3, 4] and sampling.ignore_eos
    assert request.HasField("logprobs") and request.logprobs == 0 and request.priority == 5
    assert request.ttft_slo.ToMilliseconds() == 1500
    assert request.output.include_stop and request.output.show_special_tokens and request.output.at_end


def test_what_is_not_said_is_not_sent(cli: Cli, running: Any) -> None:
    cli("generate", "Tell me")
    request = running.service.requests[-1]
    assert request.text == "Tell me"
    assert not request.sampling.ListFields() and not request.output.ListFields()
    assert not any(request.HasField(name) for name in ("logprobs", "priority", "ttft_slo"))


def test_prompt_comes_from_standard_input(cli: Cli, running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    cli("generate", "-")
    assert running.service.requests[-1].text == "from a pipe\n"


def test_system_message_makes_it_a_chat(cli: Cli, running: Any) -> None:
    cli("generate", "Hello", "--system", "Be brief.")
    messages = running.service.requests[-1].chat.messages
    assert [(m.role, m.content) for m in messages] == [("system", "Be brief."), ("user", "Hello")]


def test_token_ids_take_the_place_of_the_prompt(cli: Cli, running: Any) -> None:
    result = cli("generate", "--token-ids", "1, 15 27", "--token-ids-only", "--quiet")
    assert list(running.service.requests[-1].token_ids.ids) == [1, 15, 27]
    assert result.out == "5 6 7 8\n"
    assert cli("generate", "text too", "--token-ids", "1").exit_code == 2


def test_choices_are_shown_whole(cli: Cli) -> None:
    result = cli("generate", "Tell me", "--n", "2", "--quiet")
    assert result.out == "[0] Once upon a time\n[1] Once upon a time\n"


def test_logprobs_are_shown_with_their_alternatives(cli: Cli) -> None:
    result = cli("generate", "Tell me", "--logprobs", "1", "--quiet")
    assert "-0.250" in result.out and "9 '[alt]' -0.500" in result.out


def test_json_is_one_event_per_line(cli: Cli) -> None:
    result = cli("generate", "Tell me", "--json")
    events = [json.loads(line) for line in result.out.splitlines()]
    assert [next(iter(event)) for event in events] == ["started", "chunk", "chunk", "chunk", "chunk", "finished"]
    assert "".join(event["chunk"]["text"] for event in events if "chunk" in event) == "Once upon a time"
    assert result.err == ""


@pytest.mark.parametrize("option", ["--max-tokens=-1", "--seed=-1", "--top-k=4294967296", "--stop-token-id=-7"])
def test_a_value_that_its_field_cannot_hold_names_the_option(cli: Cli, option: str) -> None:
    result = cli("generate", "Tell me", option)
    assert result.exit_code == 2
    assert option.split("=")[0] in result.err and option.split("=")[1] in result.err


def test_the_token_is_sent_as_bearer(cli: Cli, running: Any) -> None:
    cli("generate", "Tell me", environment={"LORAPLANE_TOKEN": "secret"})
    cli("generate", "Tell me", "--token", "other", environment={"LORAPLANE_TOKEN": "secret"})
    assert running.service.tokens == ["Bearer secret", "Bearer other"]
