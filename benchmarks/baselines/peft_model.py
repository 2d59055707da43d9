"""A random base in transformers with random adapters in peft, of which a few are loaded at a time. Knows no trace.

Adapters take turns in modules that peft made once: their weights are copied from pinned host memory into those of the same rank,
which costs what moving them costs, and none of the time that peft takes to make modules.
"""

import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from benchmarks.baselines.static_batches import BatchTooLargeError
from benchmarks.serving.driver import Prompts
from benchmarks.serving.outcome import PlannedRequest

PAD_TOKEN_ID = 0
# Of the memory that is left beside the weights, for KV: generate() holds more than one copy of what it appends to.
KV_SHARE = 0.5
# On a CPU the memory is not what limits a batch of a tiny model.
CPU_MAX_TOKENS = 1 << 16


@dataclass(frozen=True, slots=True)
class PeftAdapters:
    """ranks: in turn; adapter number i has ranks[i % len(ranks)]. num_loaded: modules on the device, of all ranks together."""

    ranks: tuple[int, ...]
    modules: tuple[str, ...]
    num_adapters: int
    num_loaded: int

    def rank(self, number: int) -> int:
        """Of that adapter."""
        return self.ranks[number % len(self.ranks)]


class LoadedAdapters:
    """Which adapter is in which of peft's modules, by rank; the least recently used one makes room."""

    def __init__(self, network: PeftModel, slots: dict[int, list[str]]) -> None:
        """slots: names of peft's adapters, by rank."""
        self._network = network
        self._holders = {rank: OrderedDict[str, int | None]((name, None) for name in names) for rank, names in slots.items()}
        parameters = {rank: _lora_parameters(network, names[0]) for rank, names in slots.items()}
        self._host = {rank: [_pinned_copy(parameter) for parameter in found] for rank, found in parameters.items()}
        self.num_copies = 0

    def activate(self, number: int, rank: int) -> None:
        """Lets the network speak as that adapter."""
        holders = self._holders[rank]
        name = next((name for name, held in holders.items() if held == number), None)
        if name is None:
            name = next(iter(holders))
            # All adapters of a rank have the same random weights: only that they are copied is of interest.
            for parameter, host in zip(_lora_parameters(self._network, name), self._host[rank], strict=True):
                parameter.data.copy_(host, non_blocking=True)
            holders[name] = number
            self.num_copies += 1
        holders.move_to_end(name)
        self._network.set_adapter(name, inference_mode=True)


class PeftGenerator:
    """Generates in static batches. Times are seconds since `begin`. An adapter is named by its number, the base by nothing."""

    def __init__(self, model_dir: Path, adapters: PeftAdapters, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        torch.manual_seed(seed)
        self._device = device
        self._adapters = adapters
        config = AutoConfig.from_pretrained(model_dir)
        self._vocab_size: int = config.vocab_size
        with torch.device(device):
            network = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        # The seed, and 1 for a run's prompts: those of the warm-up are others.
        self._prompts = Prompts((seed, 1), config.vocab_size)
        kv_dim = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
        self._token_bytes = 2 * config.num_hidden_layers * kv_dim * dtype.itemsize
        self._network, self._loaded = network, None
        if adapters.num_adapters:
            self._network, slots = _with_adapters(network, adapters)
            self._loaded = LoadedAdapters(self._network, slots)
        # Else generate() ends at tokens that the model's own configuration names.
        network.generation_config = GenerationConfig(eos_token_id=None, bos_token_id=None, pad_token_id=PAD_TOKEN_ID)
        self._start_at = time.monotonic()

    @property
    def num_copies(self) -> int:
        """How often an adapter's weights were copied to the device."""
        return self._loaded.num_copies if self._loaded is not None else 0

    def max_batch_tokens(self) -> int:
        """Tokens of KV that there is room for."""
        if self._device.type != "cuda":
            return CPU_MAX_TOKENS
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free * KV_SHARE / self._token_bytes)

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start_at

    def sleep(self, seconds: float) -> None:
        """Waits for arrivals."""
        time.sleep(max(0.0, seconds))

    def begin(self) -> None:
        """Begins a run, after one short batch that is not measured: libraries find their kernels."""
        adapter = "0" if self._adapters.num_adapters else ""
        self.generate([PlannedRequest(-1, 0.0, adapter, 16, 4, (PAD_TOKEN_ID + 1,) * 16)] * 2, float("inf"))
        self._start_at = time.monotonic()

    @torch.inference_mode()
    def generate(self, requests: Sequence[PlannedRequest], until_s: float) -> Sequence[float]:
        """Greedy, end of sequence ignored, prompts padded on the left, until the longest output or the time is up."""
        token_ids, mask = self._padded(requests)
        ends = _StepTimes(self, until_s)
        num_tokens = max(request.output_tokens for request in requests)
        config = GenerationConfig(
            max_new_tokens=num_tokens, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=PAD_TOKEN_ID
        )
        try:
            with self._speaking_as(requests[0].adapter):
                self._network.generate(
                    input_ids=token_ids,
                    attention_mask=mask,
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList([ends]),
                )
        except torch.OutOfMemoryError as error:
            # The traceback holds the tensors of the frames that it names.
            error.__traceback__ = None
            torch.cuda.empty_cache()
            raise BatchTooLargeError(f"{len(requests)} requests with {num_tokens} tokens to come: {error}") from None
        times = ends.seconds()
        assert len(times) >= num_tokens or self.now() >= until_s, f"{len(times)} steps of {num_tokens}"
        return times[:num_tokens]

    def _speaking_as(self, adapter: str) -> AbstractContextManager[None]:
        """Within it the network speaks as that adapter; empty is the base."""
        if self._loaded is None:
            assert not adapter, f"adapter {adapter} is asked for, there are none"
            return nullcontext()
        if not adapter:
            base: AbstractContextManager[None] = self._network.disable_adapter()
            return base
        self._loaded.activate(int(adapter), self._adapters.rank(int(adapter)))
        return nullcontext()

    def _padded(self, requests: Sequence[PlannedRequest]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(request.input_tokens for request in requests)
        token_ids = torch.full((len(requests), longest), PAD_TOKEN_ID)
        mask = torch.zeros_like(token_ids)
        for i, request in enumerate(requests):
            token_ids[i, longest - request.input_tokens :] = torch.tensor(self._prompts.token_ids(request))
            mask[i, longest - request.input_tokens :] = 1
        return token_ids.to(self._device), mask.to(self._device)


class _StepTimes(StoppingCriteria):  # type: ignore[misc]  # transformers is not followed
    """Asked after every token of a batch: marks when it was there, and says stop when the time is up.

    On CUDA a mark is an event, so that the host need not wait for the device more than generate() itself does.
    """

    def __init__(self, generator: PeftGenerator, until_s: float) -> None:
        self._generator = generator
        self._until_s = until_s
        self._is_cuda = generator._device.type == "cuda"
        self._marks: list[float] = []
        self._events: list[torch.cuda.Event] = []
        if self._is_cuda:
            torch.cuda.synchronize()
            self._mark()
        self._begin_s = generator.now()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self._mark()
        is_late = self._generator.now() >= self._until_s
        return torch.full((len(input_ids),), is_late, device=input_ids.device)

    def seconds(self) -> list[float]:
        """When each token was there."""
        if not self._is_cuda:
            return self._marks
        torch.cuda.synchronize()
        begin, *ends = self._events
        return [self._begin_s + begin.elapsed_time(end) / 1e3 for end in ends]

    def _mark(self) -> None:
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch has no type for it
            event.record()
            self._events.append(event)
        else:
            self._marks.append(self._generator.now())


def _with_adapters(network: torch.nn.Module, adapters: PeftAdapters) -> tuple[PeftModel, dict[int, list[str]]]:
    """The network with modules for the adapters that are loaded at once, as many of each rank; their names by rank."""
    ranks = sorted(set(adapters.ranks))
    per_rank = max(1, min(adapters.num_loaded, adapters.num_adapters) // len(ranks))
    slots = {rank: [f"rank-{rank}-{i}" for i in range(per_rank)] for rank in ranks}
    peft_network: PeftModel | None = None
    for rank, names in slots.items():
        for name in names:
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(adapters.modules), init_lora_weights=False)
            if peft_network is None:
                # The adapters stay in the base's dtype, as a server of many would have them.
                peft_network = get_peft_model(network, config, adapter_name=name, autocast_adapter_dtype=False)
            else:
                peft_network.add_adapter(name, config, autocast_adapter_dtype=False)
    assert peft_network is not None, "a setting has ranks"
    return peft_network.eval(), slots


def _lora_parameters(network: torch.nn.Module, name: str) -> list[torch.nn.Parameter]:
    return [parameter for path, parameter in network.named_parameters() if "lora_" in path and f".{name}." in path]


def _pinned_copy(parameter: torch.nn.Parameter) -> torch.Tensor:
    copied = parameter.detach().cpu()
    return copied.pin_memory() if parameter.is_cuda else copied.clone()
