"""Random adapters in PEFT's layout that change what the model says: a token of the wrong adapter is another token."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import grpc
import torch
from safetensors.torch import save_file

from adapter_store.geometry import LORA_MODULES
from benchmarks.model_shapes import ATTENTION_MODULES, ModelShape, geometry_of
from benchmarks.registering import path_requests, register_all

# Of a module's output, which is about 1 at random weights: large beside rounding, small beside the base model.
RELATIVE_SIZE = 0.3


async def register_random(channel: grpc.aio.Channel, root: Path, shape: ModelShape, ranks: Sequence[int]) -> list[str]:
    """Makes one adapter of each rank, on every linear module, registers them from disk and returns their names."""
    made = [(root / f"random-{number}-r{rank}", rank, number) for number, rank in enumerate(ranks)]
    await asyncio.gather(*(asyncio.to_thread(save_random, directory, shape, rank, seed) for directory, rank, seed in made))
    return (await register_all(channel, path_requests(directory for directory, _, _ in made))).names


def save_random(directory: Path, shape: ModelShape, rank: int, seed: int) -> None:
    """Writes one adapter as PEFT would."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(shape.num_layers):
        for module in geometry_of(shape).modules:
            block = "self_attn" if module.name in ATTENTION_MODULES else "mlp"
            name = f"base_model.model.model.layers.{layer}.{block}.{module.name}"
            lora_a = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            lora_b = torch.randn(module.out_features, rank, generator=generator) * RELATIVE_SIZE / rank**0.5
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = lora_a, lora_b
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(LORA_MODULES), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
