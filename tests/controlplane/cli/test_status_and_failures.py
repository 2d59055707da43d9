"""What `status` and `health` show, and how failures are told."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from grpc_health.v1 import health_pb2
from hypothesis import given
from hypothesis import strategies as st

from controlplane.cli.main import main
from controlplane.cli.output import human_bytes, human_seconds, printable
from controlplane.cli.status import bar_widths

Cli = Callable[..., Any]


def test_status_shows_queues_pool_and_resident_adapters(cli: Cli) -> None:
    shown = cli("status").out
    for part in ("tiny (LlamaForCausalLM)", "4 running", "2 waiting (limit 1000)", "123.4 output tokens/s", "KV 25 25%"):
        assert part in shown
    for part in ("adapters in use 10 10%", "adapters idle 5 5%", "free 60 60%", "pirate", "(unregistered)", "not connected"):
        assert part in shown


def test_status_in_json_is_one_document(cli: Cli) -> None:
    status = json.loads(cli("status", "--json").out)
    assert status["server"]["base_model"] == "tiny"
    assert status["load"]["data_planes"][0]["pool"]["kv_pages"] == 25


def test_common_options_stand_before_or_after_the_command(cli: Cli) -> None:
    assert json.loads(cli("--json", "status").out) == json.loads(cli("status", "--json").out)


@pytest.mark.parametrize(("status", "exit_code"), [("SERVING", 0), ("NOT_SERVING", 1)])
def test_health_is_an_exit_code(cli: Cli, running: Any, status: str, exit_code: int) -> None:
    running.health.set("", health_pb2.HealthCheckResponse.ServingStatus.Value(status))
    result = cli("health")
    assert (result.exit_code, result.out.strip()) == (exit_code, status)


def test_an_unreachable_service_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--server", "127.0.0.1:1", "--timeout", "5"], {}) == 3
    assert "cannot reach loraplane at 127.0.0.1:1" in (told := capsys.readouterr().err)
    assert "loraplane up" in told


def test_field_violations_are_told_one_by_one(cli: Cli) -> None:
    result = cli("generate", "Tell me", "--temperature", "101")
    assert result.exit_code == 1
    assert "INVALID_ARGUMENT (INVALID_REQUEST): the request has 1 bad field" in result.err
    assert "sampling.temperature: is 101; at most 100" in result.err


def test_a_retry_hint_is_told(cli: Cli) -> None:
    result = cli("generate", "Tell me", "--priority", "-1")
    assert result.exit_code == 1 and "RESOURCE_EXHAUSTED (QUEUE_FULL)" in result.err and "try again in 1.5 s" in result.err


def test_failures_in_json_carry_the_details(cli: Cli) -> None:
    error = json.loads(cli("generate", "Tell me", "--adapter", "nobody", "--json").out)["error"]
    assert error["code"] == "NOT_FOUND" and error["reason"] == "ADAPTER_NOT_FOUND" and error["resource"] == "adapter nobody"


@given(st.lists(st.integers(0, 10_000), min_size=4, max_size=4))
def test_a_bar_is_as_wide_as_asked_and_hides_nothing(counts: list[int]) -> None:
    widths = bar_widths(tuple(counts), 48)
    assert sum(widths) == 48 and min(widths) >= 0
    if sum(counts):
        assert all((width > 0) == (count > 0) for width, count in zip(widths, counts, strict=True))


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert printable("a\x1b[31mb\x07\n\tc\x9b") == "a\\x1b[31mb\\x07\n\tc\\x9b"


def test_quantities_read_well() -> None:
    assert [human_bytes(n) for n in (0, 812, 1536, 5 * 1024**3)] == ["0 B", "812 B", "1.5 KiB", "5 GiB"]
    assert [human_seconds(s) for s in (0.0004, 0.023, 1.4, 185.0)] == ["400 µs", "23 ms", "1.40 s", "3 min 5 s"]
