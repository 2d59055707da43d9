"""The shapes that are measured are what the data plane reads from the directories made for them."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.model_shapes import LLAMA_3_8B, LLAMA_7B, SHAPES, geometry_of, write_config
from dataplane.model.checkpoint import fingerprint
from dataplane.model.config import load_model_config

# Billions of weights, as published for the models or the paper's variants of them; of the tiny one as counted by hand.
BILLIONS = {"llama-7b": 6.74, "llama-13b": 13.02, "llama-30b": 30.4, "llama-70b": 70.3, "llama-3-8b": 8.03, "tiny": 0.000112}


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


@pytest.mark.parametrize("name", SHAPES)
def test_adapters_see_the_shape_as_the_data_plane_does(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    config = load_model_config(write_config(shape, tmp_path / name))
    expected = config.geometry("bfloat16", 64, shape.name, "")
    assert replace(geometry_of(shape), fingerprint="") == expected


def test_pages_are_those_of_the_paper_s_adapters() -> None:
    base = geometry_of(LLAMA_7B)
    assert (base.page_tokens, base.page_bytes) == (16, 8 << 20)
    # Grouped queries: K and V of a token are a quarter as long, so more tokens share a page in which the longest row fits.
    assert geometry_of(LLAMA_3_8B).page_elems >= LLAMA_3_8B.intermediate_size
