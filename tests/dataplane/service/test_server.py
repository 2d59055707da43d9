"""The data plane over gRPC on a Unix socket, with real parts throughout: a small Llama, PEFT adapters, store, pages, engine."""

import asyncio
import itertools
import json
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from adapter_store.image_store import ImageStore
from adapter_store.peft_import import import_peft
from dataplane.assembly import load_data_plane
from dataplane.config import DataPlaneConfig, LoadFormat
from dataplane.errors import DataPlaneError
from dataplane.model.checkpoint import fingerprint
from dataplane.model.config import load_model_config
from dataplane.service.server import SERVICE_NAME, DataPlaneServer, ListenError
from protos.loraplane.v1 import data_plane_pb2 as pb
from protos.loraplane.v1 import data_plane_pb2_grpc as pb_grpc
from protos.planes import (
    AdapterPlace,
    AdmittedRequest,
    BatchUpdate,
    EngineFinishReason,
    EngineSampling,
    Hello,
    StepReport,
    hello_to_proto,
    reports_from_proto,
    update_to_proto,
)

VOCAB = 151
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 3, "target_modules": ["q_proj", "v_proj"]},
    "all": {
        "r": 8,
        "lora_alpha": 32,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
    "mixed": {"r": 4, "target_modules": ["o_proj", "down_proj"], "rank_pattern": {"down_proj": 16}},
}
TIMEOUT_S = 60


@dataclass(frozen=True)
class Served:
    """A model directory, a store with adapters of it, and what transformers and peft say they answer."""

    config: DataPlaneConfig
    digests: dict[str, str]
    adapter_dirs: dict[str, Path]

    def expected(self, adapter: str, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Greedy output of the reference."""
        model = LlamaForCausalLM.from_pretrained(self.config.model_dir).eval()
        if adapter:
            model = PeftModel.from_pretrained(model, self.adapter_dirs[adapter]).eval()
        ids = torch.tensor([list(prompt)])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
        )
        return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    root = tmp_path_factory.mktemp("served")
    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(shape).save_pretrained(root / "tiny-llama")
    config = DataPlaneConfig(
        model_dir=root / "tiny-llama",
        store_dir=root / "store",
        listen=(f"unix:{root}/dp.sock",),
        device="cpu",
        num_pages=24,
        token_budget=16,
        max_num_seqs=8,
    )
    model_config = load_model_config(config.model_dir)
    geometry = model_config.geometry("float32", config.max_lora_rank, config.model_name, fingerprint(config.model_dir))
    store = ImageStore(config.store_dir)
    digests, adapter_dirs = {}, {}
    for name, options in ADAPTERS.items():
        model = LlamaForCausalLM.from_pretrained(config.model_dir)
        adapter_dirs[name] = root / "adapters" / name
        get_peft_model(model, LoraConfig(init_lora_weights=False, **options)).save_pretrained(adapter_dirs[name])
        digests[name] = store.publish(import_peft(adapter_dirs[name], geometry))
    return Served(config, digests, adapter_dirs)


@dataclass
class Control:
    """A control plane in miniature: one session on a channel."""

    call: Any
    first: StepReport
    reports: list[StepReport] = field(default_factory=list)
    unread: list[StepReport] = field(default_factory=list)
    _sequence: Any = field(default_factory=lambda: itertools.count(1))

    @classmethod
    async def open(cls, channel: grpc.aio.Channel) -> "Control":
        stub = pb_grpc.DataPlaneServiceStub(channel)
        described = await stub.Describe(pb.DescribeRequest(), timeout=TIMEOUT_S)
        call: Any = stub.Run(timeout=TIMEOUT_S)
        await call.write(hello_to_proto(Hello("test", described.epoch)))
        first, *more = reports_from_proto(await call.read())
        return cls(call, first, unread=more)

    async def update(self, **changes: Any) -> None:
        await self.call.write(update_to_proto(BatchUpdate(next(self._sequence), **changes)))

    async def read(self) -> StepReport:
        if not self.unread:
            self.unread += reports_from_proto(await self.call.read())
        report = self.unread.pop(0)
        self.reports.append(report)
        return report

    async def read_until_finished(self, num_requests: int) -> dict[int, list[int]]:
        """Tokens by request, once that many have finished."""
        tokens: dict[int, list[int]] = {}
        num_finished = 0
        while num_finished < num_requests:
            report = await self.read()
            num_finished += len(report.finished)
            for key, token_id in zip(report.request_keys, report.token_ids, strict=True):
                tokens.setdefault(key, []).append(token_id)
        return tokens


@asynccontextmanager
async def _serve(config: DataPlaneConfig) -> AsyncIterator[grpc.aio.Channel]:
    """A running data plane, whose books must add up when it is stopped."""
    data_plane = load_data_plane(config)
    server = DataPlaneServer(data_plane, config.listen, config.stop_timeout_s)
    (address,) = await server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield channel
    finally:
        await server.stop()
        data_plane.engine.check_integrity()


def _admit(key: int, prompt: Sequence[int], max_tokens: int, digest: str = "", **sampling: Any) -> AdmittedRequest:
    params = EngineSampling(max_tokens=max_tokens, **{"ignore_eos": True, **sampling})
    return AdmittedRequest(key, f"r{key}", tuple(prompt), 0, digest, params)


def _reason(error: grpc.aio.AioRpcError) -> str:
    """The ErrorInfo reason of a status."""
    details = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    assert isinstance(details, bytes)
    assert status_pb2.Status.FromString(details).details[0].Unpack(info)
    assert info.domain == "loraplane"
    return info.reason


def test_describe_tells_model_geometry_and_limits(served: Served) -> None:
    async def run() -> pb.DescribeResponse:
        async with _serve(served.config) as channel:
            return await pb_grpc.DataPlaneServiceStub(channel).Describe(pb.DescribeRequest(), timeout=TIMEOUT_S)

    described = asyncio.run(run())
    assert (described.model.name, described.model.architecture) == ("tiny-llama", "LlamaForCausalLM")
    assert (described.model.vocab_size, list(described.model.eos_token_ids)) == (VOCAB, [2])
    assert (described.pool.num_pages, described.pool.page_tokens, described.pool.page_elems) == (24, 16, 1024)
    assert (described.max_num_seqs, described.token_budget, described.max_model_len) == (8, 16, 256)
    assert next(m.name for m in described.model.modules) == "q_proj"
    assert described.epoch != 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_mixed_batch_answers_as_transformers_and_peft_do(served: Served, device: str) -> None:
    """Base and adapters of different ranks and modules together, in chunks of a small budget, through a small pool."""
    # On a GPU the pool is sized from what is free, so that the run that measures it is tested too.
    config = served.config if device == "cpu" else replace(served.config, device=device, num_pages=None)
    prompts = {"": [5, 9, 17], "attention": list(range(3, 40)), "all": [7, 7, 30], "mixed": list(range(90, 70, -1))}

    async def run() -> tuple[dict[int, list[int]], Control]:
        async with _serve(config) as channel:
            control = await Control.open(channel)
            admits = [_admit(i, p, 24, served.digests.get(name, "")) for i, (name, p) in enumerate(prompts.items())]
            await control.update(admit=tuple(admits))
            return await control.read_until_finished(len(prompts)), control

    tokens, control = asyncio.run(run())
    assert tokens == {i: served.expected(name, prompt, 24) for i, (name, prompt) in enumerate(prompts.items())}
    on_device = {e.digest for r in control.reports for e in r.adapter_events if e.place is AdapterPlace.DEVICE}
    assert on_device == set(served.digests.values())
    assert control.reports[-1].pool.kv_pages == 0
    assert max(r.timing.num_prefill_tokens + r.timing.num_decode_tokens for r in control.reports) == 16


def test_seeded_sampling_gives_the_same_alone_and_in_company(served: Served) -> None:
    request = _admit(1, [4, 5, 6], 20, served.digests["all"], temperature=0.9, top_p=0.95, seed=77, num_logprobs=2)

    async def run() -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        async with _serve(served.config) as channel:
            control = await Control.open(channel)
            await control.update(admit=(request,))
            alone = await control.read_until_finished(1)
            assert all(len(r.logprobs[1].top_token_ids) == 2 for r in control.reports if r.request_keys)
            crowd = [_admit(key, [key, 8], 30, served.digests["mixed"], temperature=1.0, seed=key) for key in range(2, 6)]
            await control.update(admit=(*crowd, replace(request, request_key=9)))
            return alone, await control.read_until_finished(5)

    alone, together = asyncio.run(run())
    assert together[9] == alone[1]
    assert len({tuple(tokens) for tokens in together.values()}) == 5


def test_an_unknown_adapter_ends_its_request_and_nothing_else(served: Served) -> None:
    async def run() -> StepReport:
        async with _serve(served.config) as channel:
            control = await Control.open(channel)
            await control.update(admit=(_admit(1, [3], 5, "0" * 64), _admit(2, [3], 5)))
            await control.read_until_finished(2)
            return next(r for r in control.reports if any(f.request_key == 1 for f in r.finished))

    report = asyncio.run(run())
    (finished,) = [f for f in report.finished if f.request_key == 1]
    assert finished.reason is EngineFinishReason.ADAPTER_FAILED
    assert "0000" in finished.error


def test_a_session_that_breaks_leaves_its_requests_held_for_the_next(served: Served) -> None:
    async def run() -> StepReport:
        async with _serve(served.config) as channel:
            control = await Control.open(channel)
            await control.update(admit=(_admit(1, [3], 200),))
            await control.read()
            control.call.cancel()
            second = await Control.open(channel)
            await second.update(abort=(1,), admit=(_admit(2, [3], 3),))
            assert len((await second.read_until_finished(1))[2]) == 3
            return second.first

    first = asyncio.run(run())
    assert first.state is not None
    assert first.state.held_request_keys == (1,)


def test_a_session_that_closes_its_side_ends_without_an_error(served: Served) -> None:
    async def run() -> grpc.StatusCode:
        async with _serve(served.config) as channel:
            control = await Control.open(channel)
            await control.call.done_writing()
            assert await control.call.read() is grpc.aio.EOF
            code: grpc.StatusCode = await control.call.code()
            return code

    assert asyncio.run(run()) is grpc.StatusCode.OK


def test_a_second_session_takes_over(served: Served) -> None:
    async def run() -> grpc.aio.AioRpcError:
        async with _serve(served.config) as channel:
            first = await Control.open(channel)
            await Control.open(channel)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await first.read()
            return raised.value

    error = asyncio.run(run())
    assert (error.code(), _reason(error)) == (grpc.StatusCode.ABORTED, "SESSION_TAKEN_OVER")


@pytest.mark.parametrize(
    ("messages", "code", "reason", "text"),
    [
        ([hello_to_proto(Hello("s", 1))], grpc.StatusCode.FAILED_PRECONDITION, "EPOCH_MISMATCH", "hello names epoch 1"),
        ([update_to_proto(BatchUpdate(1))], grpc.StatusCode.INVALID_ARGUMENT, "PROTOCOL_VIOLATION", "must be hello"),
        ([pb.RunRequest()], grpc.StatusCode.INVALID_ARGUMENT, "PROTOCOL_VIOLATION", "must be hello"),
        (["hello", update_to_proto(BatchUpdate(2))], grpc.StatusCode.INVALID_ARGUMENT, "PROTOCOL_VIOLATION", "2, expected 1"),
        (["hello", "hello"], grpc.StatusCode.INVALID_ARGUMENT, "PROTOCOL_VIOLATION", "a second time"),
        (["hello", pb.RunRequest()], grpc.StatusCode.INVALID_ARGUMENT, "PROTOCOL_VIOLATION", "neither is set"),
    ],
)
def test_a_breach_of_the_protocol_fails_closed(
    served: Served, messages: list[Any], code: grpc.StatusCode, reason: str, text: str
) -> None:
    async def run() -> grpc.aio.AioRpcError:
        async with _serve(served.config) as channel:
            stub = pb_grpc.DataPlaneServiceStub(channel)
            epoch = (await stub.Describe(pb.DescribeRequest(), timeout=TIMEOUT_S)).epoch
            call = stub.Run(timeout=TIMEOUT_S)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                for message in messages:
                    await call.write(hello_to_proto(Hello("s", epoch)) if message == "hello" else message)
                while await call.read() is not grpc.aio.EOF:
                    pass
            return raised.value

    error = asyncio.run(run())
    assert (error.code(), _reason(error)) == (code, reason)
    assert text in (error.details() or "")


def test_a_stop_ends_the_stream_with_unavailable(served: Served) -> None:
    async def run() -> grpc.aio.AioRpcError:
        data_plane = load_data_plane(served.config)
        server = DataPlaneServer(data_plane, served.config.listen, 10.0)
        (address,) = await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", SERVICE_NAME):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_S)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            control = await Control.open(channel)
            await control.update(admit=(_admit(1, [3], 250),))
            await server.stop()
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                while await control.call.read() is not grpc.aio.EOF:
                    pass
            return raised.value

    error = asyncio.run(run())
    assert (error.code(), _reason(error)) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")


def test_an_engine_that_fails_is_not_serving(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> tuple[grpc.aio.AioRpcError, Any]:
        data_plane = load_data_plane(served.config)
        server = DataPlaneServer(data_plane, served.config.listen, 10.0)

        def fail(chunks: object) -> None:
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(data_plane.engine._runner, "launch", fail)
        (address,) = await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            control = await Control.open(channel)
            await control.update(admit=(_admit(1, [3], 5),))
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await control.read()
            await server.wait_for_failure()
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=TIMEOUT_S)
            await server.stop()
            return raised.value, answer.status

    error, status = asyncio.run(run())
    assert (error.code(), _reason(error)) == (grpc.StatusCode.INTERNAL, "ENGINE_FAILED")
    assert "device is gone" not in (error.details() or ""), "traces stay in the log"
    assert status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_an_address_that_is_taken_is_named(served: Served) -> None:
    async def run() -> None:
        data_plane = load_data_plane(served.config)
        first = DataPlaneServer(data_plane, ("127.0.0.1:0",), 1.0)
        (address,) = await first.start()
        assert not address.endswith(":0")
        with pytest.raises(ListenError, match=address):
            await DataPlaneServer(data_plane, (address,), 1.0).start()
        await first.stop()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_model_len": 257}, "--max-model-len 257 is over the model's max_position_embeddings 256"),
        ({"token_budget": 7}, "--token-budget 7 is below --max-num-seqs 8"),
        ({"num_pages": 1 << 50}, "which cannot be had; lower --num-pages"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused_with_the_numbers(served: Served, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataPlaneError, match=message):
        load_data_plane(replace(served.config, **change))


def test_limits_that_contradict_each_other_are_refused_before_weights_are_read(served: Served) -> None:
    read: list[int] = []
    with pytest.raises(DataPlaneError, match="--token-budget"):
        load_data_plane(replace(served.config, token_budget=7), lambda bytes_done, bytes_total: read.append(bytes_done))
    assert not read


def test_a_store_that_cannot_be_opened_is_named(served: Served) -> None:
    not_a_directory = served.config.model_dir / "config.json"
    with pytest.raises(DataPlaneError, match=r"--store-dir .*config\.json cannot be opened: File exists"):
        load_data_plane(replace(served.config, store_dir=not_a_directory))


def test_random_weights_serve_too(served: Served) -> None:
    async def run() -> dict[int, list[int]]:
        async with _serve(replace(served.config, load_format=LoadFormat.DUMMY)) as channel:
            control = await Control.open(channel)
            await control.update(admit=(_admit(1, [3], 5),))
            return await control.read_until_finished(1)

    assert len(asyncio.run(run())[1]) == 5


async def _start_process(*arguments: str) -> asyncio.subprocess.Process:
    root = Path(__file__).resolve().parents[3]
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "dataplane", *arguments, stderr=asyncio.subprocess.PIPE, cwd=root
    )


def test_the_process_reports_progress_serves_and_ends_on_sigterm(served: Served, tmp_path: Path) -> None:
    async def run() -> tuple[list[dict[str, Any]], int]:
        socket = f"unix:{tmp_path}/p.sock"
        options = ["--listen", socket, "--progress", "json", "--num-pages", "8", "--device", "cpu"]
        process = await _start_process("--model", f"{served.config.model_dir}", "--store-dir", f"{tmp_path}/s", *options)
        assert process.stderr is not None
        events: list[dict[str, Any]] = []
        async with asyncio.timeout(TIMEOUT_S):
            while not events or events[-1]["event"] != "ready":
                line = await process.stderr.readline()
                assert line, "the process ended before it was ready"
                if line.startswith(b"{"):
                    events.append(json.loads(line))
            async with grpc.aio.insecure_channel(socket) as channel:
                control = await Control.open(channel)
                await control.update(admit=(_admit(1, [5, 9, 17], 4),))
                tokens = await control.read_until_finished(1)
                process.send_signal(signal.SIGTERM)
                await process.stderr.read()
                assert tokens[1] == served.expected("", [5, 9, 17], 4)
            return events, await process.wait()

    events, code = asyncio.run(run())
    assert code == 0
    assert events[0] == {"event": "loading", "bytes_done": 0, "bytes_total": events[-2]["bytes_total"]}
    assert events[-2]["bytes_done"] == events[-2]["bytes_total"] > 0
    assert events[-1] == {"event": "ready", "listen": f"unix:{tmp_path}/p.sock"}


def test_a_directory_without_a_model_is_named_and_nothing_more(tmp_path: Path) -> None:
    async def run() -> tuple[str, int]:
        process = await _start_process("--model", f"{tmp_path}", "--store-dir", f"{tmp_path}/s", "--listen", f"unix:{tmp_path}/p")
        assert process.stderr is not None
        async with asyncio.timeout(TIMEOUT_S):
            text = (await process.stderr.read()).decode()
            return text, await process.wait()

    text, code = asyncio.run(run())
    assert code == 2
    assert text.startswith("dataplane: ")
    assert "config.json" in text
    assert "Traceback" not in text
