"""What other systems get wrong in silence, at the level of the whole service: an adapter answers as peft says, or not at all."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import torch
from google.protobuf import field_mask_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from safetensors.torch import load_file, save_file

from adapter_store.image_store import ImageStore
from protos.loraplane.v1 import adapter_pb2
from tests.waiting import until

if TYPE_CHECKING:
    from tests.e2e.conftest import Answer, Prompt, Service, TinyModel

    Build = Callable[..., TinyModel]
    Greedy = Callable[[TinyModel, Sequence[Prompt], int], list[tuple[int, ...]]]

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
RANKS = (2, 8, 12, 16)
PROMPT = (5, 6, 7, 8)
MAX_TOKENS = 40

# Options of LoraConfig, and those of them whose neglect would go unnoticed: the weights keep their shapes.
SCALINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "rslora": ({"r": 8, "use_rslora": True}, ("use_rslora",)),
    "alpha": ({"r": 4, "alpha_pattern": {"q_proj": 40, r"layers\.1\.mlp\.up_proj": 1}}, ("alpha_pattern",)),
    "rank": ({"r": 4, "rank_pattern": {"v_proj": 16, r"layers\.0\.mlp\.down_proj": 1}, "lora_alpha": 24}, ()),
    "all": (
        {
            "r": 6,
            "use_rslora": True,
            "rank_pattern": {"k_proj": 3, r"layers\.1\.self_attn\.q_proj": 11},
            "alpha_pattern": {"gate_proj": 30},
        },
        ("use_rslora", "alpha_pattern"),
    ),
    "one-layer": ({"r": 8, "target_modules": ["o_proj", "up_proj"], "layers_to_transform": [1]}, ()),
}


def _rewrite_config(directory: Path, field: str, value: object) -> None:
    """Sets a field of the configuration; None takes it out."""
    config = json.loads((directory / CONFIG).read_text())
    config.pop(field, None)
    if value is not None:
        config[field] = value
    (directory / CONFIG).write_text(json.dumps(config))


def test_scalings_and_patterns_of_peft_are_honoured_in_one_batch(
    tmp_path: Path, build_model: "Build", save_adapter: Callable[..., Path], reference_greedy: "Greedy", run_service: Any
) -> None:
    base = build_model("llama", RANKS)
    model = type(base)(base.base, {})
    neglected = type(base)(base.base, {})
    for seed, (name, (options, fields)) in enumerate(SCALINGS.items()):
        model.adapters[name] = save_adapter(base, tmp_path / "adapters" / name, seed=seed, **options)
        for field in fields:
            copy = save_adapter(base, tmp_path / "neglected" / f"{name}-{field}", seed=seed, **options)
            _rewrite_config(copy, field, None)
            neglected.adapters[f"{name}-{field}"] = copy
    prompts = [(name, (9, *PROMPT[: number % 4 + 1])) for name in ("", *model.adapters) for number in range(2)]
    expected = reference_greedy(model, prompts, MAX_TOKENS)
    for name in neglected.adapters:
        (wrong,) = reference_greedy(neglected, [(name, (9, 5))], MAX_TOKENS)
        assert wrong != expected[prompts.index((name.partition("-")[0], (9, 5)))], f"{name} makes no difference"

    async def scenario(service: "Service") -> None:
        await service.register_all()
        answers = await service.generate_all(prompts, max_tokens=MAX_TOKENS)
        for prompt, answer, want in zip(prompts, answers, expected, strict=True):
            assert tuple(answer.token_ids) == want, prompt

    run_service(model, scenario, token_budget=80)


def test_a_new_version_takes_over_while_requests_of_the_old_one_run(
    build_model: "Build", reference_greedy: "Greedy", run_service: Any
) -> None:
    model = build_model("llama", RANKS)
    (old_name, old), (new_name, new) = list(model.adapters.items())[1:3]
    num_long = 300
    by_old, by_new = reference_greedy(model, [(old_name, PROMPT), (new_name, PROMPT)], 40)
    (old_long,) = reference_greedy(model, [(old_name, (9, 9))], num_long)
    assert by_old != by_new

    async def scenario(service: "Service") -> None:
        first = await service.register("voice", old)
        running = asyncio.create_task(service.generate("voice", (9, 9), max_tokens=num_long))
        await until(lambda: service.kv_pages() >= 2)
        source = adapter_pb2.AdapterSource(path=str(new))
        request = adapter_pb2.UpdateAdapterRequest(
            name="voice", source=source, update_mask=field_mask_pb2.FieldMask(paths=["source"])
        )
        second = (await service.adapters.UpdateAdapter(request)).adapter
        assert not running.done()
        # Of both versions and the base, in one batch with the request that was there before.
        names = ("voice", f"voice@{first.current.version}", f"voice@{second.current.version[:8]}", "voice")
        answers = await asyncio.gather(*(service.generate(name, PROMPT, max_tokens=40) for name in names))
        assert [tuple(answer.token_ids) for answer in answers] == [by_new, by_old, by_new, by_new]
        long = await running
        assert tuple(long.token_ids) == old_long
        assert _version(long) == first.current.version != _version(answers[0]) == second.current.version
        # Back again: the old weights, and not what lies where they were.
        request = adapter_pb2.UpdateAdapterRequest(
            name="voice",
            current_version=first.current.version,
            update_mask=field_mask_pb2.FieldMask(paths=["current_version"]),
        )
        await service.adapters.UpdateAdapter(request)
        assert tuple((await service.generate("voice", PROMPT, max_tokens=40)).token_ids) == by_old

    # Too few pages for both versions and the requests at once, so that weights are loaded where others lay. Steps take long
    # enough for the update to come while the first request runs.
    run_service(model, scenario, num_pages=36, extra_step_s=0.01)


def test_a_name_registered_anew_answers_with_the_new_weights_alone(
    build_model: "Build", reference_greedy: "Greedy", run_service: Any
) -> None:
    model = build_model("llama", RANKS)
    (old_name, old), (new_name, new) = list(model.adapters.items())[1:3]
    by_old, by_new = reference_greedy(model, [(old_name, (9, 9)), (new_name, (9, 9))], 200)

    async def scenario(service: "Service") -> None:
        await service.register("voice", old)
        running = asyncio.create_task(service.generate("voice", (9, 9), max_tokens=200))
        await until(lambda: service.kv_pages() >= 2)
        removed = await service.adapters.UnregisterAdapter(adapter_pb2.UnregisterAdapterRequest(name="voice"))
        assert removed.adapter.state == adapter_pb2.ADAPTER_STATE_DRAINING
        error = await _refused(service.generate("voice", (9, 9), max_tokens=1))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        await service.register("voice", new)
        anew = await service.generate("voice", (9, 9), max_tokens=200)
        assert tuple(anew.token_ids) == by_new
        assert tuple((await running).token_ids) == by_old

    run_service(model, scenario, extra_step_s=0.01)


def test_a_slow_first_load_and_an_unknown_adapter_hold_up_nobody(
    build_model: "Build", reference_greedy: "Greedy", run_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("llama", RANKS)
    slow, quick = list(model.adapters)[2:]
    prompts = [("", PROMPT), (quick, PROMPT), ("", (9, 10)), (slow, PROMPT)]
    expected = reference_greedy(model, prompts, 60)
    slow_digests: set[str] = set()
    may_read = threading.Event()
    read = ImageStore.read

    def read_slowly(store: ImageStore, digest: str, *args: Any, **kwargs: Any) -> Any:
        if digest in slow_digests:
            assert may_read.wait(60)
        return read(store, digest, *args, **kwargs)

    monkeypatch.setattr(ImageStore, "read", read_slowly)

    async def scenario(service: "Service") -> None:
        await service.register_all()
        slow_digests.add((await service.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name=slow))).adapter.current.version)
        waits = [asyncio.create_task(service.generate(slow, PROMPT, max_tokens=60)) for _ in range(2)]
        await _until_state(service, slow, adapter_pb2.ADAPTER_STATE_FETCHING)
        unknown = await _refused(service.generate("nobody", PROMPT, max_tokens=1))
        assert (unknown.code(), "'nobody'" in (unknown.details() or "")) == (grpc.StatusCode.NOT_FOUND, True)
        others = await service.generate_all(prompts[:3], max_tokens=60)
        assert [tuple(answer.token_ids) for answer in others] == expected[:3]
        assert not any(task.done() for task in waits)
        may_read.set()
        for answer in await asyncio.gather(*waits):
            assert tuple(answer.token_ids) == expected[3]
            assert answer.started is not None and answer.started.adapter_wait_time.ToNanoseconds() > 0
            assert answer.finished is not None
            assert answer.finished.timings.adapter_wait_time.ToNanoseconds() > 0
        await _until_state(service, slow, adapter_pb2.ADAPTER_STATE_READY)

    run_service(model, scenario, control_plane={"idle_prefetch": False})


def test_a_registered_adapter_comes_to_the_device_before_anybody_asks_for_it(
    build_model: "Build", reference_greedy: "Greedy", run_service: Any
) -> None:
    model = build_model("llama", RANKS)
    adapters = list(model.adapters)
    expected = reference_greedy(model, [(name, PROMPT) for name in adapters], 30)

    async def scenario(service: "Service") -> None:
        await service.register_all()
        for name in adapters:
            await _until_state(service, name, adapter_pb2.ADAPTER_STATE_READY)
        for name, tokens in zip(adapters, expected, strict=True):
            answer = await service.generate(name, PROMPT, max_tokens=30)
            assert tuple(answer.token_ids) == tokens

    run_service(model, scenario)


def test_an_adapter_whose_numbers_overflow_fails_alone(
    tmp_path: Path, build_model: "Build", save_adapter: Callable[..., Path], reference_greedy: "Greedy", run_service: Any
) -> None:
    model = build_model("llama", RANKS)
    huge = save_adapter(model, tmp_path / "huge", seed=1)
    _tensors(lambda t: t.update({name: tensor * 1e30 for name, tensor in t.items()}))(huge)
    (expected,) = reference_greedy(model, [("", PROMPT)], 60)

    async def scenario(service: "Service") -> None:
        await service.register("huge", huge)
        running = asyncio.create_task(service.generate("", PROMPT, max_tokens=60))
        error = await _refused(service.generate("huge", PROMPT, max_tokens=60))
        assert error.code() is CORRUPT
        assert "adapter 'huge' cannot be used: no token can be chosen at position 4" in (error.details() or "")
        assert tuple((await running).token_ids) == expected

    run_service(model, scenario, control_plane={"adapter_roots": (tmp_path,)})


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return edit


def _config(field: str, value: object) -> Callable[[Path], None]:
    return lambda directory: _rewrite_config(directory, field, value)


def _cut(name: str, end: int) -> Callable[[Path], None]:
    def cut(directory: Path) -> None:
        (directory / name).write_bytes((directory / name).read_bytes()[:end])

    return cut


def _remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def _pickle(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")


LAYER0 = "base_model.model.model.layers.0"
Q_A = f"{LAYER0}.self_attn.q_proj.lora_A.weight"
REFUSED = grpc.StatusCode.FAILED_PRECONDITION
CORRUPT = grpc.StatusCode.DATA_LOSS
MISSING = grpc.StatusCode.NOT_FOUND

# What is done to a sound adapter; the status; words of the message: what is wrong, the value and the limit.
BROKEN: dict[str, tuple[Callable[[Path], None], grpc.StatusCode, tuple[str, ...]]] = {
    "a module that the base lacks": (
        _tensors(lambda t: t.update({f"{LAYER0}.self_attn.c_attn.lora_A.weight": t[Q_A].clone()})),
        REFUSED,
        ("self_attn.c_attn.lora_A.weight", "matches no module"),
    ),
    "a layer that the base lacks": (
        _tensors(lambda t: t.update({Q_A.replace("layers.0", "layers.2"): t[Q_A].clone()})),
        REFUSED,
        ("layers.2.self_attn.q_proj", "2 layers, 0 to 1"),
    ),
    "a target that the base lacks": (_config("target_modules", ["q_proj", "c_attn"]), REFUSED, ("c_attn", "q_proj, k_proj")),
    "a tensor that is not targeted": (
        _config("target_modules", ["q_proj"]),
        REFUSED,
        ("down_proj.lora_A.weight", "does not select"),
    ),
    "half of a pair": (_tensors(lambda t: t.pop(Q_A)), REFUSED, ("layers.0.self_attn.q_proj.lora_A", "lacks it")),
    "another shape": (
        _tensors(lambda t: t.update({Q_A: torch.zeros(8, 65)})),
        REFUSED,
        ("q_proj.lora_A.weight", "[8, 65]", "[8, 64]"),
    ),
    "a rank that the weights lack": (_config("r", 4), REFUSED, ("[8, 64]", "rank 4", "[4, 64]")),
    "a dtype": (
        _tensors(lambda t: t.update({Q_A: torch.zeros(8, 64, dtype=torch.int8)})),
        REFUSED,
        ("q_proj.lora_A.weight", "dtype I8", "F32"),
    ),
    "a weight that is not finite": (
        _tensors(lambda t: t[Q_A].__setitem__((3, 5), torch.nan)),
        CORRUPT,
        ("q_proj.lora_A.weight", "nan at [3, 5]"),
    ),
    "DoRA": (_config("use_dora", True), REFUSED, ("use_dora",)),
    "modules_to_save": (_config("modules_to_save", ["lm_head"]), REFUSED, ("modules_to_save", "lm_head")),
    "bias": (_config("bias", "all"), REFUSED, ("bias", "all")),
    "another PEFT type": (_config("peft_type", "IA3"), REFUSED, ("peft_type", "IA3")),
    "an option of the future": (_config("use_telepathy", True), REFUSED, ("use_telepathy",)),
    "a rank over the limit": (_config("r", 65), REFUSED, ("rank 65", "max_lora_rank of 64")),
    "weights cut short": (_cut(WEIGHTS, -100), CORRUPT, (WEIGHTS,)),
    "a header cut short": (_cut(WEIGHTS, 50), CORRUPT, (WEIGHTS, "50")),
    "no weights": (_cut(WEIGHTS, 0), CORRUPT, (WEIGHTS,)),
    "a configuration cut short": (_cut(CONFIG, 20), CORRUPT, (CONFIG,)),
    "a pickle": (_pickle, REFUSED, ("adapter_model.bin", "pickle")),
    "no configuration": (_remove(CONFIG), MISSING, (CONFIG,)),
    "no weights file": (_remove(WEIGHTS), MISSING, (WEIGHTS,)),
}


def test_what_cannot_be_applied_is_refused_by_name_and_leaves_nothing(
    tmp_path: Path, build_model: "Build", save_adapter: Callable[..., Path], reference_greedy: "Greedy", run_service: Any
) -> None:
    model = build_model("llama", RANKS)
    broken = {}
    for number, (what, (damage, _, _)) in enumerate(BROKEN.items()):
        broken[what] = save_adapter(model, tmp_path / "adapters" / str(number), seed=1)
        damage(broken[what])
    (expected,) = reference_greedy(model, [("", PROMPT)], 400)

    async def scenario(service: "Service") -> None:
        running = asyncio.create_task(service.generate("", PROMPT, max_tokens=400))
        for what, (_, code, words) in BROKEN.items():
            error = await _refused(service.register("broken", broken[what]))
            assert error.code() is code, (what, error)
            status = rpc_status.from_call(error)
            assert status is not None, what
            for word in words:
                assert word in (error.details() or ""), (what, word, error.details())
            kinds = {detail.TypeName().rpartition(".")[2] for detail in status.details}
            assert "ErrorInfo" in kinds, what
            if code is REFUSED:
                assert "PreconditionFailure" in kinds, what
            if code is CORRUPT:
                info = error_details_pb2.ErrorInfo()
                assert next(detail for detail in status.details if detail.Unpack(info))
                assert info.metadata["file"].endswith((WEIGHTS, CONFIG)) and info.metadata["found"], what
        listed = await service.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest())
        assert listed.total_size == 0
        assert list(service.store_dir.iterdir()) == []
        assert tuple((await running).token_ids) == expected

    run_service(model, scenario, control_plane={"adapter_roots": (tmp_path,)})


def _version(answer: "Answer") -> str:
    assert answer.started is not None
    return answer.started.adapter_version


async def _refused(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def _until_state(service: "Service", name: str, state: "adapter_pb2.AdapterState.ValueType") -> None:
    """Waits as a client would: a watch tells each change of state."""
    async with asyncio.timeout(60):
        async for event in service.adapters.WatchAdapters(adapter_pb2.WatchAdaptersRequest()):
            if event.adapter.name == name and event.adapter.state == state:
                return
