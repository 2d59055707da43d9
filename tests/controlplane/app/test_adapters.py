"""Adapters of a whole control plane: registered from a directory, answering requests, failing, and taken away."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import save_file

from controlplane.text.tokenizer import Tokenizer
from protos.loraplane.v1 import adapter_pb2, system_pb2
from tests.controlplane.app.served import NULL, Client, refused, sampling
from tests.waiting import until


def save_adapter(directory: Path) -> None:
    """A PEFT adapter of rank 2 on q_proj of the null data plane's base."""
    directory.mkdir(parents=True)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{prefix}.lora_A.weight": torch.ones(2, 8), f"{prefix}.lora_B.weight": torch.ones(8, 2)},
        directory / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "null"}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def test_a_registered_adapter_answers_by_name_version_and_alias(play: Callable[..., None], tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    save_adapter(root / "tiny")

    async def scenario(client: Client) -> None:
        source = adapter_pb2.AdapterSource(path=str(root / "tiny"))
        registered = await client.adapters.RegisterAdapter(
            adapter_pb2.RegisterAdapterRequest(name="tiny", source=source, aliases=["small"])
        )
        version = registered.adapter.current.version
        for name in ("tiny", f"tiny@{version}", f"tiny@{version[:8]}", "small"):
            answer = await client.generate(text="x", adapter=name, sampling=sampling(max_tokens=6, seed=3))
            assert (answer.started.adapter, answer.started.adapter_version) == ("tiny", version)
            assert answer.token_ids[0] == client.expected("x", 3, 6, version)
        load = await client.system.GetLoad(system_pb2.GetLoadRequest())
        assert [(list(a.names), a.version) for a in load.data_planes[0].adapters] == [(["tiny"], version)]
        code, _, _ = await refused(client.generate(text="x" * 300, adapter="tiny"))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert client.app.directory.num_leases(version) == 0

    play(scenario, adapter_roots=(root,))


def test_an_adapter_that_cannot_be_loaded_fails_its_own_requests_alone(play: Callable[..., None], tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    save_adapter(root / "tiny")

    async def scenario(client: Client) -> None:
        source = adapter_pb2.AdapterSource(path=str(root / "tiny"))
        registered = await client.adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(name="tiny", source=source))
        digest = registered.adapter.current.version
        client.null.engine.config = replace(client.null.engine.config, broken_adapters=frozenset({digest}))
        base = asyncio.create_task(client.generate(text="x", sampling=sampling(max_tokens=50, seed=0)))
        code, message, details = await refused(client.generate(text="x", adapter="tiny", sampling=sampling(n=2)))
        assert code is grpc.StatusCode.DATA_LOSS
        assert "broken" in message
        assert details["ErrorInfo"].reason == "ADAPTER_LOAD_FAILED"
        assert (details["ErrorInfo"].metadata["adapter"], details["ErrorInfo"].metadata["found"]) == ("tiny", "broken")
        assert (await base).token_ids[0] == client.expected("x", 0, 50)
        assert client.app.directory.num_leases(digest) == 0

    play(scenario, adapter_roots=(root,))


def test_a_forced_unregister_aborts_the_adapter_s_requests(play: Callable[..., None], tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    save_adapter(root / "tiny")

    async def scenario(client: Client) -> None:
        source = adapter_pb2.AdapterSource(path=str(root / "tiny"))
        await client.adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(name="tiny", source=source))
        base = asyncio.create_task(client.generate(text="x", sampling=sampling(max_tokens=60, seed=0)))
        call = asyncio.create_task(client.generate(text="x", adapter="tiny", sampling=sampling(max_tokens=250)))
        engine = client.null.engine
        await until(lambda: engine.counts.adapter_pages > engine.counts.idle_adapter_pages)
        await client.adapters.UnregisterAdapter(adapter_pb2.UnregisterAdapterRequest(name="tiny", force=True))
        code, _, details = await refused(call)
        assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.ABORTED, "ADAPTER_REMOVED")
        assert (await base).token_ids[0] == client.expected("x", 0, 60)

    play(scenario, replace(NULL, step_s=0.02), adapter_roots=(root,))


def test_a_forced_unregister_aborts_a_request_that_is_still_being_tokenized(
    play: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "adapters"
    save_adapter(root / "tiny")
    began, may_end = asyncio.Event(), asyncio.Event()

    async def slowly(self: Tokenizer, text: str) -> tuple[int, ...]:
        began.set()
        await may_end.wait()
        return self.encode(text, add_special_tokens=True)

    monkeypatch.setattr(Tokenizer, "encode_text", slowly)

    async def scenario(client: Client) -> None:
        source = adapter_pb2.AdapterSource(path=str(root / "tiny"))
        await client.adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(name="tiny", source=source))
        call = asyncio.create_task(client.generate(text="x", adapter="tiny", sampling=sampling(max_tokens=2)))
        await began.wait()
        await client.adapters.UnregisterAdapter(adapter_pb2.UnregisterAdapterRequest(name="tiny", force=True))
        may_end.set()
        code, _, details = await refused(call)
        assert (code, details["ErrorInfo"].reason) == (grpc.StatusCode.ABORTED, "ADAPTER_REMOVED")
        client.app.directory.check_integrity()

    play(scenario, adapter_roots=(root,))
