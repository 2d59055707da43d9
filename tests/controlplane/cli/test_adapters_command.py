"""What `loraplane adapters` sends and shows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protos.loraplane.v1 import adapter_pb2 as pb

Cli = Callable[..., Any]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Files with the names of a PEFT adapter, large enough for several chunks."""
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 10_000)
    return tmp_path


def test_register_uploads_the_files_and_publishes_the_name(cli: Cli, running: Any, directory: Path) -> None:
    result = cli("adapters", "register", "pirate", str(directory), "--label", "team=sea", "--alias", "arr", "--pin")
    assert result.exit_code == 0, result.err
    assert "pirate registered (rank 8, 3 pages" in result.out
    request = running.service.requests[-1]
    assert running.service.uploads[request.source.upload_id] == {
        path.name: path.read_bytes() for path in sorted(directory.iterdir())
    }
    assert dict(request.labels) == {"team": "sea"} and list(request.aliases) == ["arr"] and request.pinned
    assert request.request_id, "a repeated call must be recognized"


def test_validate_only_publishes_nothing(cli: Cli, running: Any, directory: Path) -> None:
    result = cli("adapters", "register", "pirate", str(directory), "--validate-only")
    assert "pirate is valid" in result.out and not running.service.adapters


def test_on_server_sends_the_path_alone(cli: Cli, running: Any) -> None:
    result = cli("adapters", "register", "pirate", "/srv/adapters/pirate", "--on-server")
    assert running.service.requests[-1].source.path == "/srv/adapters/pirate" and not running.service.uploads
    assert result.exit_code == 1
    assert "FAILED_PRECONDITION (ADAPTER_REJECTED): the base model cannot take this adapter" in result.err
    assert "lora_A.rank: rank 128 is over the limit of 64" in result.err


def test_a_pickled_adapter_is_refused_with_the_way_out(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    result = cli("adapters", "register", "pirate", str(tmp_path))
    assert result.exit_code == 1 and "pickle" in result.err and "safe_serialization=True" in result.err


def test_list_follows_every_page(cli: Cli, directory: Path) -> None:
    for number in range(5):
        cli("adapters", "register", f"voice-{number}", str(directory))
    result = cli("adapters", "list")
    assert [f"voice-{number}" in result.out for number in range(5)] == [True] * 5
    assert "q v" in result.out and "3 MiB" in result.out and "5 of 5 adapters" in result.err
    listed = json.loads(cli("adapters", "list", "--limit", "3", "--json").out)
    assert [adapter["name"] for adapter in listed["adapters"]] == ["voice-0", "voice-1", "voice-2"]
    assert listed["total_size"] == 5 and listed["revision"] == "7"


def test_filter_and_order_are_passed_on(cli: Cli, running: Any) -> None:
    result = cli("adapters", "list", "--filter", "rank>=4 AND name:p", "--order-by", "create_time desc")
    assert (running.service.requests[-1].filter, running.service.requests[-1].order_by) == (
        "rank>=4 AND name:p",
        "create_time desc",
    )
    assert "no adapters match" in result.err


def test_show_tells_everything(cli: Cli, running: Any, directory: Path) -> None:
    cli("adapters", "register", "pirate", str(directory), "--alias", "arr", "--label", "team=sea")
    adapter = running.service.adapters["pirate"]
    adapter.residency.add(data_plane="unix:/dp-0", tier=pb.MEMORY_TIER_DEVICE, size_bytes=2048)
    adapter.state, adapter.error = pb.ADAPTER_STATE_FAILED, "weights [are] corrupt"
    shown = cli("adapters", "show", "pirate").out
    for part in (
        "q_proj v_proj",
        "8, 16",
        "team=sea",
        "arr = ",
        "failed",
        "weights [are] corrupt",
        "device memory of unix:/dp-0",
    ):
        assert part in shown
    assert json.loads(cli("adapters", "show", "pirate", "--json").out)["name"] == "pirate"


def test_pin_and_unpin(cli: Cli, running: Any, directory: Path) -> None:
    cli("adapters", "register", "pirate", str(directory))
    assert cli("adapters", "pin", "pirate").exit_code == 0 and running.service.adapters["pirate"].pinned
    assert "(pinned)" in cli("adapters", "list").out
    assert cli("adapters", "unpin", "pirate").exit_code == 0 and not running.service.adapters["pirate"].pinned
    assert cli("adapters", "preload", "pirate").exit_code == 0


def test_update_names_what_it_changes(cli: Cli, running: Any, directory: Path) -> None:
    cli("adapters", "register", "pirate", str(directory))
    cli("adapters", "update", "pirate", "--alias", "arr=abcd1234", "--alias", "new", "--clear-labels", "--etag", "1")
    request = running.service.requests[-1]
    assert sorted(request.update_mask.paths) == ["aliases", "labels"] and request.etag == "1"
    assert dict(request.aliases) == {"arr": "abcd1234", "new": ""} and not request.labels
    cli("adapters", "update", "pirate", "--directory", str(directory))
    request = running.service.requests[-1]
    assert list(request.update_mask.paths) == ["source"] and request.source.upload_id == "upload-1"
    cli("adapters", "update", "pirate", "--current-version", "abcd1234")
    assert running.service.requests[-1].current_version == "abcd1234"
    assert cli("adapters", "update", "pirate").exit_code == 2


def test_remove_unregisters(cli: Cli, running: Any, directory: Path) -> None:
    cli("adapters", "register", "pirate", str(directory))
    result = cli("adapters", "remove", "pirate", "--force", "--wait", "2.5", "--etag", "1")
    assert result.exit_code == 0 and "pirate removed" in result.out
    request = running.service.requests[-1]
    assert request.force and request.etag == "1" and request.drain_timeout.ToMilliseconds() == 2500
    assert cli("adapters", "remove", "pirate").exit_code == 1


def test_watch_prints_changes(cli: Cli, directory: Path) -> None:
    cli("adapters", "register", "pirate", str(directory))
    assert "added     pirate@" in cli("adapters", "watch").out
    assert json.loads(cli("adapters", "watch", "--json").out)["type"] == "CHANGE_TYPE_ADDED"
