"""Random adapters in PEFT's layout that change what the model says: a token of the wrong adapter is another token."""

import asyncio
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from adapter_store.geometry import LORA_MODULES
from benchmarks.model_shapes import ModelShape
from benchmarks.soak.service import SoakService
from protos.loraplane.v1 import adapter_pb2

# Of a module's output, which is about 1 at random weights: large beside rounding, small beside the base model.
RELATIVE_SIZE = 0.3
# Registrations at once; the control plane bounds how many may wait.
MAX_AT_ONCE = 8
REGISTER_TIMEOUT_S = 60.0


async def register_random(service: SoakService, root: Path, shape: ModelShape, ranks: list[int]) -> list[str]:
    """Makes one adapter of each rank, on every linear module, registers them from disk and returns their names."""
    limit = asyncio.Semaphore(MAX_AT_ONCE)

    async def register(number: int, rank: int) -> str:
        name = f"random-{number}-r{rank}"
        async with limit:
            await asyncio.to_thread(save_random, root / name, shape, rank, seed=number)
            request = adapter_pb2.RegisterAdapterRequest(name=name, source=adapter_pb2.AdapterSource(path=str(root / name)))
            await service.adapters.RegisterAdapter(request, timeout=REGISTER_TIMEOUT_S)
        return name

    return list(await asyncio.gather(*(register(number, rank) for number, rank in enumerate(ranks))))


def save_random(directory: Path, shape: ModelShape, rank: int, seed: int) -> None:
    """Writes one adapter as PEFT would."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(shape.num_layers):
        for module, (in_features, out_features) in _features(shape).items():
            block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            name = f"base_model.model.model.layers.{layer}.{block}.{module}"
            lora_a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
            lora_b = torch.randn(out_features, rank, generator=generator) * RELATIVE_SIZE / rank**0.5
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = lora_a, lora_b
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(LORA_MODULES), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def _features(shape: ModelShape) -> dict[str, tuple[int, int]]:
    hidden, inner, kv_dim = shape.hidden_size, shape.intermediate_size, shape.num_kv_heads * shape.head_dim
    outputs = dict(zip(LORA_MODULES, (hidden, kv_dim, kv_dim, hidden, inner, inner, hidden), strict=True))
    return {name: (inner if name == "down_proj" else hidden, width) for name, width in outputs.items()}
