"""A directory that holds a config.json and nothing else is served: with random weights, by token ids."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from benchmarks.model_shapes import ModelShape, write_config
from dataplane.config import LoadFormat
from protos.loraplane.v1 import inference_pb2 as pb

SHAPE = ModelShape("tiny", 2, 64, 4, 2, 160, 199, 512)


def test_a_shape_alone_is_served_by_token_ids(run_service: Callable[..., None], tmp_path: Path) -> None:
    async def scenario(service: Any) -> None:
        answer = await service.generate("", (5, 6, 7), max_tokens=9, ignore_eos=True)
        assert len(answer.token_ids) == 9 and answer.text == ""
        again = await service.generate("", (5, 6, 7), max_tokens=9, ignore_eos=True)
        assert again.token_ids == answer.token_ids
        for refused in (
            pb.GenerateRequest(text="hello"),
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5]), sampling=pb.SamplingParams(stop=["x"])),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await service.stream(refused)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "this model has no tokenizer" in str(caught.value.details())

    directory = write_config(SHAPE, tmp_path / "shape", dtype="float32")
    model = SimpleNamespace(base=directory, adapters={})
    assert sorted(path.name for path in directory.iterdir()) == ["config.json"]
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == SHAPE.vocab_size
    run_service(model, scenario, load_format=LoadFormat.DUMMY)
