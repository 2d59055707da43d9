"""Whatever of an adapter cannot be applied refuses it, by name."""

from typing import Any

import peft
import pytest
import safetensors.torch
import torch

from adapter_store.errors import MAX_VIOLATIONS, AdapterCorruptError, AdapterRejectedError, SourceNotFoundError
from adapter_store.geometry import BaseGeometry
from adapter_store.peft_import import import_peft
from adapter_store.peft_options import APPLIED, REFUSED, WITHOUT_EFFECT

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"

# Option, value, kind of the violation, and words of its message.
OPTIONS: list[tuple[str, object, str, str]] = [
    ("peft_type", "IA3", "UNSUPPORTED_PEFT_TYPE", "is 'IA3'; only LORA is served"),
    ("peft_type", None, "UNSUPPORTED_PEFT_TYPE", "is None; only LORA is served"),
    ("use_dora", True, "UNSUPPORTED_OPTION", "DoRA rescales the base's weights"),
    ("modules_to_save", ["lm_head"], "UNSUPPORTED_OPTION", "is ['lm_head']: whole trained modules"),
    ("bias", "lora_only", "UNSUPPORTED_OPTION", "is 'lora_only': trained biases"),
    ("bias", "all", "UNSUPPORTED_OPTION", "is 'all': trained biases"),
    ("lora_bias", True, "UNSUPPORTED_OPTION", "a bias in lora_B"),
    ("fan_in_fan_out", True, "UNSUPPORTED_OPTION", "Conv1D"),
    ("trainable_token_indices", [1, 2], "UNSUPPORTED_OPTION", "token embeddings"),
    ("target_parameters", ["mlp.experts"], "UNSUPPORTED_OPTION", "not linear modules"),
    ("layer_replication", [[0, 2], [1, 3]], "UNSUPPORTED_OPTION", "replicated layers"),
    ("megatron_config", {"a": 1}, "UNSUPPORTED_OPTION", "Megatron"),
    ("alora_invocation_tokens", [5], "UNSUPPORTED_OPTION", "aLoRA"),
    ("alora_invocation_tokens", [], "UNSUPPORTED_OPTION", "aLoRA"),
    ("use_qalora", True, "UNSUPPORTED_OPTION", "QA-LoRA"),
    ("use_bdlora", {"nblocks": 2}, "UNSUPPORTED_OPTION", "block-diagonal"),
    ("monteclora_config", {"num_samples": 2}, "UNSUPPORTED_OPTION", "MonteCLoRA"),
    ("arrow_config", {"top_k": 1}, "UNSUPPORTED_OPTION", "Arrow"),
    ("kasa_config", {"a": 1}, "UNSUPPORTED_OPTION", "KaSA"),
    ("velora_config", {"a": 1}, "UNSUPPORTED_OPTION", "VeLoRA"),
    ("init_lora_weights", "pissa", "UNSUPPORTED_OPTION", "is 'pissa': it changes the base's weights"),
    ("init_lora_weights", "pissa_niter_4", "UNSUPPORTED_OPTION", "path_initial_model_for_weight_conversion"),
    ("init_lora_weights", "olora", "UNSUPPORTED_OPTION", "is 'olora'"),
    ("init_lora_weights", "loftq", "UNSUPPORTED_OPTION", "is 'loftq'"),
    ("init_lora_weights", "corda", "UNSUPPORTED_OPTION", "is 'corda'"),
    ("init_lora_weights", "lora_ga", "UNSUPPORTED_OPTION", "is 'lora_ga'"),
    ("use_something_new", True, "UNKNOWN_OPTION", "this option is not known"),
    ("layers_pattern", ["blocks"], "UNSUPPORTED_OPTION", "this base's layers are 'layers'"),
    ("layers_to_transform", [0, 3], "INVALID_VALUE", "this base has layers 0 to 2"),
    ("layers_to_transform", "all", "INVALID_VALUE", "this base has layers 0 to 2"),
    ("layers_to_transform", [[0]], "INVALID_VALUE", "is [[0]]; this base has layers 0 to 2"),
    ("layers_to_transform", {"0": 1}, "INVALID_VALUE", "this base has layers 0 to 2"),
    ("target_modules", None, "NO_TARGETS", "must name the modules"),
    ("target_modules", [], "NO_TARGETS", "must name the modules"),
    ("target_modules", 7, "INVALID_VALUE", "must be a list of names or one expression"),
    ("target_modules", ".*c_attn", "NO_TARGETS", "selects no module of this base"),
    ("target_modules", "(q_proj", "INVALID_VALUE", "not a regular expression"),
    ("r", 0, "INVALID_VALUE", "is 0; it must be a whole number of at least 1"),
    ("r", 4.0, "INVALID_VALUE", "is 4.0; it must be a whole number"),
    ("r", True, "INVALID_VALUE", "is True; it must be a whole number"),
    ("r", "4", "INVALID_VALUE", "is '4'; it must be a whole number"),
    ("r", 10**400, "INVALID_VALUE", "it must be a whole number of at least 1, at most 1048576"),
    ("rank_pattern", {"q_proj": 10**400}, "INVALID_VALUE", "it must be a whole number of at least 1, at most 1048576"),
    ("lora_alpha", 10**400, "INVALID_VALUE", "it must be a finite number"),
    ("lora_alpha", "8", "INVALID_VALUE", "is '8'; it must be a finite number"),
    ("lora_alpha", float("nan"), "INVALID_VALUE", "is nan; it must be a finite number"),
    ("lora_alpha", float("inf"), "INVALID_VALUE", "is inf; it must be a finite number"),
    ("use_rslora", "yes", "INVALID_VALUE", "is 'yes'; it must be true or false"),
    ("rank_pattern", [4], "INVALID_VALUE", "must be an object of patterns and values"),
    ("rank_pattern", {"q_proj[": 4}, "INVALID_VALUE", "not a regular expression"),
    ("alpha_pattern", {"(a|b": 4}, "INVALID_VALUE", "not a regular expression"),
    ("base_model_name_or_path", 5, "INVALID_VALUE", "must be text"),
]


def rejection(directory: Any, geometry: BaseGeometry) -> list[tuple[str, str, str]]:
    """The violations for which an adapter is refused."""
    with pytest.raises(AdapterRejectedError) as caught:
        import_peft(directory, geometry)
    return [(v.kind, v.subject, v.description) for v in caught.value.violations]


def rewrite(directory: Any, change: Any) -> None:
    """Saves the weights again after change(tensors)."""
    path = directory / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


@pytest.mark.parametrize(("option", "value", "kind", "words"), OPTIONS, ids=[f"{o}={v}" for o, v, _, _ in OPTIONS])
def test_an_option_that_cannot_be_honoured_is_refused_by_name(
    option: str, value: object, kind: str, words: str, save_adapter: Any, geometry: BaseGeometry
) -> None:
    saved = save_adapter()
    saved.change_config(**{option: value})
    matching = [v for v in rejection(saved.directory, geometry) if v[0] == kind and v[1].startswith(option)]
    assert any(words in description for _, _, description in matching), matching


def test_every_option_of_the_installed_peft_is_decided() -> None:
    known = set(APPLIED) | set(WITHOUT_EFFECT) | set(REFUSED)
    assert set(peft.LoraConfig().to_dict()) <= known


def test_a_real_dora_adapter_is_refused_for_its_option_and_its_tensors(save_adapter: Any, geometry: BaseGeometry) -> None:
    found = rejection(save_adapter(use_dora=True).directory, geometry)
    assert ("UNSUPPORTED_OPTION", "use_dora") in [(kind, subject) for kind, subject, _ in found]
    assert any(kind == "UNSUPPORTED_TENSOR" and "DoRA magnitude" in text for kind, _, text in found)


def test_a_real_pissa_adapter_is_refused(save_adapter: Any, geometry: BaseGeometry) -> None:
    found = rejection(save_adapter(init_lora_weights="pissa").directory, geometry)
    assert [(kind, subject) for kind, subject, _ in found] == [("UNSUPPORTED_OPTION", "init_lora_weights")]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_real_adapters_of_the_head_or_the_embedding_are_refused(module: str, save_adapter: Any, geometry: BaseGeometry) -> None:
    found = rejection(save_adapter(target_modules=["q_proj", module]).directory, geometry)
    assert ("UNSUPPORTED_MODULE", f"target_modules: {module}") in [(kind, subject) for kind, subject, _ in found]
    assert any(kind == "UNSUPPORTED_TENSOR" and module in subject for kind, subject, _ in found)


def test_a_rank_over_the_limit_is_refused_with_both_numbers(save_adapter: Any, geometry: BaseGeometry) -> None:
    found = rejection(save_adapter(rank_pattern={"layers.1.self_attn.q_proj": 17}).directory, geometry)
    limit = "rank 17 exceeds this service's max_lora_rank of 16"
    assert found == [("RANK_LIMIT", "model.layers.1.self_attn.q_proj", limit)]


def test_all_violations_are_told_at_once_and_layers_are_counted(save_adapter: Any, geometry: BaseGeometry) -> None:
    saved = save_adapter(r=17)
    saved.change_config(use_dora=True, bias="all", lora_alpha="x")
    rewrite(saved.directory, lambda tensors: tensors.update({"extra.weight": torch.zeros(1)}))
    assert [(kind, subject) for kind, subject, _ in rejection(saved.directory, geometry)] == [
        ("UNSUPPORTED_OPTION", "bias"),
        ("UNSUPPORTED_OPTION", "use_dora"),
        ("INVALID_VALUE", "lora_alpha"),
        ("RANK_LIMIT", "model.layers.0.self_attn.q_proj and 2 more layers"),
        ("UNSUPPORTED_TENSOR", "extra.weight"),
    ]


def test_a_flood_of_violations_is_cut_and_counted(save_adapter: Any, geometry: BaseGeometry) -> None:
    saved = save_adapter()
    saved.change_config(**{f"option_{i}": True for i in range(50)}, **{f"flag_{i}": "x" * 10_000 for i in range(3)})
    with pytest.raises(AdapterRejectedError, match="53 problems") as caught:
        import_peft(saved.directory, geometry)
    assert len(caught.value.violations) == MAX_VIOLATIONS + 1
    assert caught.value.violations[-1].kind == "MORE_VIOLATIONS"
    assert sum(len(v.subject) + len(v.description) for v in caught.value.violations) < 8000


TENSOR_NAMES = {
    f"{PREFIX}.lora_C.weight": "UNSUPPORTED_TENSOR",
    f"{PREFIX}.lora_A.other.weight": "UNSUPPORTED_TENSOR",
    f"{PREFIX}.lora_B.bias": "UNSUPPORTED_TENSOR",
    "base_model.model.layers.0.self_attn.q_proj.lora_A.weight": "UNSUPPORTED_TENSOR",
    "base_model.model.model.layers.0.mlp.q_proj.lora_A.weight": "UNSUPPORTED_TENSOR",
    "base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight": "UNSUPPORTED_TENSOR",
    "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight": "UNSUPPORTED_TENSOR",
    "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight": "UNTARGETED_TENSOR",
    "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight": "BASE_MISMATCH",
    f"{PREFIX}.lora_A.default.weight": "DUPLICATE_TENSOR",
}


@pytest.mark.parametrize(("name", "kind"), TENSOR_NAMES.items())
def test_a_tensor_that_belongs_nowhere_is_refused_by_name(
    name: str, kind: str, save_adapter: Any, geometry: BaseGeometry
) -> None:
    saved = save_adapter()
    rewrite(saved.directory, lambda tensors: tensors.update({name: torch.zeros(4, 64)}))
    assert [(found, subject) for found, subject, _ in rejection(saved.directory, geometry)] in (
        [(kind, name)],
        # Of two equal ones it does not matter which is named.
        [(kind, f"{PREFIX}.lora_A.weight")],
    )


@pytest.mark.parametrize("half", ["A", "B"])
def test_a_missing_half_is_named(half: str, save_adapter: Any, geometry: BaseGeometry) -> None:
    saved = save_adapter()
    rewrite(saved.directory, lambda tensors: tensors.pop(f"{PREFIX}.lora_{half}.weight"))
    found = [("MISSING_TENSOR", f"model.layers.0.self_attn.q_proj.lora_{half}")]
    assert [(kind, subject) for kind, subject, _ in rejection(saved.directory, geometry)] == found


@pytest.mark.parametrize(
    ("half", "shape", "wanted"),
    [
        ("A", (4, 63), "[4, 64]"),
        ("A", (5, 64), "[4, 64]"),
        ("B", (65, 4), "[64, 4]"),
        ("B", (64,), "[64, 4]"),
        ("B", (0, 4), "[64, 4]"),
    ],
)
def test_a_wrong_shape_is_named_with_both_shapes(
    half: str, shape: tuple[int, ...], wanted: str, save_adapter: Any, geometry: BaseGeometry
) -> None:
    saved = save_adapter()
    rewrite(saved.directory, lambda tensors: tensors.update({f"{PREFIX}.lora_{half}.weight": torch.zeros(shape)}))
    assert rejection(saved.directory, geometry) == [
        (
            "SHAPE_MISMATCH",
            f"{PREFIX}.lora_{half}.weight",
            f"shape {list(shape)}; this base and the configured rank 4 make it {wanted}",
        )
    ]


def test_a_rank_that_the_weights_do_not_have_is_refused(save_adapter: Any, geometry: BaseGeometry) -> None:
    saved = save_adapter(r=4)
    saved.change_config(r=8)
    assert {kind for kind, _, _ in rejection(saved.directory, geometry)} == {"SHAPE_MISMATCH"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn])
def test_a_dtype_that_is_not_served_is_refused(dtype: torch.dtype, save_adapter: Any, geometry: BaseGeometry) -> None:
    saved = save_adapter()
    rewrite(saved.directory, lambda tensors: tensors.update({f"{PREFIX}.lora_A.weight": torch.zeros(4, 64).to(dtype)}))
    [(kind, subject, text)] = rejection(saved.directory, geometry)
    assert (kind, subject) == ("UNSUPPORTED_DTYPE", f"{PREFIX}.lora_A.weight")
    assert "weights must be F32, F16, BF16" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_corruption_and_is_located(
    value: float, save_adapter: Any, geometry: BaseGeometry
) -> None:
    saved = save_adapter()

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}.lora_B.weight"][5, 2] = value

    rewrite(saved.directory, spoil)
    with pytest.raises(AdapterCorruptError) as caught:
        import_peft(saved.directory, geometry)
    assert (caught.value.file, caught.value.tensor) == ("adapter_model.safetensors", f"{PREFIX}.lora_B.weight")
    assert caught.value.found == f"holds {value} at [5, 2]; weights must be finite"


def test_a_weight_beyond_the_served_dtype_is_refused(save_adapter: Any, make_geometry: Any) -> None:
    saved = save_adapter()
    rewrite(saved.directory, lambda tensors: tensors[f"{PREFIX}.lora_A.weight"].fill_(70000.0))
    import_peft(saved.directory, make_geometry("float32"))
    [(kind, subject, text)] = rejection(saved.directory, make_geometry("float16"))
    assert (kind, subject) == ("VALUE_RANGE", f"{PREFIX}.lora_A.weight")
    assert "70000" in text and "65504" in text


def test_a_pickle_is_refused_by_name(save_adapter: Any, geometry: BaseGeometry) -> None:
    saved = save_adapter()
    (saved.directory / "adapter_model.safetensors").rename(saved.directory / "adapter_model.bin")
    [(kind, subject, text)] = rejection(saved.directory, geometry)
    assert (kind, subject) == ("UNSUPPORTED_FILE", "adapter_model.bin")
    assert "is a pickle" in text


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(name: str, save_adapter: Any, geometry: BaseGeometry) -> None:
    saved = save_adapter()
    (saved.directory / name).unlink()
    with pytest.raises(SourceNotFoundError, match=f"has no {name}"):
        import_peft(saved.directory, geometry)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "not valid JSON"),
        (b'{"r": 4', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "JSON holds a list where an object belongs"),
        (b'{"r": 4, "r": 8}', "key 'r' stands there twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b" " * (1 << 20) + b"{}", "the limit is 1048576"),
    ],
    ids=["empty", "cut", "not UTF-8", "a list", "a key twice", "deep", "huge"],
)
def test_a_malformed_configuration_is_corruption(content: bytes, found: str, save_adapter: Any, geometry: BaseGeometry) -> None:
    saved = save_adapter()
    (saved.directory / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterCorruptError, match=r"adapter_config\.json") as caught:
        import_peft(saved.directory, geometry)
    assert found in caught.value.found


def test_an_expression_that_would_take_years_is_ended(
    save_adapter: Any, geometry: BaseGeometry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapter_store.peft_patterns.MATCH_TIMEOUT_S", 0.5)
    saved = save_adapter()
    saved.change_config(rank_pattern={r"([a-z_.0-9]*)*X": 4})
    [(kind, subject, text)] = rejection(saved.directory, geometry)
    assert (kind, subject) == ("INVALID_VALUE", "rank_pattern")
    assert "takes longer than" in text


def test_another_base_is_refused_though_its_modules_have_the_same_names(save_adapter: Any, geometry: BaseGeometry) -> None:
    saved = save_adapter(target_modules=["down_proj"])
    rewrite(saved.directory, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.2." in name])
    assert [(kind, subject) for kind, subject, _ in rejection(saved.directory, geometry)] == [
        ("MISSING_TENSOR", "model.layers.2.mlp.down_proj.lora_A"),
        ("MISSING_TENSOR", "model.layers.2.mlp.down_proj.lora_B"),
    ]
