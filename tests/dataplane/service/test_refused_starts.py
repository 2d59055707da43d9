"""Settings with which no data plane starts, refused with the numbers."""

from dataclasses import replace
from typing import Any

import pytest

from dataplane.assembly import load_data_plane
from dataplane.errors import DataPlaneError
from tests.dataplane.service.served import Served


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_model_len": 257}, "--max-model-len 257 is over the model's max_position_embeddings 256"),
        ({"token_budget": 7}, "--token-budget 7 is below --max-num-seqs 8"),
        ({"num_pages": 1 << 50}, "which cannot be had; lower --num-pages"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused_with_the_numbers(served: Served, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataPlaneError, match=message):
        load_data_plane(replace(served.config, **change))


def test_limits_that_contradict_each_other_are_refused_before_weights_are_read(served: Served) -> None:
    read: list[int] = []
    with pytest.raises(DataPlaneError, match="--token-budget"):
        load_data_plane(replace(served.config, token_budget=7), lambda bytes_done, bytes_total: read.append(bytes_done))
    assert not read


def test_a_store_that_cannot_be_opened_is_named(served: Served) -> None:
    not_a_directory = served.config.model_dir / "config.json"
    with pytest.raises(DataPlaneError, match=r"--store-dir .*config\.json cannot be opened: File exists"):
        load_data_plane(replace(served.config, store_dir=not_a_directory))
