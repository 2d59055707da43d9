"""The forward pass of one step: decoder layers over the page pool, with each token's adapter added in place.

A step is computed in parts (`start`, then `attend` and `proceed` of each layer, then `logits`), so that parts can be captured in
CUDA graphs. Knows nothing of requests, pages, graphs or sampling.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from dataplane.attention.interface import AttentionBackend, AttentionPlan, KvPages
from dataplane.model.config import ModelConfig
from dataplane.model.layer_ops import LayerOps
from dataplane.model.lora_step import LoraStep
from dataplane.model.step_inputs import StepArrays, StepInputs
from dataplane.model.weights import ModelWeights
from kernels.lora import LoraOps, LoraTarget

# Positions in lora_groups.
_QKV, _O, _GATE_UP, _DOWN = range(4)


@dataclass(frozen=True, slots=True)
class Activations:
    """What the parts of a step hand on to one another, in the same place in every layer.

    hidden: [P, hidden_size] the residual stream.
    qkv: [P, q_dim + 2 * kv_dim]; q, k, v: [P, heads, head_dim] views of it.
    attended: [P, q_dim]; out: [P, num_heads, head_dim] a view of it.
    """

    hidden: torch.Tensor
    qkv: torch.Tensor
    attended: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor

    @staticmethod
    def of(config: ModelConfig, hidden: torch.Tensor, qkv: torch.Tensor, attended: torch.Tensor) -> "Activations":
        """With the views."""
        heads = qkv.view(len(qkv), -1, config.head_dim)
        q, k, v = heads.split_with_sizes([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        return Activations(hidden, qkv, attended, q, k, v, attended.view(len(attended), -1, config.head_dim))

    def first(self, config: ModelConfig, num_rows: int) -> "Activations":
        """Of the first rows."""
        return Activations.of(config, self.hidden[:num_rows], self.qkv[:num_rows], self.attended[:num_rows])


@dataclass(frozen=True, slots=True)
class LayerPool:
    """One layer of the pool, as LoRA and as attention see it. flat: [num_pages * page_elems]."""

    flat: torch.Tensor
    pages: KvPages


@dataclass(slots=True)
class DecoderStep:
    """All that the parts of one step need. attention: the backend that made `plan`. angles: made by `start`."""

    inputs: StepInputs
    pools: Sequence[LayerPool]
    activations: Activations
    lora: LoraStep
    attention: AttentionBackend
    plan: AttentionPlan
    angles: tuple[torch.Tensor, ...] = field(default=())


class Decoder:
    """A base model with its weights. One thread calls it."""

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, lora: LoraOps, attention: AttentionBackend, ops: LayerOps
    ) -> None:
        self.config = config
        self.lora = lora
        self.attention = attention
        self.lora_groups = lora_groups(config)
        self._weights = weights
        self._ops = ops
        self._viewed: torch.Tensor | None = None
        self._pools: tuple[LayerPool, ...] = ()

    def num_rows(self, step: StepArrays) -> int:
        """No padding."""
        return step.num_tokens

    @torch.no_grad()
    def forward(self, inputs: StepInputs, pool: torch.Tensor) -> torch.Tensor:
        """Runs one step and writes its K and V into the pool. Returns the logits of `inputs.logits_rows`, [S, vocab] fp32.

        pool: [num_layers, num_pages, page_elems].
        """
        activations = self.allocate(len(inputs.token_ids))
        lora_plan = self.lora.plan(inputs.host.adapter_index, inputs.host.adapters)
        lora = LoraStep.as_needed(self.lora, self.lora_groups, lora_plan)
        plan = self.attention.plan(inputs, activations.q, activations.out)
        return self.run(DecoderStep(inputs, self.pools(pool), activations, lora, self.attention, plan))

    @torch.inference_mode()
    def load_kernels(self, num_rows: Iterable[int], num_logits: Iterable[int]) -> None:
        """Multiplies zeros of each of these numbers of rows by every matrix of a layer, or for logits.

        cuBLAS chooses a kernel by the number of rows and loads it when it is used first, and loading waits for the device. Steps
        that met new ones held the next back for as long as two take: 80 ms at 2,048 tokens of a 7B model, one step in two of the
        first second under load.
        """
        weights, layer = self._weights, self._weights.layers[0]
        of_layer = (
            (layer.qkv, layer.qkv_bias),
            (layer.o, layer.o_bias),
            (layer.gate_up, layer.gate_up_bias),
            (layer.down, layer.down_bias),
        )
        for linears, counts in ((of_layer, num_rows), (((weights.lm_head, None),), num_logits)):
            for (matrix, bias), count in itertools.product(linears, counts):
                functional.linear(matrix.new_zeros((count, matrix.shape[1])), matrix, bias)

    def run(self, step: DecoderStep, out: torch.Tensor | None = None) -> torch.Tensor:
        """All parts of a step. out: where its logits go, if not to memory of their own."""
        self.start(step)
        for layer in range(self.config.num_layers):
            self.attend(step, layer)
            self.proceed(step, layer)
        return self.logits(step, out)

    def allocate(self, num_rows: int) -> Activations:
        """Activations of a step of so many rows."""
        config, embedding = self.config, self._weights.embedding
        widths = (config.hidden_size, config.q_dim + 2 * config.kv_dim, config.q_dim)
        rooms = (torch.empty((num_rows, width), dtype=embedding.dtype, device=embedding.device) for width in widths)
        return Activations.of(config, *rooms)

    def pools(self, pool: torch.Tensor) -> tuple[LayerPool, ...]:
        """The layers of the pool; made once, as a hundred views would take their time in every step."""
        if self._viewed is not pool:
            kv_shape = (self.config.num_kv_heads, self.config.head_dim)
            self._pools = tuple(LayerPool(layer.view(-1), KvPages.of(layer, *kv_shape)) for layer in pool)
            self._viewed = pool
        return self._pools

    def start(self, step: DecoderStep) -> None:
        """Everything before the first layer's attention."""
        step.lora.begin()
        hidden = step.activations.hidden
        torch.index_select(self._weights.embedding, 0, step.inputs.token_ids, out=hidden)
        step.angles = self._ops.angles(step.inputs.positions, hidden.dtype)
        self._project(step, 0, self._ops.norm(hidden, self._weights.layers[0].input_norm))

    def attend(self, step: DecoderStep, layer: int) -> None:
        """Attention of one layer."""
        step.attention.attend(step.plan, step.pools[layer].pages, self.config.layer_windows[layer])

    def proceed(self, step: DecoderStep, layer: int) -> None:
        """Everything between a layer's attention and the next one's; behind the last layer, its end."""
        weights, pool, hidden = self._weights.layers[layer], step.pools[layer].flat, step.activations.hidden
        attended = step.activations.attended
        x = functional.linear(attended, weights.o, weights.o_bias)
        step.lora.add(_O, x, attended, pool)
        x = self._ops.add_norm(x, hidden, weights.post_attention_norm)
        gate_up = functional.linear(x, weights.gate_up, weights.gate_up_bias)
        step.lora.add(_GATE_UP, gate_up, x, pool)
        inner = self._ops.swiglu(gate_up)
        x = functional.linear(inner, weights.down, weights.down_bias)
        step.lora.add(_DOWN, x, inner, pool)
        if layer + 1 < self.config.num_layers:
            self._project(step, layer + 1, self._ops.add_norm(x, hidden, self._weights.layers[layer + 1].input_norm))
        else:
            hidden.add_(x)

    def logits(self, step: DecoderStep, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the rows that are wanted, [S, vocab] fp32; of a step of decodes, of all its rows."""
        hidden = step.activations.hidden
        if not step.inputs.host.is_decode:
            hidden = hidden.index_select(0, step.inputs.logits_rows)
            if not len(hidden):  # chunks of prompts alone: nothing that a kernel could be launched for
                return hidden.new_empty((0, self.config.vocab_size), dtype=torch.float32)
        logits = functional.linear(self._ops.norm(hidden, self._weights.norm), self._weights.lm_head)
        return logits.float() if out is None else out.copy_(logits)

    def _project(self, step: DecoderStep, layer: int, x: torch.Tensor) -> None:
        """Queries, keys and values of x [P, hidden_size], the layer's normed input; keys and values go to their pages."""
        weights, activations, pool = self._weights.layers[layer], step.activations, step.pools[layer]
        if weights.qkv_bias is None:
            torch.mm(x, weights.qkv.t(), out=activations.qkv)
        else:
            torch.addmm(weights.qkv_bias, x, weights.qkv.t(), out=activations.qkv)
        step.lora.add(_QKV, activations.qkv, x, pool.flat)
        if weights.q_norm is not None and weights.k_norm is not None:
            self._ops.norm_heads(activations.q, weights.q_norm)
            self._ops.norm_heads(activations.k, weights.k_norm)
        self._ops.rotate(activations.q, activations.k, step.angles)
        step.attention.append(activations.k, activations.v, pool.pages, step.inputs)


def lora_groups(config: ModelConfig) -> tuple[tuple[LoraTarget, ...], ...]:
    """The targets of each input of a layer: of q, k and v; of o; of gate and up; of down."""
    groups = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    return tuple(_targets(config, modules) for modules in groups)


def _targets(config: ModelConfig, modules: tuple[str, ...]) -> tuple[LoraTarget, ...]:
    """The modules whose outputs stand side by side in one fused matrix."""
    shapes = {shape.name: shape for shape in config.linear_shapes}
    targets, start = [], 0
    for module in modules:
        shape = shapes[module]
        targets.append(LoraTarget(module, shape.in_features, shape.out_features, start))
        start += shape.out_features
    return tuple(targets)
