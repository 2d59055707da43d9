"""`python -m controlplane` as a process of its own: it starts, streams a Generate, and drains on SIGTERM."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from controlplane.config import ControlPlaneConfig, parse_config
from protos.loraplane.v1 import inference_pb2 as pb
from protos.loraplane.v1 import inference_pb2_grpc

TIMEOUT_S = 60.0


@pytest.fixture
def base(repository: Path) -> Path:
    """The example's base model."""
    return repository / "examples" / "demo" / "base"


@contextmanager
def process(repository: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that is gone at the end."""
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=repository, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def test_the_process_streams_a_generate_and_drains_on_sigterm(repository: Path, base: Path, tmp_path: Path) -> None:
    data_plane = f"unix:{tmp_path}/dp.sock"
    listen = f"unix:{tmp_path}/cp.sock"
    control_plane = ["-m", "controlplane", "--model", str(base), "--data-plane", data_plane, "--listen", listen]
    with (
        process(repository, "-m", "benchmarks.null_data_plane", "--listen", data_plane, "--step-ms", "5"),
        process(repository, *control_plane, "--state-dir", str(tmp_path / "state")) as server,
        grpc.insecure_channel(listen) as channel,
    ):
        wait_until_serving(channel)
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        request = pb.GenerateRequest(text="Once upon", sampling=pb.SamplingParams(max_tokens=100, seed=1))
        stream = iter(stub.Generate(request, timeout=TIMEOUT_S))
        assert next(stream).WhichOneof("event") == "started"
        server.send_signal(signal.SIGTERM)
        num_tokens = 0
        for response in stream:
            num_tokens += len(response.chunk.token_ids)
            if response.WhichOneof("event") == "finished":
                assert response.finished.finish_reason == pb.FINISH_REASON_LENGTH
        assert num_tokens == 100
        output, _ = server.communicate(timeout=TIMEOUT_S)
        assert server.returncode == 0, output
        assert "drained: finished=1 aborted=0" in output


def wait_until_serving(channel: grpc.Channel) -> None:
    """Returns once a data plane is connected; the server pushes each change, so nothing is polled."""
    health = health_pb2_grpc.HealthStub(channel)
    for answer in health.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S, wait_for_ready=True):
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return


@pytest.mark.parametrize("broken", ["credentials", "listen", "tokenizer"])
def test_what_is_wrong_at_the_start_is_said_in_a_line(repository: Path, base: Path, tmp_path: Path, broken: str) -> None:
    arguments = ["-m", "controlplane", "--data-plane", f"unix:{tmp_path}/dp.sock", "--state-dir", str(tmp_path / "state")]
    model, words = base, ""
    if broken == "credentials":
        (tmp_path / "credentials.json").write_text("{}")
        arguments += ["--credentials", str(tmp_path / "credentials.json")]
        words = "credentials.json: expected"
    elif broken == "listen":
        arguments += ["--listen", f"unix:{tmp_path}/no/such/directory.sock"]
        words = "cannot listen on"
    else:
        model = tmp_path / "model"
        model.mkdir()
        (model / "tokenizer.json").write_text("{}")
        words = "tokenizer.json"
    with process(repository, *arguments, "--model", str(model)) as server:
        output, _ = server.communicate(timeout=TIMEOUT_S)
    assert server.returncode == 1, output
    assert f"cannot serve: {'' if broken == 'listen' else str(tmp_path)}" in output
    assert words in output
    assert "Traceback" not in output


def test_the_command_line_becomes_the_configuration(base: Path, tmp_path: Path) -> None:
    config = parse_config(
        [
            *("--model", str(base), "--data-plane", "a:1", "--data-plane", "b:2", "--listen", "c:3", "--listen", "unix:/d"),
            *("--state-dir", str(tmp_path), "--adapter-root", str(tmp_path), "--max-waiting", "7", "--drain-timeout", "0.5"),
            *("--redis-url", "redis://r", "--key-prefix", "p", "--store-dir", str(tmp_path / "images")),
            *("--allow-dummy-adapters", "--no-idle-prefetch"),
        ]
    )
    assert config == ControlPlaneConfig(
        model_dir=base,
        data_planes=("a:1", "b:2"),
        state_dir=tmp_path,
        listen=("c:3", "unix:/d"),
        images_dir=tmp_path / "images",
        redis_url="redis://r",
        key_prefix="p",
        adapter_roots=(tmp_path,),
        allow_dummy_adapters=True,
        idle_prefetch=False,
        max_waiting=7,
        drain_timeout_s=0.5,
    )


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--model", "/nowhere", "is not a directory"),
        ("--model", os.sep, "has neither tokenizer.json nor config.json"),
        ("--adapter-root", "/nowhere", "is not a directory"),
        ("--max-waiting", "0", "is not a whole number above 0"),
        ("--drain-timeout", "-1", "is not a number of seconds from 0 to 3600"),
    ],
)
def test_a_bad_option_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str, words: str
) -> None:
    given = {"--model": str(base), "--data-plane": "a:1", "--state-dir": str(tmp_path)} | {flag: value}
    with pytest.raises(SystemExit) as caught:
        parse_config([part for item in given.items() for part in item])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {flag}" in error
    assert words in error


def test_the_service_config_retries_unavailable_and_nothing_else(repository: Path) -> None:
    config = json.loads((repository / "controlplane" / "service_config.json").read_text())
    [method] = config["methodConfig"]
    assert method["name"] == [{}]
    assert method["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
    assert method["retryPolicy"]["maxAttempts"] <= 5
