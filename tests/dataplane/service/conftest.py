"""A small Llama with PEFT adapters of it in a store."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from adapter_store.image_store import ImageStore
from adapter_store.peft_import import import_peft
from dataplane.config import DataPlaneConfig
from dataplane.model.checkpoint import fingerprint
from dataplane.model.config import load_model_config
from tests.dataplane.service.served import VOCAB, Served

ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 3, "target_modules": ["q_proj", "v_proj"]},
    "all": {
        "r": 8,
        "lora_alpha": 32,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    },
    "mixed": {"r": 4, "target_modules": ["o_proj", "down_proj"], "rank_pattern": {"down_proj": 16}},
}


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """What every data plane here serves; made once, as no test changes it."""
    root = tmp_path_factory.mktemp("served")
    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(shape).save_pretrained(root / "tiny-llama")
    config = DataPlaneConfig(
        model_dir=root / "tiny-llama",
        store_dir=root / "store",
        listen=(f"unix:{root}/dp.sock",),
        device="cpu",
        num_pages=24,
        token_budget=16,
        max_num_seqs=8,
    )
    model_config = load_model_config(config.model_dir)
    geometry = model_config.geometry("float32", config.max_lora_rank, config.model_name, fingerprint(config.model_dir))
    store = ImageStore(config.store_dir)
    digests, adapter_dirs = {}, {}
    for name, options in ADAPTERS.items():
        model = LlamaForCausalLM.from_pretrained(config.model_dir)
        adapter_dirs[name] = root / "adapters" / name
        get_peft_model(model, LoraConfig(init_lora_weights=False, **options)).save_pretrained(adapter_dirs[name])
        digests[name] = store.publish(import_peft(adapter_dirs[name], geometry))
    return Served(config, digests, adapter_dirs)
