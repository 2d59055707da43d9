"""A whole data plane on the CPU, with its steps launched ahead of their tokens as on a GPU: it must say what it says without."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from adapter_store.dummy_adapter import DummyAdapter, build_dummy
from adapter_store.image import AdapterImage
from dataplane.config import DataPlaneConfig, LoadFormat
from dataplane.engine.engine import Engine
from dataplane.engine.inbox import Inbox, SessionOpened, UpdateReceived
from dataplane.loading import LoadedModel, load_model, read_base_model
from dataplane.memory.adapter_copy import TensorCopier
from dataplane.memory.host_images import FetchResult
from dataplane.memory.page_pool import PagePool
from dataplane.memory.residency import Residency
from protos.planes import AdmittedRequest, BatchUpdate, EngineSampling, StepLogprobs

if TYPE_CHECKING:
    from tests.dataplane.conftest import FakeSink

# Room for all requests, and for adapters as long as they are needed.
NUM_PAGES = 60
MODULES = ("q_proj", "v_proj", "o_proj", "down_proj")
EVERYTHING = EngineSampling(
    max_tokens=20,
    min_tokens=5,
    temperature=0.9,
    top_p=0.9,
    top_k=40,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.5,
    frequency_penalty=0.2,
    seed=5,
    num_logprobs=3,
)
SAMPLINGS = (
    EngineSampling(max_tokens=25, num_logprobs=0),
    EngineSampling(max_tokens=1),
    EVERYTHING,
    replace(EVERYTHING, seed=6, stop_token_ids=tuple(range(100))),
    EngineSampling(max_tokens=17, repetition_penalty=1.5),
    EngineSampling(max_tokens=30, temperature=1.0, seed=9),
)


class Images:
    """Host memory that holds every image."""

    def __init__(self, images: Sequence[AdapterImage]) -> None:
        self._images = {image.digest: image for image in images}

    def fetch(self, digest: str, on_done: Callable[[str, FetchResult], None]) -> None:
        on_done(digest, self._images[digest])

    def get(self, digest: str) -> AdapterImage | None:
        return self._images[digest]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A small model with random weights."""
    directory = tmp_path_factory.mktemp("model")
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 200,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(fields))
    config = DataPlaneConfig(
        directory,
        directory,
        (),
        device="cpu",
        dtype="float32",
        num_pages=NUM_PAGES,
        max_num_seqs=8,
        token_budget=24,
        load_format=LoadFormat.DUMMY,
    )
    return load_model(config, read_base_model(config))


Said = dict[int, list[tuple[int, StepLogprobs | None]]]


def _run(loaded: LoadedModel, sink: FakeSink, images: Sequence[AdapterImage], arrivals: Sequence[AdmittedRequest]) -> Said:
    """All that is said of the requests, one of which arrives every other turn."""
    inbox, pool = Inbox(), PagePool(NUM_PAGES)
    loaded.pool.zero_()
    residency = Residency(pool, Images(images), TensorCopier(loaded.pool), inbox.put_fetched)
    engine = Engine(inbox, loaded.runner(residency.adapter), pool, residency, loaded.limits, 1, 30.0)
    inbox.put(SessionOpened(sink))
    for i in range(400):
        if i % 2 == 0 and i // 2 < len(arrivals):
            inbox.put(UpdateReceived(sink, BatchUpdate(1 + i // 2, (), (arrivals[i // 2],))))
        engine.turn(may_wait=False)
        engine.check_integrity()
    assert engine.num_running == 0
    assert not any(report.starved for report in sink.reports), "the pool is large enough for all"
    said: Said = {}
    for report in sink.reports:
        for key, token_id in zip(report.request_keys, report.token_ids, strict=True):
            said.setdefault(key, []).append((token_id, report.logprobs.get(key)))
    return said


def test_what_is_launched_ahead_says_what_is_said_step_by_step(loaded: LoadedModel, make_sink: type[FakeSink]) -> None:
    images = [build_dummy(DummyAdapter(rank, MODULES, seed=rank), loaded.geometry) for rank in (2, 5, 8)]
    arrivals = [
        AdmittedRequest(i, f"request-{i}", tuple(range(3, 6 + 7 * i)), 0, digest, SAMPLINGS[i % len(SAMPLINGS)])
        for i, digest in enumerate(["", *(image.digest for image in images * 2), ""])
    ]
    expected, found = (_run(replace(loaded, runs_ahead=ahead), make_sink(), images, arrivals) for ahead in (False, True))
    assert [len(said) for said in expected.values()][:2] == [25, 1]
    assert found.keys() == expected.keys() == set(range(len(arrivals)))
    for key, said in expected.items():
        assert [token_id for token_id, _ in found[key]] == [token_id for token_id, _ in said]
        for (_, mine), (_, theirs) in zip(found[key], said, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
                assert mine.top_token_ids == theirs.top_token_ids
