"""A tiny Llama base with its geometry, and adapters that real PEFT saved for it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from adapter_store.geometry import LORA_MODULES, BaseGeometry, LinearShape
from adapter_store.image import AdapterImage, AdapterOrigin, ModuleWeights, build_image

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 3, 4, 2, 16


def _geometry(dtype: str) -> BaseGeometry:
    kv = KV_HEADS * HEAD_DIM
    in_features = (HIDDEN, HIDDEN, HIDDEN, HIDDEN, HIDDEN, HIDDEN, INTERMEDIATE)
    out_features = (HIDDEN, kv, kv, HIDDEN, INTERMEDIATE, INTERMEDIATE, HIDDEN)
    return BaseGeometry(
        model_name="tiny",
        fingerprint="f" * 64,
        dtype=dtype,
        num_layers=LAYERS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        modules=tuple(map(LinearShape, LORA_MODULES, in_features, out_features)),
        max_lora_rank=16,
    )


@pytest.fixture(scope="session")
def geometry() -> BaseGeometry:
    """The tiny base in float32, where nothing is rounded."""
    return _geometry("float32")


@pytest.fixture(scope="session")
def make_geometry() -> Callable[[str], BaseGeometry]:
    """The tiny base in any dtype."""
    return _geometry


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """An adapter directory, and PEFT's own delta W by (layer, module)."""

    directory: Path
    deltas: dict[tuple[int, str], torch.Tensor]

    @property
    def config(self) -> dict[str, Any]:
        """adapter_config.json as it is now."""
        fields: dict[str, Any] = json.loads((self.directory / "adapter_config.json").read_text())
        return fields

    def change_config(self, **options: object) -> None:
        """Writes adapter_config.json with some options changed."""
        (self.directory / "adapter_config.json").write_text(json.dumps(self.config | options))


SaveAdapter = Callable[..., SavedAdapter]


def _tiny_model() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=50,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def save_adapter(tmp_path: Path) -> SaveAdapter:
    """Trains nothing, but lets PEFT make random weights for a LoraConfig and save them."""

    def save(**options: Any) -> SavedAdapter:
        torch.manual_seed(0)
        lora = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": False} | options))
        model = peft.get_peft_model(_tiny_model(), lora)
        directory = tmp_path / "adapter"
        model.save_pretrained(str(directory))
        deltas: dict[tuple[int, str], torch.Tensor] = {}
        for name, module in model.named_modules():
            parts = name.split(".")
            if "layers" in parts and isinstance(module, peft.tuners.lora.layer.Linear):
                deltas[int(parts[parts.index("layers") + 1]), parts[-1]] = module.get_delta_weight("default").detach()
        return SavedAdapter(directory, deltas)

    return save


@pytest.fixture(scope="session")
def make_image(geometry: BaseGeometry) -> Callable[[int], AdapterImage]:
    """A small image whose content follows from a seed; all seeds give the same size."""

    def make(seed: int) -> AdapterImage:
        generator = torch.Generator().manual_seed(seed)
        layers = range(geometry.num_layers)
        weights = ModuleWeights(
            rank=4,
            scaling=0.5,
            lora_a={layer: torch.randn(4, HIDDEN, generator=generator) for layer in layers},
            lora_b={layer: torch.randn(HIDDEN, 4, generator=generator) for layer in layers},
        )
        return build_image(geometry, {"q_proj": weights}, AdapterOrigin("tiny", 2.0, False))

    return make
