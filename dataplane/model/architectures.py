"""The decoder architectures that are served, and what every field of their config.json means here.

A field is read, or has no effect on inference, or is refused by name unless it holds a neutral value; there is no fourth kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class SlidingWindow(Enum):
    """How an architecture says which layers attend to a window only."""

    NEVER = "never"
    EVERY_LAYER = "every layer"
    BY_LAYER = "by layer"


@dataclass(frozen=True, slots=True)
class Architecture:
    """What distinguishes one architecture, and the defaults that transformers gives to fields that a file leaves out.

    qkv_bias: q, k and v always have a bias, whatever the file says.
    optional_fields: fields that this architecture reads and others do not.
    """

    model_type: str
    default_num_kv_heads: int | None
    default_head_dim: int | None
    default_eos_token_id: int | None
    qkv_bias: bool
    qk_norm: bool
    sliding_window: SlidingWindow
    optional_fields: frozenset[str]


_WINDOW_FIELDS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers"})

ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        "llama", None, None, 2, False, False, SlidingWindow.NEVER, frozenset({"attention_bias", "mlp_bias"})
    ),
    "MistralForCausalLM": Architecture(
        "mistral", 8, None, 2, False, False, SlidingWindow.EVERY_LAYER, frozenset({"sliding_window"})
    ),
    "Qwen2ForCausalLM": Architecture("qwen2", 32, None, None, True, False, SlidingWindow.BY_LAYER, _WINDOW_FIELDS),
    "Qwen3ForCausalLM": Architecture(
        "qwen3", 32, 128, None, False, True, SlidingWindow.BY_LAYER, _WINDOW_FIELDS | {"attention_bias"}
    ),
}

# Read for every architecture.
READ_FIELDS = frozenset(
    {
        "architectures",
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "rms_norm_eps",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "tie_word_embeddings",
        "dtype",
        "torch_dtype",
        "eos_token_id",
        "layer_types",
    }
)

# Harmless with one of these values (or null), a change of the computation otherwise.
NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "tie_encoder_decoder": (False,),
    "quantization_config": (),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "chunk_size_feed_forward": (0,),
    "auto_map": ({},),
}

# Training, bookkeeping of the file, and defaults of text generation (those come with each request).
_IRRELEVANT_TEXT = """
    _name_or_path name_or_path _commit_hash _attn_implementation _attn_implementation_autoset attn_implementation
    transformers_version transformers.js_config unsloth_version unsloth_fixed unsloth_training_args is_llama_config
    initializer_range attention_dropout hidden_dropout embd_pdrop resid_pdrop pretraining_tp use_cache
    gradient_checkpointing use_flash_attn use_bfloat16 torchscript tf_legacy_loss
    output_attentions output_hidden_states return_dict return_dict_in_generate output_scores
    bos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix
    id2label label2id num_labels problem_type finetuning_task task_specific_params max_window_layers
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens
"""
IRRELEVANT_FIELDS = frozenset(_IRRELEVANT_TEXT.split())


def is_neutral(name: str, value: object) -> bool:
    """Whether a field that is not computed holds a value that asks for nothing."""
    return value is None or value in NEUTRAL_VALUES[name]
