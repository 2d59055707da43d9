"""The parts of a decode step, each alone: its GEMMs, its attention, its LoRA operation, and the model without the host around it.

On CUDA each part is one captured graph, timed over replays; elsewhere it is run as it is. Every part reads the pages that the
step itself read.
"""

import itertools
from dataclasses import dataclass

import torch
from torch.nn import functional

from benchmarks.device_timing import elapsed_ms, host_ms, time_ms
from benchmarks.steps.bench import StepBench
from dataplane.attention.choice import attention_backend
from dataplane.attention.interface import AttentionShape, KvPages
from dataplane.model.decoder import lora_groups
from dataplane.model.step_inputs import StepInputs
from kernels.backend import lora_ops
from kernels.lora import LoraLaunches
from kernels.plan_layout import LoraLimits

# Of the model, one after the other.
NUM_FORWARDS = 20
# Layers whose weights the GEMMs alone cycle through: before a matrix comes round again, many times the L2 cache has been read.
NUM_GEMM_LAYERS = 2
# What keys and values are taken to be read at: about what a plain kernel reads and writes on an H200.
ASSUMED_TB_PER_S = 4.3


@dataclass(frozen=True, slots=True)
class BaseParts:
    """Milliseconds of what every step of that batch has.

    attention_plan_ms: of the host. attention_bytes: of keys and values that are read.
    """

    gemm_ms: float
    attention_ms: float
    attention_plan_ms: float
    attention_bytes: int

    @property
    def estimate_ms(self) -> float:
        """The GEMMs, and attention at the assumed speed of memory: no bound, as attention may read faster."""
        return self.gemm_ms + self.attention_bytes / ASSUMED_TB_PER_S / 1e9


@dataclass(frozen=True, slots=True)
class LoraParts:
    """Milliseconds of the LoRA operation in all layers. lora_plan_ms: of the host, when the batch has changed."""

    lora_ms: float = 0.0
    lora_plan_ms: float = 0.0


class StepParts:
    """Times the parts of the step that a bench launched last. Has operations of its own, so that nobody's plans are disturbed."""

    def __init__(self, bench: StepBench) -> None:
        loaded = bench.loaded
        config, limits = loaded.config, loaded.limits
        self._bench = bench
        self._dtype, self._device = loaded.pool.dtype, loaded.device
        self._groups = lora_groups(config)
        lora_limits = LoraLimits(limits.token_budget, limits.max_num_seqs, loaded.geometry.max_lora_rank)
        self._lora = lora_ops(self._groups, self._dtype, self._device, lora_limits)
        windows = frozenset(config.layer_windows)
        shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim, limits.page_tokens, windows)
        self._attention = attention_backend(shape, self._dtype, self._device)
        if self._attention.can_be_captured:
            max_rows = 2 * limits.max_num_seqs  # however steps are padded
            self._attention = self._attention.for_decode_graphs(max_rows, limits.num_pages + max_rows, limits.num_pages)
        qkv_dim = config.q_dim + 2 * config.kv_dim
        features = (
            (config.hidden_size, qkv_dim),
            (config.q_dim, config.hidden_size),
            (config.hidden_size, 2 * config.intermediate_size),
            (config.intermediate_size, config.hidden_size),
        )
        self._matrices = [[self._random(n, m, std=m**-0.5) for m, n in features] for _ in range(NUM_GEMM_LAYERS)]
        self._lm_head = self._random(config.vocab_size, config.hidden_size, std=config.hidden_size**-0.5)

    @torch.inference_mode()
    def base(self) -> BaseParts:
        """What the last step has without adapters."""
        inputs = self._inputs()
        geometry = self._bench.loaded.geometry
        num_read = int(inputs.host.context_lens.sum())
        num_bytes = num_read * 2 * geometry.kv_dim * geometry.dtype_bytes * geometry.num_layers
        return BaseParts(self._gemm_ms(inputs), *self._attention_ms(inputs), num_bytes)

    @torch.inference_mode()
    def lora(self) -> LoraParts:
        """What the last step's adapters take; nothing if it has none."""
        inputs = self._inputs()
        step, pool, lora = inputs.host, self._bench.loaded.pool, self._lora
        launches = LoraLaunches.DECODE if lora.can_be_captured else LoraLaunches.AS_NEEDED
        plan = lora.plan(step.adapter_index, step.adapters, launches)
        if plan.is_empty:
            return LoraParts()
        calls = []
        for targets in filter(plan.changes, self._groups):
            width = max(target.out_start + target.out_features for target in targets)
            y, x = (self._random(step.num_tokens, n) for n in (width, targets[0].in_features))
            calls.append((y, x, targets))

        def run() -> None:
            lora.begin(plan)
            for layer in pool:
                for y, x, targets in calls:
                    lora.add(y, x, layer.view(-1), plan, targets)

        lora_ms = time_ms(run, self._device)
        # In turns, as the plan of an unchanged batch costs nothing.
        indices = itertools.cycle((step.adapter_index[::-1].copy(), step.adapter_index))
        plan_ms = host_ms(lambda: lora.plan(next(indices), step.adapters, launches), self._device)
        return LoraParts(lora_ms, plan_ms)

    @torch.inference_mode()
    def forward_ms(self) -> float:
        """The model's part of the last step, launched again and again without waiting: the device's time, if it is the bound."""
        inputs, loaded = self._inputs(), self._bench.loaded

        def run() -> None:
            for _ in range(NUM_FORWARDS):
                loaded.model.forward(inputs, loaded.pool)

        run()
        return elapsed_ms(run, self._device) / NUM_FORWARDS

    def _inputs(self) -> StepInputs:
        inputs = self._bench.recorder.inputs
        assert inputs is not None, "no step was launched yet"
        return inputs

    def _gemm_ms(self, inputs: StepInputs) -> float:
        config = self._bench.loaded.config
        num_rows = len(inputs.token_ids)
        x = {m.shape[1]: self._random(num_rows, m.shape[1]) for m in (*self._matrices[0], self._lm_head)}

        def run() -> None:
            for i in range(config.num_layers):
                for matrix in self._matrices[i % NUM_GEMM_LAYERS]:
                    functional.linear(x[matrix.shape[1]], matrix)
            functional.linear(x[self._lm_head.shape[1]], self._lm_head)

        return time_ms(run, self._device)

    def _attention_ms(self, inputs: StepInputs) -> tuple[float, float]:
        """Writing keys and values, and attending to all of them; and the host's plan for it."""
        config, attention = self._bench.loaded.config, self._attention
        num_rows = len(inputs.token_ids)
        q, out = (self._random(num_rows, config.num_heads, config.head_dim) for _ in range(2))
        k, v = (self._random(num_rows, config.num_kv_heads, config.head_dim) for _ in range(2))
        plan = attention.plan(inputs, q, out)
        layers = [KvPages.of(layer, config.num_kv_heads, config.head_dim) for layer in self._bench.loaded.pool]

        def run() -> None:
            for pages, window in zip(layers, config.layer_windows, strict=True):
                attention.append(k, v, pages, inputs)
                attention.attend(plan, pages, window)

        return time_ms(run, self._device), host_ms(lambda: attention.plan(inputs, q, out), self._device)

    def _random(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device).normal_(std=std)
