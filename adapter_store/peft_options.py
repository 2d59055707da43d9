"""What every option of a PEFT LoRA configuration means here: applied, without effect on serving, or refused by name.

Knows the options of PEFT up to 0.21. Reading the values of the applied ones is `peft_config`'s work.
"""

from collections.abc import Mapping

from adapter_store.errors import shorten
from adapter_store.violations import ViolationList

APPLIED = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "base_model_name_or_path",
        "init_lora_weights",
    }
)

# Bookkeeping, training, and settings of initializations: with the weights at hand they change nothing.
WITHOUT_EFFECT = frozenset(
    {
        "task_type",
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
        "ensure_weight_tying",
    }
)

# Refused unless off; why.
REFUSED = {
    "use_dora": "DoRA rescales the base's weights, which is not applied here; train with use_dora=False",
    "modules_to_save": "whole trained modules are not applied here; only LoRA on the linear modules is",
    "bias": "trained biases are not applied here; train with bias='none'",
    "lora_bias": "a bias in lora_B is not applied here; train with lora_bias=False",
    "fan_in_fan_out": "the weights are for Conv1D modules; this base has linear modules",
    "trainable_token_indices": "trained token embeddings are not applied here",
    "target_parameters": "LoRA on parameters that are not linear modules is not applied here",
    "layer_replication": "replicated layers change the base model",
    "megatron_config": "Megatron's parallel modules are not those of this base",
    "alora_invocation_tokens": "activated LoRA (aLoRA) applies the adapter to some tokens only, which is not done here",
    "use_qalora": "QA-LoRA pools the input of lora_A, which is not done here",
    "use_bdlora": "block-diagonal LoRA is not applied here",
    "monteclora_config": "MonteCLoRA samples its weights, which is not done here",
    "arrow_config": "Arrow routes between adapters by token, which is not done here",
    "kasa_config": "KaSA changes the base's weights",
    "velora_config": "VeLoRA is not applied here",
}

# Ways to initialize that leave the base model as it is, so that the saved weights are a plain LoRA.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")


def check_options(fields: Mapping[str, object], violations: ViolationList) -> None:
    """Notes every option that cannot be honoured."""
    peft_type = fields.get("peft_type")
    if peft_type != "LORA":
        violations.add("UNSUPPORTED_PEFT_TYPE", "peft_type", f"is {_show(peft_type)}; only LORA is served")
    for name, value in fields.items():
        if name in REFUSED and not _is_off(name, value):
            violations.add("UNSUPPORTED_OPTION", name, f"is {_show(value)}: {REFUSED[name]}")
        elif name not in REFUSED and name not in APPLIED and name not in WITHOUT_EFFECT and value:
            violations.add("UNKNOWN_OPTION", name, f"is {_show(value)}: this option is not known, so it cannot be honoured")
    _check_init(fields.get("init_lora_weights", True), violations)


def _is_off(name: str, value: object) -> bool:
    """Whether the option has no effect; an empty token list of aLoRA still switches it on."""
    if name == "alora_invocation_tokens":
        return value is None
    return not value or (name == "bias" and value == "none")


def _check_init(value: object, violations: ViolationList) -> None:
    """Other initializations (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) trained against a base with other weights."""
    if isinstance(value, bool) or value is None or (isinstance(value, str) and value.lower() in PLAIN_INITS):
        return
    violations.add(
        "UNSUPPORTED_OPTION",
        "init_lora_weights",
        f"is {_show(value)}: it changes the base's weights at the start of training, or is not known; convert the adapter with "
        "save_pretrained(path_initial_model_for_weight_conversion=...)",
    )


def _show(value: object) -> str:
    return shorten(repr(value))
