"""An image computes what PEFT computes, for every way in which PEFT lets ranks and scalings differ."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch

from adapter_store.geometry import LORA_MODULES, BaseGeometry
from adapter_store.image import AdapterImage, unpack_module
from adapter_store.peft_import import import_peft

ALL_SEVEN = list(LORA_MODULES)


def image_delta(image: AdapterImage, layer: int, module: str) -> torch.Tensor:
    """Delta W of one module as a data plane would apply it."""
    lora_a, lora_b_t = unpack_module(image, layer, module)
    return image.header.modules[module].scaling * (lora_b_t.t().float() @ lora_a.float())


def assert_equals_peft(image: AdapterImage, saved: Any, geometry: BaseGeometry) -> None:
    """Every module of every layer: PEFT's delta, and zero where PEFT has none."""
    assert {module for _, module in saved.deltas} == set(image.header.modules)
    for layer in range(geometry.num_layers):
        for module in image.header.modules:
            actual = image_delta(image, layer, module)
            torch.testing.assert_close(actual, saved.deltas.get((layer, module), torch.zeros_like(actual)), rtol=1e-5, atol=1e-6)


CASES = {
    "one module": {},
    "all seven": {"target_modules": ALL_SEVEN},
    "all-linear": {"target_modules": "all-linear"},
    "attention only": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": 7},
    "mlp only": {"target_modules": ["gate_proj", "up_proj", "down_proj"], "r": 1},
    "rslora": {"target_modules": ALL_SEVEN, "use_rslora": True, "r": 3},
    "negative and fractional alpha": {"lora_alpha": -2.5},
    "zero alpha": {"lora_alpha": 0},
    "regex targets": {"target_modules": r".*\.(?:layers\.[01]\.self_attn\.[qk]_proj|mlp\.down_proj)"},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded modules": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.v_proj"]},
    "excluded by regex": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.2\..*"},
    "named in full, despite the layers": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "rank by module": {"target_modules": ALL_SEVEN, "rank_pattern": {"q_proj": 16, "down_proj": 1}},
    "rank by layer": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 9}},
    "alpha by module": {"target_modules": ALL_SEVEN, "alpha_pattern": {"v_proj": 32, "up_proj": 3}},
    "alpha by layer": {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {r"model\.layers\.[02]\..*": 5}},
    "rank and alpha by layer, rslora": {
        "target_modules": ALL_SEVEN,
        "use_rslora": True,
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "mlp.(up|down)_proj": 5, "^model.layers.2.self_attn.o_proj": 11},
        "alpha_pattern": {"layers.2.mlp.up_proj": 1, "k_proj": 64, "q_proj": 7},
    },
    "the first pattern that matches counts": {
        "target_modules": ["q_proj"],
        "rank_pattern": {"[a-z]_proj": 3, "q_proj": 5},
    },
    "a pattern matches whole names only": {"target_modules": ["q_proj"], "rank_pattern": {"proj": 2, "q_pro": 3}},
}


# PEFT warns of a pattern that matches nothing; one case has such a pattern on purpose.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_an_image_gives_the_delta_that_peft_computes(options: dict[str, Any], save_adapter: Any, geometry: BaseGeometry) -> None:
    saved = save_adapter(**options)
    image = import_peft(saved.directory, geometry)
    assert_equals_peft(image, saved, geometry)
    assert image.header.rslora is options.get("use_rslora", False)
    assert image.header.alpha == options.get("lora_alpha", 8)


def test_one_rank_in_all_layers_is_packed_without_padding_and_without_touching_the_weights(
    save_adapter: Any, geometry: BaseGeometry
) -> None:
    saved = save_adapter(r=4, lora_alpha=3, rank_pattern={"k_proj": 9}, target_modules=["q_proj", "k_proj"], use_rslora=True)
    image = import_peft(saved.directory, geometry)
    assert {name: module.rank for name, module in image.header.modules.items()} == {"q_proj": 4, "k_proj": 9}
    assert image.header.modules["k_proj"].scaling == 3 / math.sqrt(9)
    assert image.header.rank == 9
    assert image.header.target_modules == ("q_proj", "k_proj")
    tensors = safetensors.torch.load_file(saved.directory / "adapter_model.safetensors")
    for layer in range(geometry.num_layers):
        lora_a, lora_b_t = unpack_module(image, layer, "k_proj")
        prefix = f"base_model.model.model.layers.{layer}.self_attn.k_proj"
        assert torch.equal(lora_a, tensors[f"{prefix}.lora_A.weight"])
        assert torch.equal(lora_b_t.t(), tensors[f"{prefix}.lora_B.weight"])


def test_the_digest_follows_from_content_alone(save_adapter: Any, geometry: BaseGeometry) -> None:
    saved = save_adapter()
    first = import_peft(saved.directory, geometry)
    assert import_peft(saved.directory, geometry).digest == first.digest
    saved.change_config(lora_alpha=9)
    assert import_peft(saved.directory, geometry).digest != first.digest


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("served", ["float32", "bfloat16", "float16"])
def test_weights_are_cast_from_any_stored_dtype_to_the_served_one(
    stored: torch.dtype, served: str, save_adapter: Any, make_geometry: Callable[[str], BaseGeometry]
) -> None:
    saved = save_adapter()
    path = saved.directory / "adapter_model.safetensors"
    tensors = {name: tensor.to(stored) for name, tensor in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(tensors, path)
    image = import_peft(saved.directory, make_geometry(served))
    lora_a, _ = unpack_module(image, 1, "q_proj")
    expected = tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    assert torch.equal(lora_a, expected.to(getattr(torch, served)))


def test_scalings_that_differ_by_layer_are_folded_in_before_rounding(
    save_adapter: Any, make_geometry: Callable[[str], BaseGeometry]
) -> None:
    saved = save_adapter(lora_alpha=8, alpha_pattern={"layers.1.self_attn.q_proj": 3})
    image = import_peft(saved.directory, make_geometry("bfloat16"))
    assert image.header.modules["q_proj"].scaling == 2.0
    tensors = safetensors.torch.load_file(saved.directory / "adapter_model.safetensors")
    lora_b = tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    assert torch.equal(unpack_module(image, 1, "q_proj")[1].t(), (lora_b * (3 / 8)).bfloat16())


def test_names_with_the_adapters_default_name_in_them_are_the_same_tensors(save_adapter: Any, geometry: BaseGeometry) -> None:
    saved = save_adapter()
    plain = import_peft(saved.directory, geometry)
    path = saved.directory / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name.replace(".weight", ".default.weight"): t for name, t in tensors.items()}, path)
    assert import_peft(saved.directory, geometry).digest == plain.digest


def test_options_without_effect_on_serving_change_nothing(save_adapter: Any, geometry: BaseGeometry) -> None:
    saved = save_adapter()
    plain = import_peft(saved.directory, geometry)
    saved.change_config(
        lora_dropout=0.5, task_type="CAUSAL_LM", revision="main", init_lora_weights="gaussian", an_option_of_later=None
    )
    assert import_peft(saved.directory, geometry).digest == plain.digest
