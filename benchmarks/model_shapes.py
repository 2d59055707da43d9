"""The shapes of the base models that are measured, and directories that hold such a shape and nothing else.

A directory with a config.json alone is served with random weights: `--model DIR --load-format dummy`. Make one with
`python -m benchmarks.model_shapes llama-7b DIR`. Knows nothing of what is asked of them.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from adapter_store.geometry import LORA_MODULES, BaseGeometry, LinearShape

CONFIG_FILE = "config.json"
# A real model, for its tokenizer.
DEMO_MODEL = Path(__file__).resolve().parent.parent / "examples" / "demo" / "base"
# The linear modules that the paper's adapters change: q, k, v and o.
ATTENTION_MODULES = LORA_MODULES[:4]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder of Llama's architecture. max_model_len: prompt and output of one request."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    max_model_len: int
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        """Elements of one head."""
        return self.hidden_size // self.num_heads

    @property
    def num_params(self) -> int:
        """Weights of the matrices; norms are not counted."""
        kv_dim = self.num_kv_heads * self.head_dim
        layer = self.hidden_size * (2 * self.hidden_size + 2 * kv_dim + 3 * self.intermediate_size)
        return self.num_layers * layer + 2 * self.vocab_size * self.hidden_size


# Settings S1 and S2 of the S-LoRA paper's evaluation, S4, S5 and S6; the last two are not the published models of that size but
# what the paper made of them. M1 is a shape of today, with grouped queries and a large vocabulary.
LLAMA_7B = ModelShape("llama-7b", 32, 4096, 32, 32, 11008, 32000, 2048)
LLAMA_13B = ModelShape("llama-13b", 40, 5120, 40, 40, 13824, 32000, 2048)
LLAMA_30B = ModelShape("llama-30b", 48, 7168, 56, 56, 19456, 32000, 2048)
LLAMA_70B = ModelShape("llama-70b", 80, 8192, 64, 64, 24576, 32000, 2048)
LLAMA_3_8B = ModelShape("llama-3-8b", 32, 4096, 32, 8, 14336, 128256, 8192, 500000.0)
# To try a benchmark itself, on a CPU.
TINY = ModelShape("tiny", 2, 64, 4, 2, 160, 199, 512)

SHAPES = {shape.name: shape for shape in (LLAMA_7B, LLAMA_13B, LLAMA_30B, LLAMA_70B, LLAMA_3_8B, TINY)}


def geometry_of(shape: ModelShape, max_lora_rank: int = 64, dtype: str = "bfloat16") -> BaseGeometry:
    """A base of this shape as adapters and pages see it."""
    hidden, kv_dim, ffn = shape.hidden_size, shape.num_kv_heads * shape.head_dim, shape.intermediate_size
    in_features = (*(hidden,) * 6, ffn)
    out_features = (hidden, kv_dim, kv_dim, hidden, ffn, ffn, hidden)
    return BaseGeometry(
        model_name=shape.name,
        fingerprint=shape.name.encode().hex().ljust(64, "0"),
        dtype=dtype,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        modules=tuple(map(LinearShape, LORA_MODULES, in_features, out_features)),
        max_lora_rank=max_lora_rank,
    )


def write_config(shape: ModelShape, directory: Path, dtype: str = "bfloat16") -> Path:
    """Makes the directory, if need be, with the config.json of the shape, and returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": shape.max_model_len,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return directory


def main() -> int:
    """Writes one directory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_shapes", description="A model directory of a known shape.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    print(write_config(SHAPES[args.shape], args.directory, args.dtype))
    return 0


if __name__ == "__main__":
    sys.exit(main())
