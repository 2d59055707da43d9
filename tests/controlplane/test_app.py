"""The whole control plane over gRPC, in process: embedded Redis, and a data plane that speaks the real protocol."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import tokenizers
import torch
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

from benchmarks import null_data_plane
from benchmarks.null_data_plane import NullDataPlane
from benchmarks.null_engine import NullConfig, null_tokens
from controlplane.app import ControlPlane, serve
from controlplane.config import ControlPlaneConfig
from controlplane.services.inference_service import choice_seed
from controlplane.services.rpc_status import DETAILS_KEY
from controlplane.services.server import SERVICE_NAMES
from controlplane.text.tokenizer import Tokenizer
from protos.loraplane.v1 import adapter_pb2, adapter_pb2_grpc, inference_pb2_grpc, system_pb2, system_pb2_grpc
from protos.loraplane.v1 import inference_pb2 as pb

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB_SIZE = len(ALPHABET) + 1
EOS = len(ALPHABET)
NULL = NullConfig(num_pages=64, vocab_size=VOCAB_SIZE, max_model_len=256)
TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with one token per byte, an end of sequence and a chat template."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = tokenizers.Tokenizer(models.BPE({char: index for index, char in enumerate(ALPHABET)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": template}))
    return directory


@dataclass
class Client:
    """Stubs to a running control plane, and the plane itself."""

    app: ControlPlane
    null: NullDataPlane
    channel: grpc.aio.Channel
    tokenizer: tokenizers.Tokenizer

    @property
    def inference(self) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    @property
    def system(self) -> Any:
        return system_pb2_grpc.SystemServiceStub(self.channel)

    @property
    def adapters(self) -> Any:
        return adapter_pb2_grpc.AdapterServiceStub(self.channel)

    @property
    def health(self) -> Any:
        return health_pb2_grpc.HealthStub(self.channel)

    async def generate(self, timeout: float = TIMEOUT_S, **fields: Any) -> "Answer":
        answer = Answer()
        async for response in self.inference.Generate(pb.GenerateRequest(**fields), timeout=timeout):
            answer.take(response)
        return answer

    def expected(self, prompt: str, seed: int, count: int, digest: str = "") -> list[int]:
        return null_tokens(seed, digest, self.tokenizer.encode(prompt).ids, count, VOCAB_SIZE)

    async def idle(self) -> None:
        """Returns once nothing runs and every KV page is free again."""
        async with asyncio.timeout(TIMEOUT_S):
            while self.null.engine.standing or self.null.engine.counts.kv_pages:
                await asyncio.sleep(0.01)


class Answer:
    """A stream, taken apart by choice."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.started = pb.Started()
        self.token_ids: dict[int, list[int]] = {}
        self.text: dict[int, str] = {}
        self.logprobs: dict[int, list[pb.TokenLogprobs]] = {}
        self.finished: dict[int, pb.Finished] = {}

    def take(self, response: pb.GenerateResponse) -> None:
        kind = response.WhichOneof("event")
        assert kind is not None
        self.events.append(kind)
        if kind == "started":
            self.started = response.started
        elif kind == "chunk":
            chunk = response.chunk
            assert chunk.choice_index not in self.finished
            self.token_ids.setdefault(chunk.choice_index, []).extend(chunk.token_ids)
            self.text[chunk.choice_index] = self.text.get(chunk.choice_index, "") + chunk.text
            self.logprobs.setdefault(chunk.choice_index, []).extend(chunk.logprobs)
        else:
            self.finished[response.finished.choice_index] = response.finished


@asynccontextmanager
async def running(tmp_path: Path, model_dir: Path, null: NullConfig = NULL, **options: Any) -> AsyncIterator[Client]:
    address = f"unix:{tmp_path}/dp.sock"
    config = ControlPlaneConfig(model_dir, (address,), tmp_path / "state", ("127.0.0.1:0",), **options)
    async with null_data_plane.serve(address, null) as data_plane, serve(config) as app:
        assert await app.dispatcher.wait_connected(TIMEOUT_S)
        async with grpc.aio.insecure_channel(app.address) as channel:
            yield Client(app, data_plane, channel, tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json")))


Scenario = Callable[[Client], Coroutine[Any, Any, None]]


@pytest.fixture
def play(tmp_path: Path, model_dir: Path) -> Callable[..., None]:
    """Runs a scenario against a fresh control plane."""

    def run(scenario: Scenario, null: NullConfig = NULL, **options: Any) -> None:
        async def inside() -> None:
            # A failed test keeps its closed event loop alive, and grpc.aio may trip over it in the next one and wait for ever.
            async with asyncio.timeout(4 * TIMEOUT_S), running(tmp_path, model_dir, null, **options) as client:
                await scenario(client)

        asyncio.run(inside())

    return run


async def refused(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
    """The status and details of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    found: dict[str, Any] = {}
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            assert isinstance(value, bytes)
            for packed in status_pb2.Status.FromString(value).details:
                name = packed.TypeName().rpartition(".")[2]
                found[name] = getattr(error_details_pb2, name)()
                packed.Unpack(found[name])
    return error.code(), error.details() or "", found


def sampling(**fields: Any) -> pb.SamplingParams:
    return pb.SamplingParams(**fields)


def test_a_prompt_streams_started_chunks_and_finished(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        answer = await client.generate(text="hello", request_id="mine", sampling=sampling(max_tokens=40, seed=7))
        expected = client.expected("hello", 7, 40)
        assert answer.events[0] == "started"
        assert answer.events[-1] == "finished"
        assert set(answer.events[1:-1]) == {"chunk"}
        assert (answer.started.request_id, answer.started.prompt_tokens, answer.started.adapter) == ("mine", 5, "")
        assert answer.token_ids[0] == expected
        assert answer.text[0] == client.tokenizer.decode(expected)
        finished = answer.finished[0]
        assert finished.finish_reason == pb.FINISH_REASON_LENGTH
        assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (5, 40)
        assert finished.timings.total_time.ToNanoseconds() >= finished.timings.time_to_first_token.ToNanoseconds() > 0
        ids = client.tokenizer.encode("hello").ids
        again = await client.generate(token_ids=pb.TokenIds(ids=ids), sampling=sampling(max_tokens=40, seed=7))
        assert again.token_ids[0] == expected
        assert again.started.request_id != ""

    play(scenario)


def test_a_conversation_is_rendered_by_the_chat_template(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        messages = [pb.ChatMessage(role="user", content="hi"), pb.ChatMessage(role="assistant", content="yo")]
        for add_generation_prompt, prompt in ((None, "u:hi\na:yo\na:"), (False, "u:hi\na:yo\n")):
            chat = pb.ChatMessages(messages=messages, add_generation_prompt=add_generation_prompt)
            answer = await client.generate(chat=chat, sampling=sampling(max_tokens=4, seed=1))
            assert answer.started.prompt_tokens == len(prompt)
            assert answer.token_ids[0] == client.expected(prompt, 1, 4)

    play(scenario)


def test_choices_draw_from_seeds_of_their_own_and_the_first_from_the_request_s(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        answer = await client.generate(text="x", sampling=sampling(max_tokens=9, seed=2**64 - 1, n=4))
        for index in range(4):
            assert answer.token_ids[index] == client.expected("x", choice_seed(2**64 - 1, index), 9)
            assert answer.finished[index].usage.completion_tokens == 9
        assert len({tuple(ids) for ids in answer.token_ids.values()}) == 4
        assert answer.events.count("started") == 1
        assert choice_seed(5, 0) == 5

    play(scenario)


def test_unset_seeds_differ(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        answers = [await client.generate(text="x", sampling=sampling(max_tokens=9)) for _ in range(2)]
        assert answers[0].token_ids != answers[1].token_ids

    play(scenario)


def test_nothing_past_a_stop_string_reaches_the_client(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        drawn = ((seed, client.expected("x", seed, 9)) for seed in range(9999))
        # One character per token, so that places in the text are places in the tokens.
        seed, tokens = next((s, t) for s, t in drawn if client.tokenizer.decode(t).isascii() and EOS not in t)
        text = client.tokenizer.decode(tokens)
        stop = text[4:7]
        at = text.index(stop)
        answer = await client.generate(text="x", sampling=sampling(max_tokens=200, seed=seed, stop=["never there", stop]))
        assert answer.text[0] == text[:at]
        assert answer.token_ids[0] == tokens[: at + 3]
        finished = answer.finished[0]
        assert (finished.finish_reason, finished.matched_stop) == (pb.FINISH_REASON_STOP, stop)
        assert finished.usage.completion_tokens == at + 3
        await client.idle()

    play(scenario)


def test_stop_tokens_and_end_of_sequence(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        tokens = client.expected("x", 0, 12)
        stop = next(token for index, token in enumerate(tokens) if index > 3 and token not in tokens[:index] and token != EOS)
        end = tokens.index(stop)
        answer = await client.generate(text="x", sampling=sampling(max_tokens=100, seed=0, stop_token_ids=[stop]))
        finished = answer.finished[0]
        assert (finished.finish_reason, finished.matched_stop_token_id) == (pb.FINISH_REASON_STOP_TOKEN, stop)
        assert answer.token_ids[0] == tokens[: end + 1]
        assert answer.text[0] == client.tokenizer.decode(tokens[:end])
        ends = await client.generate(text="x", sampling=sampling(max_tokens=255, seed=0))
        assert ends.finished[0].finish_reason == pb.FINISH_REASON_STOP
        assert ends.finished[0].WhichOneof("matched") is None
        assert ends.token_ids[0][-1] == EOS
        goes_on = await client.generate(text="x", sampling=sampling(max_tokens=255, seed=0, ignore_eos=True))
        assert len(goes_on.token_ids[0]) == 255

    # The end of sequence, and enough tokens to meet it by chance.
    play(scenario, replace(NULL, eos_token_ids=(EOS,), vocab_size=VOCAB_SIZE))


def test_logprobs_come_with_every_token(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        answer = await client.generate(text="x", logprobs=2, sampling=sampling(max_tokens=5, seed=0))
        assert [entry.logprob for entry in answer.logprobs[0]] == [-1.0] * 5
        assert [(top.token_id, top.text) for top in answer.logprobs[0][0].top] == [(0, ALPHABET[0]), (1, ALPHABET[1])]
        chosen_only = await client.generate(text="x", logprobs=0, sampling=sampling(max_tokens=5, seed=0))
        assert [len(entry.top) for entry in chosen_only.logprobs[0]] == [0] * 5
        without = await client.generate(text="x", sampling=sampling(max_tokens=5, seed=0))
        assert without.logprobs[0] == []

    play(scenario)


def test_output_options(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        tokens = client.expected("x", 0, 20)
        at_end = await client.generate(text="x", sampling=sampling(max_tokens=20, seed=0), output=pb.OutputOptions(at_end=True))
        assert at_end.events == ["started", "chunk", "finished"]
        assert (at_end.token_ids[0], at_end.text[0]) == (tokens, client.tokenizer.decode(tokens))
        ids_only = await client.generate(
            text="x", sampling=sampling(max_tokens=20, seed=0), output=pb.OutputOptions(token_ids_only=True)
        )
        assert (ids_only.token_ids[0], ids_only.text[0]) == (tokens, "")

    play(scenario)


def test_bad_requests_get_their_status_and_details(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        code, _, details = await refused(client.generate(text="x", sampling=sampling(temperature=-1, n=0)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        fields = [violation.field for violation in details["BadRequest"].field_violations]
        assert fields == ["sampling.temperature", "sampling.n"]
        assert (details["ErrorInfo"].reason, details["ErrorInfo"].domain) == ("INVALID_FIELD", "loraplane")
        code, message, details = await refused(client.generate(text="x" * 200, sampling=sampling(max_tokens=57)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "is 57; with the prompt's 200 tokens that makes 257, over the limit of 256" in message
        assert details["ErrorInfo"].reason == "LENGTH_OVER_LIMIT"
        code, message, details = await refused(client.generate(text="hi", adapter="nobody"))
        assert code is grpc.StatusCode.NOT_FOUND
        assert (details["ResourceInfo"].resource_type, details["ResourceInfo"].resource_name) == (
            "loraplane.v1.Adapter",
            "nobody",
        )
        still_serving = await client.generate(text="x", sampling=sampling(max_tokens=1))
        assert still_serving.finished[0].usage.completion_tokens == 1

    play(scenario)


def test_a_request_larger_than_every_pool_is_refused_with_its_pages(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        code, message, details = await refused(client.generate(text="x", sampling=sampling(max_tokens=200)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details["ErrorInfo"].reason == "POOL_TOO_SMALL"
        assert "need 13 pages; the largest data plane has 4" in message

    play(scenario, replace(NULL, num_pages=4))


def test_a_full_queue_is_told_with_a_delay_and_harms_no_running_stream(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        long = asyncio.create_task(client.generate(text="x", sampling=sampling(max_tokens=250, seed=0)))
        while not client.null.engine.standing:
            await asyncio.sleep(0.01)
        waiting = [asyncio.create_task(client.generate(text="x", sampling=sampling(max_tokens=2))) for _ in range(8)]
        results = await asyncio.gather(*waiting, return_exceptions=True)
        full = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
        assert full
        for error in full:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            _, _, details = await refused(_raise(error))
            assert {"QuotaFailure", "RetryInfo", "ErrorInfo"} == set(details)
        assert (await long).token_ids[0] == client.expected("x", 0, 250)

    play(scenario, replace(NULL, max_num_seqs=1, step_s=0.005), max_waiting=2)


def test_a_request_that_cannot_start_in_time_is_aborted_early(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        long = asyncio.create_task(client.generate(text="x", sampling=sampling(max_tokens=250, seed=0)))
        while not client.null.engine.standing:
            await asyncio.sleep(0.01)
        slo = duration_pb2.Duration(nanos=50_000_000)
        code, _, details = await refused(client.generate(text="x", ttft_slo=slo))
        assert code is grpc.StatusCode.ABORTED
        assert details["ErrorInfo"].reason == "SLO_EARLY_ABORT"
        assert "RetryInfo" in details
        long.cancel()

    play(scenario, replace(NULL, max_num_seqs=1, step_s=0.02))


def test_the_larger_priority_is_served_first_and_equals_by_arrival(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        ended: list[str] = []

        async def ask(request_id: str, **fields: Any) -> None:
            await client.generate(text="x", request_id=request_id, sampling=sampling(max_tokens=2), **fields)
            ended.append(request_id)

        first = asyncio.create_task(client.generate(text="x", sampling=sampling(max_tokens=100, seed=0)))
        tasks = []
        while not client.null.engine.standing:
            await asyncio.sleep(0.01)
        asked = [("low", -100), ("unset", None), ("zero", 0), ("high", 100), ("higher than none", 1)]
        for number, (request_id, priority) in enumerate(asked, start=1):
            tasks.append(asyncio.create_task(ask(request_id, priority=priority)))
            while (await client.system.GetLoad(system_pb2.GetLoadRequest())).num_waiting < number:
                await asyncio.sleep(0)
        await asyncio.gather(first, *tasks)
        assert ended == ["high", "higher than none", "unset", "zero", "low"]

    play(scenario, replace(NULL, max_num_seqs=1, step_s=0.005))


async def _raise(error: BaseException) -> None:
    raise error


def test_a_cancelled_call_frees_its_pages(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        call = client.inference.Generate(pb.GenerateRequest(text="x", sampling=sampling(max_tokens=250, n=3)))
        await call.read()
        assert client.null.engine.standing
        call.cancel()
        await client.idle()
        load = await client.system.GetLoad(system_pb2.GetLoadRequest())
        assert (load.num_running, load.num_waiting) == (0, 0)

    play(scenario, replace(NULL, step_s=0.02))


def test_a_reader_that_stops_reading_slows_nobody_and_misses_nothing(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        # Logprobs make the stream far larger than what fits between server and client.
        request = pb.GenerateRequest(text="x", logprobs=20, sampling=sampling(max_tokens=2000, seed=0))
        call = client.inference.Generate(request, timeout=TIMEOUT_S)
        answer = Answer()
        answer.take(await call.read())
        other = await client.generate(text="x", sampling=sampling(max_tokens=50, seed=1))
        assert other.token_ids[0] == client.expected("x", 1, 50)
        await client.idle()
        while (response := await call.read()) is not grpc.aio.EOF:
            answer.take(response)
        assert answer.token_ids[0] == client.expected("x", 0, 2000)
        assert len(answer.logprobs[0]) == 2000
        assert len(answer.events) < 2000

    play(scenario, replace(NULL, num_pages=512, max_model_len=4096))


def test_a_passed_deadline_frees_its_pages(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        code, _, _ = await refused(client.generate(text="x", sampling=sampling(max_tokens=250), timeout=0.3))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        await client.idle()

    play(scenario, replace(NULL, step_s=0.05))


def test_without_a_data_plane_requests_are_unavailable_and_the_system_answers(tmp_path: Path, model_dir: Path) -> None:
    async def scenario() -> None:
        config = ControlPlaneConfig(model_dir, (f"unix:{tmp_path}/nobody.sock",), tmp_path / "state", ("127.0.0.1:0",))
        async with serve(config) as app, grpc.aio.insecure_channel(app.address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            code, _, details = await refused(stub.Generate(pb.GenerateRequest(text="x"), timeout=TIMEOUT_S).read())
            assert code is grpc.StatusCode.UNAVAILABLE
            assert details["ErrorInfo"].reason == "NO_DATA_PLANE"
            assert details["RetryInfo"].retry_delay.ToNanoseconds() > 0
            info = await system_pb2_grpc.SystemServiceStub(channel).GetServerInfo(system_pb2.GetServerInfoRequest())
            assert (info.base_model, len(info.data_planes), info.limits.max_waiting) == ("", 0, 1024)
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING

    asyncio.run(scenario())


def test_health_tells_every_service_and_every_watcher(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *SERVICE_NAMES):
            assert (await client.health.Check(health_pb2.HealthCheckRequest(service=name))).status == serving
        code, _, _ = await refused(client.health.Check(health_pb2.HealthCheckRequest(service="other.Service")))
        assert code is grpc.StatusCode.NOT_FOUND
        watches = [client.health.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
        for watch in watches:
            assert (await watch.read()).status == serving
        watches.pop().cancel()
        await client.app.drain(1.0)
        for watch in watches:
            assert (await watch.read()).status == not_serving
            watch.cancel()

    play(scenario)


def test_drain_finishes_what_runs_and_refuses_what_is_new(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        running_call = asyncio.create_task(client.generate(text="x", sampling=sampling(max_tokens=30, seed=0)))
        while not client.null.engine.standing:
            await asyncio.sleep(0.01)
        draining = client.system.Drain(system_pb2.DrainRequest(timeout=duration_pb2.Duration(seconds=20)))
        while not (await client.system.GetLoad(system_pb2.GetLoadRequest())).draining:
            await asyncio.sleep(0)
        code, _, details = await refused(client.generate(text="x"))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert details["ErrorInfo"].reason == "DRAINING"
        assert (await running_call).token_ids[0] == client.expected("x", 0, 30)
        result = await draining
        assert (result.num_finished, result.num_aborted) == (1, 0)

    play(scenario, replace(NULL, step_s=0.01))


def test_what_still_runs_at_the_end_of_a_drain_is_aborted_with_what_it_has(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        call = asyncio.create_task(client.generate(text="x", sampling=sampling(max_tokens=250, seed=0)))
        while not client.null.engine.counts.kv_pages:
            await asyncio.sleep(0.01)
        result = await client.system.Drain(system_pb2.DrainRequest(timeout=duration_pb2.Duration(nanos=200_000_000)))
        assert (result.num_finished, result.num_aborted) == (0, 1)
        answer = await call
        assert answer.finished[0].finish_reason == pb.FINISH_REASON_ABORTED
        assert answer.token_ids[0] == client.expected("x", 0, len(answer.token_ids[0]))

    play(scenario, replace(NULL, step_s=0.02))


@pytest.mark.parametrize("seconds", [-1, 3601])
def test_a_drain_timeout_out_of_range_is_refused(play: Callable[..., None], seconds: int) -> None:
    async def scenario(client: Client) -> None:
        request = system_pb2.DrainRequest(timeout=duration_pb2.Duration(seconds=seconds))
        code, _, details = await refused(client.system.Drain(request))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details["BadRequest"].field_violations[0].field == "timeout"
        assert (await client.generate(text="x", sampling=sampling(max_tokens=1))).finished

    play(scenario)


def test_server_info_and_load_describe_the_data_plane(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        info = await client.system.GetServerInfo(system_pb2.GetServerInfoRequest())
        assert (info.base_model, info.architecture) == ("null", "Null")
        assert (info.limits.max_model_len, info.limits.vocab_size, info.limits.max_lora_rank) == (256, VOCAB_SIZE, 64)
        assert info.data_planes[0].num_pages == 64
        load = await client.system.GetLoad(system_pb2.GetLoadRequest())
        plane = load.data_planes[0]
        assert plane.connected
        assert plane.pool.num_pages == 64
        assert plane.pool.kv_pages + plane.pool.adapter_pages + plane.pool.free_pages == 64

    play(scenario)


def test_load_adds_up_the_time_of_all_steps(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        await client.generate(text="x", sampling=sampling(max_tokens=8))
        (plane,) = (await client.system.GetLoad(system_pb2.GetLoadRequest())).data_planes
        assert plane.num_steps >= 8
        assert plane.step_time.ToTimedelta() > plane.last_step_time.ToTimedelta() > timedelta()

    play(scenario)


def test_credentials_are_required_where_they_are_configured(play: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    path.write_text(json.dumps({"tokens": {"user": {"tenant": "acme"}, "root": {"tenant": "ops", "admin": True}}}))

    async def scenario(client: Client) -> None:
        def bearer(token: str) -> tuple[tuple[str, str], ...]:
            return (("authorization", f"Bearer {token}"),)

        request = pb.GenerateRequest(text="x", sampling=sampling(max_tokens=1))
        for metadata, reason in (((), "TOKEN_MISSING"), (bearer("guess"), "TOKEN_UNKNOWN")):
            code, _, details = await refused(client.inference.Generate(request, metadata=metadata).read())
            assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)
        first = await client.inference.Generate(request, metadata=bearer("user")).read()
        assert first.WhichOneof("event") == "started"
        listing = adapter_pb2.ListAdaptersRequest()
        code, _, details = await refused(client.adapters.ListAdapters(listing, metadata=bearer("user")))
        assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.PERMISSION_DENIED, "ADMIN_REQUIRED")
        code, _, _ = await refused(client.system.Drain(system_pb2.DrainRequest(), metadata=bearer("user")))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert (await client.adapters.ListAdapters(listing, metadata=bearer("root"))).total_size == 0
        # Load balancers have no token.
        answer = await client.health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING

    play(scenario, credentials=path)


def test_reflection_lists_the_services(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answer = await call.read()
        names = {service.name for service in answer.list_services_response.service}
        assert {*SERVICE_NAMES, "grpc.health.v1.Health"} <= names
        call.cancel()

    play(scenario)


@pytest.mark.parametrize("raw", [b"\x12\x02\xff\xfe", b"\xff\xff\xff", b"\x0a\x05ab"], ids=["not UTF-8", "no field", "cut short"])
def test_bytes_that_are_no_message_are_a_malformed_request(
    play: Callable[..., None], caplog: pytest.LogCaptureFixture, raw: bytes
) -> None:
    async def scenario(client: Client) -> None:
        channel: Any = client.channel  # sends bytes as they are
        generate = channel.unary_stream("/loraplane.v1.InferenceService/Generate")(raw, timeout=TIMEOUT_S)
        pin = channel.unary_unary("/loraplane.v1.AdapterService/PinAdapter")(b"\x0a\x02\xff\xfe", timeout=TIMEOUT_S)
        upload = channel.stream_unary("/loraplane.v1.AdapterService/UploadAdapter")(iter([raw[-3:]]), timeout=TIMEOUT_S)
        for call in (generate.read(), pin, upload):
            code, message, details = await refused(call)
            assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")
            assert details["BadRequest"].field_violations[0].field == "request"
            assert "cannot be read as" in message
        assert (await client.generate(text="x", sampling=sampling(max_tokens=1))).finished

    play(scenario)
    assert not [record for record in caplog.records if record.levelname == "ERROR"], "a client's mistake is none of ours"


def test_a_message_over_the_cap_is_refused_and_the_connection_goes_on(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        code, _, _ = await refused(client.generate(text="x" * (17 << 20)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await client.generate(text="x", sampling=sampling(max_tokens=1))).finished

    play(scenario)


def save_adapter(directory: Path) -> None:
    """A PEFT adapter of rank 2 on q_proj of the null data plane's base."""
    directory.mkdir(parents=True)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{prefix}.lora_A.weight": torch.ones(2, 8), f"{prefix}.lora_B.weight": torch.ones(8, 2)},
        directory / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "null"}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def test_a_registered_adapter_answers_by_name_version_and_alias(play: Callable[..., None], tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    save_adapter(root / "tiny")

    async def scenario(client: Client) -> None:
        source = adapter_pb2.AdapterSource(path=str(root / "tiny"))
        registered = await client.adapters.RegisterAdapter(
            adapter_pb2.RegisterAdapterRequest(name="tiny", source=source, aliases=["small"])
        )
        version = registered.adapter.current.version
        for name in ("tiny", f"tiny@{version}", f"tiny@{version[:8]}", "small"):
            answer = await client.generate(text="x", adapter=name, sampling=sampling(max_tokens=6, seed=3))
            assert (answer.started.adapter, answer.started.adapter_version) == ("tiny", version)
            assert answer.token_ids[0] == client.expected("x", 3, 6, version)
        load = await client.system.GetLoad(system_pb2.GetLoadRequest())
        assert [(list(a.names), a.version) for a in load.data_planes[0].adapters] == [(["tiny"], version)]
        code, _, _ = await refused(client.generate(text="x" * 300, adapter="tiny"))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert client.app.directory.num_leases(version) == 0

    play(scenario, adapter_roots=(root,))


def test_an_adapter_that_cannot_be_loaded_fails_its_own_requests_alone(play: Callable[..., None], tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    save_adapter(root / "tiny")

    async def scenario(client: Client) -> None:
        source = adapter_pb2.AdapterSource(path=str(root / "tiny"))
        registered = await client.adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(name="tiny", source=source))
        digest = registered.adapter.current.version
        client.null.engine.config = replace(client.null.engine.config, broken_adapters=frozenset({digest}))
        base = asyncio.create_task(client.generate(text="x", sampling=sampling(max_tokens=50, seed=0)))
        code, message, details = await refused(client.generate(text="x", adapter="tiny", sampling=sampling(n=2)))
        assert code is grpc.StatusCode.DATA_LOSS
        assert "broken" in message
        assert details["ErrorInfo"].reason == "ADAPTER_LOAD_FAILED"
        assert (details["ErrorInfo"].metadata["adapter"], details["ErrorInfo"].metadata["found"]) == ("tiny", "broken")
        assert (await base).token_ids[0] == client.expected("x", 0, 50)
        assert client.app.directory.num_leases(digest) == 0

    play(scenario, adapter_roots=(root,))


def test_a_forced_unregister_aborts_the_adapter_s_requests(play: Callable[..., None], tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    save_adapter(root / "tiny")

    async def scenario(client: Client) -> None:
        source = adapter_pb2.AdapterSource(path=str(root / "tiny"))
        await client.adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(name="tiny", source=source))
        base = asyncio.create_task(client.generate(text="x", sampling=sampling(max_tokens=60, seed=0)))
        call = asyncio.create_task(client.generate(text="x", adapter="tiny", sampling=sampling(max_tokens=250)))
        while client.null.engine.counts.adapter_pages == client.null.engine.counts.idle_adapter_pages:
            await asyncio.sleep(0.01)
        await client.adapters.UnregisterAdapter(adapter_pb2.UnregisterAdapterRequest(name="tiny", force=True))
        code, _, details = await refused(call)
        assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.ABORTED, "ADAPTER_REMOVED")
        assert (await base).token_ids[0] == client.expected("x", 0, 60)

    play(scenario, replace(NULL, step_s=0.02), adapter_roots=(root,))


def test_a_forced_unregister_aborts_a_request_that_is_still_being_tokenized(
    play: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "adapters"
    save_adapter(root / "tiny")
    began, may_end = asyncio.Event(), asyncio.Event()

    async def slowly(self: Tokenizer, text: str) -> tuple[int, ...]:
        began.set()
        await may_end.wait()
        return self.encode(text, add_special_tokens=True)

    monkeypatch.setattr(Tokenizer, "encode_text", slowly)

    async def scenario(client: Client) -> None:
        source = adapter_pb2.AdapterSource(path=str(root / "tiny"))
        await client.adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(name="tiny", source=source))
        call = asyncio.create_task(client.generate(text="x", adapter="tiny", sampling=sampling(max_tokens=2)))
        await began.wait()
        await client.adapters.UnregisterAdapter(adapter_pb2.UnregisterAdapterRequest(name="tiny", force=True))
        may_end.set()
        code, _, details = await refused(call)
        assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.ABORTED, "ADAPTER_REMOVED")
        client.app.directory.check_integrity()

    play(scenario, adapter_roots=(root,))
