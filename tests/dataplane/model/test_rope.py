"""The frequencies of every variant are those of transformers, bit for bit, wherever the file says what it wants."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from dataplane.model.config import parse_model_config
from dataplane.model.rope import inverse_frequencies

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
YARN = {"type": "yarn", "original_max_position_embeddings": 2048}

FIELDS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta outside": {"rope_theta": 77.0, "rope_parameters": {"rope_type": "default"}},
    "theta inside wins": {"rope_theta": 77.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
    "old place wins": {"rope_parameters": {"rope_theta": 7.0}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama3": {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "length outside wins": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "original_max_position_embeddings": 512},
    "yarn": {"rope_scaling": {**YARN, "factor": 4.0}},
    "yarn without a length": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn by another factor": {"rope_scaling": {**YARN, "factor": 3.0}},
    "yarn with one mscale": {"rope_scaling": {**YARN, "factor": 8.0, "mscale": 0.7}},
    "yarn with two": {"rope_scaling": {**YARN, "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "yarn not truncated": {"rope_scaling": {**YARN, "factor": 4.0, "truncate": False, "beta_fast": 16, "beta_slow": 2}},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_frequencies_are_those_of_transformers(fields: dict[str, Any]) -> None:
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SHAPE, **copy.deepcopy(fields)))
    ours = parse_model_config({**SHAPE, **fields, "architectures": ["LlamaForCausalLM"]}, {}, Path("config.json"))
    assert torch.equal(inverse_frequencies(ours.rope, ours.head_dim, torch.device("cpu")), theirs.inv_freq)
    assert ours.rope.attention_factor == theirs.attention_scaling
