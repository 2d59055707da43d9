"""Captured steps against the same launches uncaptured, bit for bit, and against the decoder in fp32 on plain torch."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataplane.attention.choice import attention_backend
from dataplane.attention.interface import AttentionShape
from dataplane.attention.torch_attention import TorchAttention
from dataplane.model.config import ModelConfig, parse_model_config
from dataplane.model.decoder import Decoder, lora_groups
from dataplane.model.layer_ops import TorchLayerOps
from dataplane.model.layer_ops_choice import layer_ops
from dataplane.model.step_inputs import StepArrays
from dataplane.model.weights import ModelWeights, make_dummy_weights
from dataplane.runner.graphed_model import GraphedModel
from dataplane.runner.lora_scope import LoraScope
from dataplane.runner.step_buffers import StepBuffers
from kernels.backend import lora_ops
from kernels.lora import LoraAdapter, LoraLaunches, LoraRows
from kernels.lora_torch import TorchLoraOps
from kernels.plan_layout import LoraLimits

MAX_NUM_SEQS, TOKEN_BUDGET, NUM_PAGES, PAGE_TOKENS = 24, 900, 3000, 16
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 520,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "dtype": "bfloat16",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "groups of four": {"num_attention_heads": 8, "head_dim": 64, "attention_bias": True, "mlp_bias": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 64},
    "window": {"architectures": ["MistralForCausalLM"], "sliding_window": 24},
    "two windows": {
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 40,
        "max_window_layers": 1,
    },
}


def config_of(variant: str) -> ModelConfig:
    return parse_model_config(SMALL | VARIANTS[variant], {}, Path("config.json"))


def widened(weights: ModelWeights) -> ModelWeights:
    """The same weights in fp32."""
    layers = []
    for layer in weights.layers:
        tensors = {f.name: getattr(layer, f.name) for f in fields(layer)}
        layers.append(replace(layer, **{name: t.float() for name, t in tensors.items() if t is not None}))
    return ModelWeights(weights.embedding.float(), tuple(layers), weights.norm.float(), weights.lm_head.float())


@dataclass(eq=False)
class Request:
    """Tokens to feed, teacher-forced."""

    token_ids: list[int]
    adapter: LoraAdapter | None = None
    num_computed: int = 0
    table: list[int] = field(default_factory=list)


def ints(values: Any) -> Any:
    return np.array(list(values), dtype=np.int32)


class World:
    """A random model in bf16 with everything that a GPU offers and its graphs; beside it the same in fp32 on plain torch."""

    def __init__(self, variant: str, device: str = "cuda", seed: int = 0) -> None:
        self.config = config = config_of(variant)
        self.device = torch.device(device)
        dtype, groups = torch.bfloat16, lora_groups(config)
        weights = make_dummy_weights(config, dtype, self.device)
        limits = LoraLimits(TOKEN_BUDGET, MAX_NUM_SEQS, 64)
        shape = AttentionShape(
            config.num_heads, config.num_kv_heads, config.head_dim, PAGE_TOKENS, frozenset(config.layer_windows)
        )
        lora, attention = lora_ops(groups, dtype, self.device, limits), attention_backend(shape, dtype, self.device)
        self.decoder = Decoder(config, weights, lora, attention, layer_ops(config, dtype, self.device))
        torch_ops = TorchLayerOps(config, self.device)
        self.wide = Decoder(config, widened(weights), TorchLoraOps(), TorchAttention(PAGE_TOKENS), torch_ops)
        page_elems = 2 * PAGE_TOKENS * config.kv_dim
        self.pool = torch.full((config.num_layers, NUM_PAGES + 1, page_elems), torch.nan, dtype=dtype, device=self.device)
        self.buffers = StepBuffers(TOKEN_BUDGET, PAGE_TOKENS, NUM_PAGES, self.device)
        self.random = random.Random(seed)
        self.free = self.random.sample(range(NUM_PAGES), NUM_PAGES)
        self._page = self._used = -1
        self.model = GraphedModel(self.decoder, MAX_NUM_SEQS, TOKEN_BUDGET)

    def request(self, length: int, adapter: LoraAdapter | None = None) -> Request:
        return Request([self.random.randrange(self.config.vocab_size) for _ in range(length)], adapter)

    def adapter(self, rank: int, modules: Sequence[str]) -> LoraAdapter:
        """Random rows in pages of their own."""
        rows = {}
        for shape in self.config.linear_shapes:
            if shape.name in modules:
                starts = [[self._place(width) for _ in range(rank)] for width in (shape.in_features, shape.out_features)]
                a_rows, b_rows = (torch.tensor(s, dtype=torch.int64, device=self.device) for s in starts)
                rows[shape.name] = LoraRows(rank, 0.5, a_rows, b_rows)
        return LoraAdapter(rows)

    def _place(self, width: int) -> int:
        if self._page < 0 or self._used + width > self.pool.shape[2]:
            self._page, self._used = self.free.pop(), 0
        place = slice(self._used, self._used + width)
        self.pool[:, self._page, place] = torch.randn(self.config.num_layers, width, device=self.device) * 0.1
        self._used += -(-width // 8) * 8
        return self._page * self.pool.shape[2] + place.start

    def pack(self, chunks: Sequence[tuple[Request, int]], prompts_end: bool = True) -> StepArrays:
        """The step that computes the next n tokens of each request; decodes must come first.

        prompts_end: whether the logits behind them are wanted.
        """
        adapters = list({id(r.adapter): r.adapter for r, _ in chunks if r.adapter is not None}.values())
        rows, last, ends = [], [], []
        for request, n in chunks:
            new = range(request.num_computed, request.num_computed + n)
            while len(request.table) * PAGE_TOKENS < new.stop:
                request.table.append(self.free.pop())
            index = -1 if request.adapter is None else [id(a) for a in adapters].index(id(request.adapter))
            slots = [request.table[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for p in new]
            rows += [(request.token_ids[p], p, slot, index) for p, slot in zip(new, slots, strict=True)]
            request.num_computed = new.stop
            ends.append(len(rows))
            last += [len(rows) - 1] if prompts_end or n == 1 else []
        token_ids, positions, slots, index = (ints(column) for column in zip(*rows, strict=True))
        return StepArrays(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            query_starts=ints([0, *ends]),
            context_lens=ints(r.num_computed for r, _ in chunks),
            page_starts=ints([0, *accumulate(len(r.table) for r, _ in chunks)]),
            page_ids=ints(page for r, _ in chunks for page in r.table),
            logits_rows=ints(last),
            adapter_index=index,
            adapters=tuple(adapters),
            num_decodes=sum(n == 1 for _, n in chunks),
        )

    def upload(self, step: StepArrays) -> Any:
        return self.buffers.upload(step, self.model.num_rows(step))


def mixed_load(world: World) -> Iterator[list[tuple[Request, int]]]:
    """Prompts that come while others decode, alone and together, short and longer than any graph; adapters of every kind."""
    adapters = [world.adapter(16, ATTENTION), world.adapter(5, ALL), world.adapter(64, ATTENTION), world.adapter(3, ["up_proj"])]
    plan = [None, adapters[0], adapters[0], adapters[1], None, adapters[2], adapters[3], adapters[1]]
    lengths = [5, 70, 33, 300, 17, 1, 48, 850]
    running: list[Request] = []
    for length, adapter in zip(lengths, plan, strict=True):
        request = world.request(length + 30, adapter)
        first = [(request, length)] if length > 1 else []
        decodes = [(r, 1) for r in running]
        yield [*decodes, *([(request, 1)] if length == 1 else []), *first]
        running.append(request)
        yield [(r, 1) for r in running]
        yield [(r, 1) for r in running[-3:]]
    yield [(r, 1) for r in running if r.adapter is None]
    yield [(r, 1) for r in running if r.adapter is adapters[0]]


@pytest.fixture(scope="module", params=VARIANTS)
def world(request: pytest.FixtureRequest) -> World:
    """Each variant, captured."""
    world = World(request.param)
    if not world.model.can_be_captured:
        pytest.skip("LoRA or attention runs on plain torch here")
    world.model.capture(world.buffers, world.pool)
    return world


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.gpu
def test_steps_in_a_row_agree_with_fp32_and_write_nowhere_else(world: World) -> None:
    steps = [world.pack(chunks, prompts_end=i > 0) for i, chunks in enumerate(mixed_load(world))]
    wide_pool = world.pool.float()
    sizes = set()
    for step in steps:
        before = world.pool.clone()
        inputs = world.upload(step)
        sizes.add((step.is_decode, len(inputs.token_ids)))
        logits = world.model.forward(inputs, world.pool).clone()
        expected = world.wide.forward(world.buffers.upload(step, step.num_tokens), wide_pool)
        assert logits.shape == expected.shape and logits.dtype == torch.float32
        assert not len(expected) or relative_error(logits, expected) < 0.03, sizes
        pages = torch.from_numpy(np.unique(step.slots // PAGE_TOKENS)).cuda().long()
        before[:, pages] = world.pool[:, pages]
        before[:, NUM_PAGES] = world.pool[:, NUM_PAGES]
        assert torch.equal(before.view(torch.int16), world.pool.view(torch.int16)), sizes
    assert len(sizes) > 8 and max(size for _, size in sizes) > 768


def decode_batch(world: World, adapters: Sequence[LoraAdapter | None]) -> StepArrays:
    """A step of decodes at all kinds of positions; what came before is computed."""
    requests = [world.request(world.random.choice([2, 16, 17, 33, 40]), adapter) for adapter in adapters]
    for request in requests:
        step = world.pack([(request, len(request.token_ids) - 1)])
        world.model.forward(world.upload(step), world.pool)
    return world.pack([(request, 1) for request in requests])


SCOPES = {LoraScope.NONE: [], LoraScope.ATTENTION: ATTENTION, LoraScope.ALL: ["q_proj", "down_proj"]}


@pytest.mark.gpu
@pytest.mark.parametrize("scope", LoraScope)
def test_a_replayed_decode_equals_its_launches_bit_for_bit(world: World, scope: LoraScope) -> None:
    adapters = [world.adapter(rank, SCOPES[scope]) if SCOPES[scope] else None for rank in (8, 40, 3)]
    graphs = world.model._decode
    assert graphs is not None
    for num_requests in (1, 3, 13, 24):
        step = decode_batch(world, [*adapters, None, *adapters, *adapters, *adapters, *adapters * 4][:num_requests])
        inputs = world.upload(step)
        with torch.inference_mode():
            replayed = world.model.forward(inputs, world.pool).clone()
            found, _ = graphs._steps.plan(inputs)
            assert found is scope
            launched = graphs._steps.make(inputs, scope)
            graphs._steps.plan(inputs)
            graphs._logits.fill_(torch.nan)
            graphs.launch(launched)
        assert torch.equal(graphs._logits[:num_requests], replayed)


@pytest.mark.gpu
@pytest.mark.parametrize("scope", LoraScope)
def test_a_replayed_chain_equals_its_launches_bit_for_bit(world: World, scope: LoraScope) -> None:
    adapter = world.adapter(8, SCOPES[scope]) if SCOPES[scope] else None
    graphs = world.model._mixed
    assert graphs is not None
    for lengths in ([3], [33, 40], [1, 1, 200, 150]):
        requests = [world.request(length, adapter) for length in lengths]
        step = world.pack([(request, len(request.token_ids)) for request in requests])
        inputs = world.upload(step)
        with torch.inference_mode():
            replayed = world.model.forward(inputs, world.pool).clone()
            launched = graphs._steps.make(inputs, scope)
            found, plan = graphs._steps.plan(inputs)
            assert found is scope
            expected = world.decoder.run(replace(launched, plan=plan))
        assert torch.equal(expected, replayed)


@pytest.mark.gpu
def test_a_graph_with_lora_computes_the_base_model_where_there_is_none(world: World) -> None:
    graphs = world.model._decode
    assert graphs is not None
    inputs = world.upload(decode_batch(world, [None] * 5))
    base = world.model.forward(inputs, world.pool).clone()
    world.decoder.lora.plan([], [], LoraLaunches.DECODE)
    for scope in LoraScope:
        with torch.inference_mode():
            graphs._logits.fill_(torch.nan)
        graphs._graphs[len(inputs.token_ids), scope].replay()
        assert torch.equal(graphs._logits[:5], base)


@pytest.mark.gpu
def test_padding_changes_nothing_beyond_rounding(world: World) -> None:
    adapters = [world.adapter(8, ATTENTION), world.adapter(30, ALL), None]
    for step in (decode_batch(world, adapters * 3), world.pack([(world.request(70, a), 70) for a in adapters])):
        inputs = world.upload(step)
        assert len(inputs.token_ids) > step.num_tokens
        padded = world.model.forward(inputs, world.pool).clone()
        unpadded = world.decoder.forward(world.buffers.upload(step, step.num_tokens), world.pool)
        assert relative_error(padded, unpadded) < 0.02


@pytest.mark.gpu
def test_requests_keep_their_pages_while_others_come_and_go(world: World) -> None:
    """Tokens of one request, alone and in a batch that changes at each step."""
    adapter = world.adapter(16, ALL)
    tokens = world.request(60, adapter).token_ids
    rows = []
    for is_alone in (True, False):
        request = Request(tokens, adapter)
        others = [] if is_alone else [world.request(100, world.adapter(4, ATTENTION)) for _ in range(6)]
        found = []
        for i in range(30):
            mine = (request, 30 if i == 0 else 1)
            decodes = [(other, 1) for other in others[: i % 7]]
            chunks = [*decodes, mine] if i == 0 else [mine, *decodes]
            logits = world.model.forward(world.upload(world.pack(chunks)), world.pool)
            found.append(logits[-1 if i == 0 else 0].clone())
        rows.append(torch.stack(found))
    assert relative_error(rows[1], rows[0]) < 0.02


def test_on_a_cpu_every_step_is_launched_unpadded() -> None:
    world = World("llama", device="cpu")
    assert not world.model.can_be_captured
    world.model.capture(world.buffers, world.pool)
    request = world.request(6)
    for step in (world.pack([(request, 5)]), world.pack([(request, 1)])):
        inputs = world.upload(step)
        assert len(inputs.token_ids) == step.num_tokens == world.model.num_rows(step)
        assert torch.equal(world.model.forward(inputs, world.pool), world.decoder.forward(inputs, world.pool))


def test_the_scope_is_the_smallest_that_holds_all_that_adapters_change() -> None:
    groups = lora_groups(config_of("llama"))
    rows = LoraRows(1, 1.0, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    for modules, scope in (
        ([], LoraScope.NONE),
        (["v_proj"], LoraScope.ATTENTION),
        (ATTENTION, LoraScope.ATTENTION),
        (["down_proj"], LoraScope.ALL),
        (ALL, LoraScope.ALL),
    ):
        plan = TorchLoraOps().plan([-1, 0], [LoraAdapter({module: rows for module in modules})])
        assert LoraScope.of(plan, groups) is scope
    assert LoraScope.of(TorchLoraOps().plan([-1], []), groups) is LoraScope.NONE
