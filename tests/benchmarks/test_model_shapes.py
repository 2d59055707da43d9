"""The shapes that are measured are what the data plane reads from the directories made for them."""

from pathlib import Path

import pytest

from benchmarks.model_shapes import SHAPES, write_config
from dataplane.model.checkpoint import fingerprint
from dataplane.model.config import load_model_config

# Billions of weights, as published for the models or the paper's variants of them.
BILLIONS = {"llama-7b": 6.74, "llama-13b": 13.02, "llama-30b": 30.4, "llama-70b": 70.3, "llama-3-8b": 8.03}


@pytest.mark.parametrize("name", SHAPES)
def test_a_directory_with_a_shape_alone_is_a_model_to_the_data_plane(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    directory = write_config(shape, tmp_path / "new" / name)
    config = load_model_config(directory)
    linear = sum(s.in_features * s.out_features for s in config.linear_shapes)
    assert config.num_layers * linear + 2 * config.vocab_size * config.hidden_size == shape.num_params
    assert shape.num_params / 1e9 == pytest.approx(BILLIONS[name], rel=0.01)
    assert (config.dtype, config.max_position_embeddings) == ("bfloat16", shape.max_model_len)
    assert fingerprint(directory) != fingerprint(write_config(shape, tmp_path / "other", "float16"))
