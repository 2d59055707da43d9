"""Parts that die: a data plane or a control plane killed mid-stream, Redis away. Nothing is lost that was promised."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import field_mask_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from controlplane.registry.embedded_redis import find_redis_server
from protos.loraplane.v1 import adapter_pb2, adapter_pb2_grpc, inference_pb2, inference_pb2_grpc, system_pb2, system_pb2_grpc
from tests.waiting import block_until

if TYPE_CHECKING:
    from tests.e2e.conftest import Prompt, Service, TinyModel

RANKS = (2, 8, 12, 16)
TIMEOUT_S = 60.0


@contextmanager
def _process(*arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process of the service, gone at the end; its words are shown when the test fails."""
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen([sys.executable, "-m", *arguments], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}) as child:
        try:
            yield child
        finally:
            child.kill()


def _wait_until_serving(channel: grpc.Channel) -> None:
    """Returns once a data plane is connected; every change is pushed."""
    health = health_pb2_grpc.HealthStub(channel)
    for answer in health.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S, wait_for_ready=True):
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return


class _Stream:
    """One Generate, read by and by."""

    def __init__(self, channel: grpc.Channel, adapter: str) -> None:
        sampling = inference_pb2.SamplingParams(max_tokens=480, temperature=1.0, seed=7, ignore_eos=True)
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=[5, 6, 7]), adapter=adapter, sampling=sampling
        )
        self._call = iter(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=TIMEOUT_S))
        self.token_ids: list[int] = []
        self.num_started = 0
        self.finished: inference_pb2.Finished | None = None

    def read(self, num_tokens: int = 1 << 30) -> list[int]:
        """Reads until there are so many tokens, or to the end."""
        for response in self._call:
            self.token_ids += response.chunk.token_ids
            self.num_started += response.HasField("started")
            if response.HasField("finished"):
                self.finished = response.finished
            if len(self.token_ids) >= num_tokens:
                break
        return self.token_ids


def test_streams_and_adapters_outlive_planes_that_are_killed(tmp_path: Path, build_model: "Callable[..., TinyModel]") -> None:
    model = build_model("llama", RANKS)
    name, source = list(model.adapters.items())[1]
    data, control, state = f"unix:{tmp_path}/dp", f"unix:{tmp_path}/cp", tmp_path / "state"
    data_plane = ["dataplane", "--model", str(model.base), "--listen", data, "--store-dir", str(state / "images")]
    data_plane += ["--device", "cpu", "--dtype", "float32", "--num-pages", "64", "--orphan-grace-s", "1"]
    control_plane = ["controlplane", "--model", str(model.base), "--listen", control, "--data-plane", data]
    control_plane += ["--state-dir", str(state), "--adapter-root", str(source.parent)]
    with (
        _process(*data_plane) as first_data_plane,
        _process(*control_plane) as first_control_plane,
        grpc.insecure_channel(control) as channel,
    ):
        _wait_until_serving(channel)
        adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
        path = adapter_pb2.AdapterSource(path=str(source))
        adapter = adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(name=name, source=path)).adapter
        undisturbed = _Stream(channel, name).read()
        disturbed = _Stream(channel, name)
        disturbed.read(20)
        first_data_plane.kill()
        first_data_plane.wait()
        with _process(*data_plane):
            assert disturbed.read() == undisturbed
            assert disturbed.num_started == 1
            assert disturbed.finished is not None
            assert disturbed.finished.finish_reason == inference_pb2.FINISH_REASON_LENGTH
            assert disturbed.finished.usage.completion_tokens == len(undisturbed) == 480
            cut_off = _Stream(channel, name)
            cut_off.read(20)
            first_control_plane.kill()
            first_control_plane.wait()
            with pytest.raises(grpc.RpcError) as caught:
                cut_off.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            with _process(*control_plane), grpc.insecure_channel(control) as again:
                _wait_until_serving(again)
                get = adapter_pb2_grpc.AdapterServiceStub(again).GetAdapter
                known = get(adapter_pb2.GetAdapterRequest(name=name)).adapter
                assert (known.etag, known.current) == (adapter.etag, adapter.current)
                assert _Stream(again, name).read() == undisturbed
                _wait_until_no_page_holds_kv(again)


def _wait_until_no_page_holds_kv(channel: grpc.Channel) -> None:
    system = system_pb2_grpc.SystemServiceStub(channel)
    block_until(lambda: not system.GetLoad(system_pb2.GetLoadRequest()).data_planes[0].pool.kv_pages)


@contextmanager
def _redis(directory: Path, socket: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A Redis that keeps what it is given, killed at the end."""
    options = [
        "--port",
        "0",
        "--unixsocket",
        str(socket),
        "--dir",
        str(directory),
        "--appendonly",
        "yes",
        "--appendfsync",
        "always",
    ]
    with subprocess.Popen([str(find_redis_server()), *options], stdout=subprocess.DEVNULL) as server:
        try:
            block_until(lambda: socket.exists() or server.poll() is not None)
            assert server.poll() is None, "Redis did not start"
            yield server
        finally:
            server.kill()


def test_known_adapters_are_served_and_writes_refused_while_redis_is_away(
    tmp_path: Path,
    build_model: "Callable[..., TinyModel]",
    reference_greedy: "Callable[[TinyModel, Sequence[Prompt], int], list[tuple[int, ...]]]",
    run_service: Callable[..., None],
) -> None:
    model = build_model("llama", RANKS)
    known, other = list(model.adapters)[1:3]
    prompt = (5, 6, 7)
    (expected,) = reference_greedy(model, [(known, prompt)], 30)
    socket = tmp_path / "redis.sock"

    async def scenario(service: "Service", redis: "subprocess.Popen[bytes]") -> None:
        await service.register(known, model.adapters[known])
        running = asyncio.create_task(service.generate(known, (9,), max_tokens=200, ignore_eos=True))
        redis.kill()
        await asyncio.to_thread(redis.wait)
        socket.unlink(missing_ok=True)
        assert tuple((await service.generate(known, prompt, max_tokens=30)).token_ids) == expected
        assert (await service.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name=known))).adapter.name == known
        labels = field_mask_pb2.FieldMask(paths=["labels"])
        writes: list[Any] = [
            lambda: service.register(other, model.adapters[other]),
            lambda: service.adapters.UpdateAdapter(
                adapter_pb2.UpdateAdapterRequest(name=known, update_mask=labels, labels={"a": "b"})
            ),
            lambda: service.adapters.PinAdapter(adapter_pb2.PinAdapterRequest(name=known)),
            lambda: service.adapters.UnregisterAdapter(adapter_pb2.UnregisterAdapterRequest(name=known)),
        ]
        for write in writes:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await write()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            status = rpc_status.from_call(caught.value)
            assert status is not None
            assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)
        assert len((await running).token_ids) == 200
        with _redis(tmp_path, socket):
            async with asyncio.timeout(TIMEOUT_S):
                while True:
                    try:
                        await service.register(other, model.adapters[other])
                        break
                    except grpc.aio.AioRpcError as error:
                        assert error.code() is grpc.StatusCode.UNAVAILABLE
                        await asyncio.sleep(0.05)
            listed = await service.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest())
            assert {adapter.name for adapter in listed.adapters} == {known, other}

    with _redis(tmp_path, socket) as redis:
        run_service(model, lambda service: scenario(service, redis), control_plane={"redis_url": f"unix://{socket}"})
