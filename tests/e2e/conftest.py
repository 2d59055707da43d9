"""Models, adapters and the reference for tests of the whole service: both planes, over gRPC, against transformers + peft."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
import tokenizers
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from controlplane.app import ControlPlane, serve
from controlplane.config import ControlPlaneConfig
from dataplane.assembly import DataPlane, load_data_plane
from dataplane.config import DataPlaneConfig
from dataplane.engine.model_runner import LaunchedStep, ModelRunner
from dataplane.engine.step_packer import ScheduledChunk
from dataplane.service.server import DataPlaneServer
from protos.loraplane.v1 import adapter_pb2, adapter_pb2_grpc, inference_pb2, inference_pb2_grpc, system_pb2_grpc

T = TypeVar("T")

# No call of these tests takes this long; one that hangs must fail and not stop the suite.
RPC_TIMEOUT_S = 120.0

ALL_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCAB_SIZE = 199

_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large enough that a random model has clear preferences, so that rounding never decides a token.
    "initializer_range": 0.2,
}

ARCHITECTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "llama31": lambda: LlamaConfig(
        **_SHAPE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": lambda: MistralConfig(**_SHAPE, head_dim=16, sliding_window=24),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**{**_SHAPE, "num_key_value_heads": 1}, head_dim=32),
    # Heads as FlashInfer takes them.
    "llama-64": lambda: LlamaConfig(**_SHAPE, head_dim=64),
    "mistral-64": lambda: MistralConfig(**_SHAPE, head_dim=64, sliding_window=24),
    "qwen3-64": lambda: Qwen3Config(**{**_SHAPE, "num_key_value_heads": 1}, head_dim=64),
}


@dataclass(frozen=True)
class TinyModel:
    """A random base model on disk with its adapters: name to PEFT directory."""

    base: Path
    adapters: dict[str, Path]


# (adapter, prompt token ids); an empty adapter is the base model.
Prompt = tuple[str, tuple[int, ...]]


@pytest.fixture(scope="session")
def build_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """build(architecture, ranks) saves a random base of that architecture with one random adapter per rank over all modules."""
    cache: dict[tuple[str, tuple[int, ...]], TinyModel] = {}

    def build(architecture: str, ranks: Sequence[int] = (2, 8, 16)) -> TinyModel:
        key = (architecture, tuple(ranks))
        if key not in cache:
            root = tmp_path_factory.mktemp(architecture)
            torch.manual_seed(len(cache))
            base = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]())
            _randomize_biases(base)
            base.save_pretrained(root / "base")
            _save_tokenizer(root / "base")
            adapters = {}
            for number, rank in enumerate(ranks):
                name = f"random-{number}-r{rank}"
                _save_random_adapter(root / "base", root / name, seed=100 + number, r=rank)
                adapters[name] = root / name
            cache[key] = TinyModel(root / "base", adapters)
        return cache[key]

    return build


@pytest.fixture(scope="session")
def save_adapter() -> Callable[..., Path]:
    """save(model, directory, seed, **LoraConfig options) has peft write a random adapter of that base; returns the directory."""

    def save(model: TinyModel, directory: Path, seed: int, **options: Any) -> Path:
        _save_random_adapter(model.base, directory, seed, **options)
        return directory

    return save


@pytest.fixture(scope="session")
def reference_model() -> Callable[[TinyModel], PreTrainedModel | PeftModel]:
    """The base in transformers, in fp32 on the CPU, with every adapter of the model loaded by peft."""
    loaded: dict[tuple[Path, ...], PreTrainedModel | PeftModel] = {}

    def model_of(model: TinyModel) -> PreTrainedModel | PeftModel:
        key = (model.base, *model.adapters.values())
        if key not in loaded:
            network = AutoModelForCausalLM.from_pretrained(model.base, dtype=torch.float32).eval()
            for number, (name, path) in enumerate(model.adapters.items()):
                if number == 0:
                    network = PeftModel.from_pretrained(network, path, adapter_name=name)
                else:
                    network.load_adapter(str(path), adapter_name=name)
            loaded[key] = network
        return loaded[key]

    return model_of


@pytest.fixture(scope="session")
def reference_logits(
    reference_model: Callable[[TinyModel], PreTrainedModel | PeftModel],
) -> Callable[[TinyModel, str, Sequence[int]], torch.Tensor]:
    """logits(model, adapter, token_ids) -> [num_tokens, vocab]: what transformers + peft compute."""

    @torch.inference_mode()
    def logits(model: TinyModel, adapter: str, token_ids: Sequence[int]) -> torch.Tensor:
        network = reference_model(model)
        with _speaking_as(network, adapter):
            computed: torch.Tensor = network(input_ids=torch.tensor([list(token_ids)])).logits[0]
        return computed

    return logits


@pytest.fixture(scope="session")
def reference_greedy(
    reference_model: Callable[[TinyModel], PreTrainedModel | PeftModel],
) -> Callable[[TinyModel, Sequence[Prompt], int], list[tuple[int, ...]]]:
    """What transformers + peft answer, greedily, one prompt at a time, in fp32 on the CPU."""

    @torch.inference_mode()
    def generate(model: TinyModel, prompts: Sequence[Prompt], max_tokens: int) -> list[tuple[int, ...]]:
        network = reference_model(model)
        answers = []
        for adapter, token_ids in prompts:
            ids = torch.tensor([token_ids])
            options = {
                "do_sample": False,
                "max_new_tokens": max_tokens,
                "attention_mask": torch.ones_like(ids),
                "pad_token_id": 0,
            }
            with _speaking_as(network, adapter):
                out = network.generate(input_ids=ids, **options)
            answers.append(tuple(out[0, ids.shape[1] :].tolist()))
        return answers

    return generate


@contextmanager
def _speaking_as(network: PreTrainedModel | PeftModel, adapter: str) -> Iterator[None]:
    """Within it the network speaks as that adapter; empty is the base."""
    if adapter:
        network.set_adapter(adapter)
        yield
    elif isinstance(network, PeftModel):
        with network.disable_adapter():
            yield
    else:
        yield


def _randomize_biases(model: PreTrainedModel) -> None:
    """Biases and norm weights start as zeros and ones, which would hide a missing or swapped one."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)


def _save_random_adapter(base: Path, target: Path, seed: int, **options: Any) -> None:
    torch.manual_seed(seed)
    rank = options.setdefault("r", 8)
    options.setdefault("lora_alpha", 2 * rank)
    options.setdefault("target_modules", ALL_MODULES)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(network, LoraConfig(init_lora_weights=False, **options))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3 / rank**0.5 if "lora_A" in name else 0.3)
    peft.save_pretrained(target)


def _save_tokenizer(base: Path) -> None:
    """Byte-level, one token per byte for the first bytes of the alphabet: text is not the point of a random model."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet[:VOCAB_SIZE])}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(base / "tokenizer.json"))
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (base / "tokenizer_config.json").write_text(json.dumps(config))


@dataclass
class Answer:
    """Everything one choice of a request was told."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[inference_pb2.TokenLogprobs] = field(default_factory=list)
    started: inference_pb2.Started | None = None
    finished: inference_pb2.Finished | None = None
    num_chunks: int = 0


class Service:
    """Both planes in this process, as a client sees them and with the engines at hand."""

    def __init__(
        self,
        control_plane: ControlPlane,
        data_planes: Sequence["RunningDataPlane"],
        channel: grpc.aio.Channel,
        model: TinyModel,
        store_dir: Path,
    ) -> None:
        self.control_plane = control_plane
        self.data_planes = data_planes
        self.model = model
        self.store_dir = store_dir
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
        self.system = system_pb2_grpc.SystemServiceStub(channel)

    async def register(self, name: str, path: Path) -> adapter_pb2.Adapter:
        """Registers a PEFT directory under a name."""
        request = adapter_pb2.RegisterAdapterRequest(name=name, source=adapter_pb2.AdapterSource(path=str(path)))
        response = await self.adapters.RegisterAdapter(request, timeout=RPC_TIMEOUT_S)
        return response.adapter

    async def register_all(self) -> list[adapter_pb2.Adapter]:
        """Registers every adapter of the model."""
        return [await self.register(name, path) for name, path in self.model.adapters.items()]

    async def stream(self, request: inference_pb2.GenerateRequest, timeout_s: float = RPC_TIMEOUT_S) -> list[Answer]:
        """Reads a stream to its end: one answer per choice."""
        answers: dict[int, Answer] = {}
        started = None
        async for response in self.inference.Generate(request, timeout=timeout_s):
            match response.WhichOneof("event"):
                case "started":
                    started = response.started
                case "chunk":
                    answer = answers.setdefault(response.chunk.choice_index, Answer())
                    assert answer.finished is None, "a chunk came after its choice had finished"
                    answer.token_ids += response.chunk.token_ids
                    answer.text += response.chunk.text
                    answer.logprobs += response.chunk.logprobs
                    answer.num_chunks += 1
                case "finished":
                    answers.setdefault(response.finished.choice_index, Answer()).finished = response.finished
        for answer in answers.values():
            answer.started = started
        return [answers[i] for i in sorted(answers)]

    async def generate_choices(self, adapter: str, token_ids: Sequence[int], **sampling: Any) -> list[Answer]:
        """All choices from a prompt of token ids, greedy unless told otherwise."""
        return await self.stream(self.request(adapter, token_ids, **sampling))

    async def generate(self, adapter: str, token_ids: Sequence[int], **sampling: Any) -> Answer:
        """The only choice."""
        (answer,) = await self.generate_choices(adapter, token_ids, **sampling)
        return answer

    @staticmethod
    def request(adapter: str, token_ids: Sequence[int], **sampling: Any) -> inference_pb2.GenerateRequest:
        """A prompt of token ids, greedy unless told otherwise."""
        sampling.setdefault("temperature", 0.0)
        return inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=token_ids),
            adapter=adapter,
            sampling=inference_pb2.SamplingParams(**sampling),
        )

    async def generate_all(self, prompts: Sequence[Prompt], **sampling: Any) -> list[Answer]:
        """All prompts at once, so that they share a batch."""
        return await self.generate_each([(prompt, sampling) for prompt in prompts])

    async def generate_each(self, requests: Sequence[tuple[Prompt, dict[str, Any]]]) -> list[Answer]:
        """All requests at once, each with sampling of its own."""
        calls = (self.generate(adapter, ids, **sampling) for (adapter, ids), sampling in requests)
        return list(await asyncio.gather(*calls))

    def num_preemptions(self) -> int:
        """How often a request was preempted so far."""
        return sum(plane.num_preemptions for plane in self.control_plane.dispatcher.load().data_planes)

    def kv_pages(self) -> int:
        """Pages that hold KV, all data planes, as of the latest reports."""
        return sum(plane.pool.kv_pages for plane in self.control_plane.dispatcher.load().data_planes)

    async def wait_idle(self) -> None:
        """Waits until nothing runs and no page holds KV."""
        async with asyncio.timeout(RPC_TIMEOUT_S):
            while True:
                load = self.control_plane.dispatcher.load()
                if not load.num_running and not load.num_waiting and not any(p.pool.kv_pages for p in load.data_planes):
                    return
                await asyncio.sleep(0.01)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def run_service(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., None]:
    """run(model, scenario, **data_plane_options) serves the model, awaits scenario(service), and checks every pool at the end.

    extra_step_s: added to every step; those of a tiny model are shorter than a message takes, those of a real one are not.
    runs_ahead: whether a step is launched before the one before it is waited for, on a CPU too.
    """
    device: str = request.param

    def run(
        model: TinyModel,
        scenario: Callable[[Service], Coroutine[Any, Any, None]],
        *,
        num_data_planes: int = 1,
        control_plane: dict[str, Any] | None = None,
        extra_step_s: float = 0.0,
        runs_ahead: bool = False,
        **options: Any,
    ) -> None:
        async def main() -> None:
            options.setdefault("device", device)
            steering = _Steering(extra_step_s, runs_ahead)
            async with _serve(tmp_path, model, num_data_planes, control_plane or {}, steering, options) as service:
                await scenario(service)
                await service.wait_idle()

        asyncio.run(main())

    return run


@asynccontextmanager
async def _serve(
    root: Path,
    model: TinyModel,
    num_data_planes: int,
    control_plane: dict[str, Any],
    steering: "_Steering",
    options: dict[str, Any],
) -> AsyncIterator[Service]:
    """Both planes over Unix sockets. The engines check their integrity when they end, and their failure fails the test."""
    store_dir = root / "state" / "images"
    store_dir.mkdir(parents=True, exist_ok=True)
    default = DataPlaneConfig(model.base, store_dir, (), dtype="float32", num_pages=256, max_num_seqs=64)
    async with AsyncExitStack() as stack:
        data_planes, addresses = [], []
        for number in range(num_data_planes):
            address = f"unix:{root}/dp{number}"
            data_plane = RunningDataPlane(replace(default, listen=(address,), **options), steering)
            await data_plane.start()
            stack.push_async_callback(data_plane.stop)
            data_planes.append(data_plane)
            addresses.append(address)
        config = ControlPlaneConfig(
            model_dir=model.base,
            data_planes=tuple(addresses),
            state_dir=root / "state",
            listen=(f"unix:{root}/cp",),
            adapter_roots=tuple({path.parent for path in model.adapters.values()}) or (root,),
        )
        app = await stack.enter_async_context(serve(replace(config, **control_plane)))
        assert await app.dispatcher.wait_connected(30), "no data plane connected"
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(app.address))
        yield Service(app, data_planes, channel, model, store_dir)


class RunningDataPlane:
    """A data plane that can be stopped and started again, with another epoch and an empty pool."""

    def __init__(self, config: DataPlaneConfig, steering: "_Steering") -> None:
        self._config = config
        self._steering = steering
        self._data_plane: DataPlane | None = None
        self._server: DataPlaneServer | None = None

    async def start(self) -> None:
        """Loads and listens."""
        self._data_plane = load_data_plane(self._config)
        self._data_plane.engine._runner = _SteeredRunner(self._data_plane.engine._runner, self._steering)
        self._server = DataPlaneServer(self._data_plane, self._config.listen, self._config.stop_timeout_s)
        await self._server.start()

    async def stop(self) -> None:
        """Stops as on SIGTERM, then checks every page."""
        assert self._server is not None and self._data_plane is not None
        await self._server.stop()
        # The engine's own check at its end raises in its thread; this one, after the thread has ended, fails the test.
        self._data_plane.engine.check_integrity()
        assert self._data_plane.engine.num_running == 0


@dataclass(frozen=True)
class _Steering:
    """How a test changes the pace of a data plane."""

    extra_step_s: float
    runs_ahead: bool


class _SteeredRunner:
    """A model runner whose steps take longer, or that is waited for late as on a GPU."""

    def __init__(self, runner: ModelRunner, steering: _Steering) -> None:
        self._runner = runner
        self._extra_step_s = steering.extra_step_s
        self.runs_ahead = steering.runs_ahead or runner.runs_ahead

    def launch(self, chunks: Sequence[ScheduledChunk]) -> LaunchedStep:
        """Starts computing the chunks, some time later."""
        time.sleep(self._extra_step_s)
        return self._runner.launch(chunks)
