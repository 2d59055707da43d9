"""The committed demo, loaded once with transformers and peft."""

from pathlib import Path
from typing import Any

import pytest
import torch

from examples.train_demo import DEMO_DIR, RECIPES

# mypy sees nothing of transformers and peft (pyproject.toml), hence Any at this edge.
Model = Any


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    """Where the committed files are."""
    return DEMO_DIR


@pytest.fixture(scope="session")
def demo_model(demo_dir: Path) -> Model:
    """The base in float32 with all adapters attached; `set_adapter` or `disable_adapter` picks the voice."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    base = LlamaForCausalLM.from_pretrained(demo_dir / "base", dtype=torch.float32)
    first, *others = RECIPES
    model = PeftModel.from_pretrained(base, demo_dir / "adapters" / first, adapter_name=first)
    for name in others:
        model.load_adapter(demo_dir / "adapters" / name, adapter_name=name)
    return model.eval()
