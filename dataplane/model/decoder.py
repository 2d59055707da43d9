"""The forward pass of one step: decoder layers over the page pool, with each token's adapter added in place.

Equal to transformers in every rounding (norms and angles in fp32). Knows nothing of requests, pages or sampling.
"""

import torch
from torch.nn import functional

from dataplane.attention.interface import AttentionBackend, AttentionPlan
from dataplane.model.config import ModelConfig
from dataplane.model.rope import cos_sin, inverse_frequencies, rotate
from dataplane.model.step_inputs import StepInputs
from dataplane.model.weights import LayerWeights, ModelWeights
from kernels.lora import LoraOps, LoraPlan, LoraTarget


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension: the quotient in fp32, the product in the dtype of x."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


class Decoder:
    """A base model with its weights. One thread calls it."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, lora: LoraOps, attention: AttentionBackend) -> None:
        self._config = config
        self._weights = weights
        self._lora = lora
        self._attention = attention
        self._frequencies = inverse_frequencies(config.rope, config.head_dim, weights.norm.device)
        self._qkv_targets, self._o_targets, self._gate_up_targets, self._down_targets = lora_groups(config)

    @torch.no_grad()
    def forward(self, inputs: StepInputs, pool: torch.Tensor) -> torch.Tensor:
        """Runs one step and writes its K and V into the pool. Returns the logits of `inputs.logits_rows`, [S, vocab] fp32.

        pool: [num_layers, num_pages, page_elems].
        """
        config = self._config
        lora_plan = self._lora.plan(inputs.adapter_index, inputs.adapters)
        if not lora_plan.is_empty:
            self._lora.begin(lora_plan)
        attention_plan = self._attention.plan(inputs)
        hidden = functional.embedding(inputs.token_ids, self._weights.embedding)
        angles = cos_sin(self._frequencies, config.rope.attention_factor, inputs.positions, hidden.dtype)
        for i, layer in enumerate(self._weights.layers):
            x = rms_norm(hidden, layer.input_norm, config.rms_norm_eps)
            hidden = hidden + self._self_attention(x, layer, pool[i], config.layer_windows[i], angles, lora_plan, attention_plan)
            x = rms_norm(hidden, layer.post_attention_norm, config.rms_norm_eps)
            hidden = hidden + self._mlp(x, layer, pool[i], lora_plan)
        last = rms_norm(hidden.index_select(0, inputs.logits_rows), self._weights.norm, config.rms_norm_eps)
        return functional.linear(last, self._weights.lm_head).float()

    def _self_attention(
        self,
        x: torch.Tensor,
        layer: LayerWeights,
        layer_pool: torch.Tensor,
        sliding_window: int | None,
        angles: tuple[torch.Tensor, torch.Tensor],
        lora_plan: LoraPlan,
        attention_plan: AttentionPlan,
    ) -> torch.Tensor:
        """x [num_tokens, hidden_size] through q, k, v, attention and o."""
        config = self._config
        qkv = self._linear(x, layer.qkv, layer.qkv_bias, layer_pool, lora_plan, self._qkv_targets)
        heads = qkv.view(len(x), -1, config.head_dim)
        q, k, v = heads.split_with_sizes([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, config.rms_norm_eps), rms_norm(k, layer.k_norm, config.rms_norm_eps)
        q, k = rotate(q, *angles), rotate(k, *angles)
        kv_pages = layer_pool.view(len(layer_pool), 2, -1, config.num_kv_heads, config.head_dim)
        out = self._attention.run(q, k, v, kv_pages, attention_plan, sliding_window).reshape(len(x), config.q_dim)
        return self._linear(out, layer.o, layer.o_bias, layer_pool, lora_plan, self._o_targets)

    def _mlp(self, x: torch.Tensor, layer: LayerWeights, layer_pool: torch.Tensor, lora_plan: LoraPlan) -> torch.Tensor:
        """x [num_tokens, hidden_size] through SwiGLU."""
        gate_up = self._linear(x, layer.gate_up, layer.gate_up_bias, layer_pool, lora_plan, self._gate_up_targets)
        gate, up = gate_up.chunk(2, dim=-1)
        return self._linear(functional.silu(gate) * up, layer.down, layer.down_bias, layer_pool, lora_plan, self._down_targets)

    def _linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        layer_pool: torch.Tensor,
        lora_plan: LoraPlan,
        targets: tuple[LoraTarget, ...],
    ) -> torch.Tensor:
        """One base GEMM for the whole batch, and the adapters' part added to its output."""
        y = functional.linear(x, weight, bias)
        if not lora_plan.is_empty:
            self._lora.add(y, x, layer_pool.view(-1), lora_plan, targets)
        return y


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
