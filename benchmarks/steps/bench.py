"""A loaded model whose pool is full of random KV and adapters, and requests in the middle of their output: what steps run on.

Everything that computes is the data plane's own; only where requests and adapters come from is made up. Times nothing.
"""

import itertools
import random
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapter_store.dummy_adapter import DummyAdapter, build_dummy
from adapter_store.geometry import BaseGeometry
from adapter_store.image import AdapterImage
from adapter_store.packing import pack_rows
from benchmarks.model_shapes import ModelShape, write_config
from benchmarks.steps.recorder import RecordingModel
from dataplane.config import DataPlaneConfig, LoadFormat
from dataplane.engine.request_state import RequestState
from dataplane.engine.step_packer import StepPacker
from dataplane.loading import load_model, read_base_model
from dataplane.memory.adapter_copy import TensorCopier
from dataplane.memory.adapter_states import Readiness
from dataplane.memory.page_pool import PageKind, PageOwner, PagePool
from dataplane.parts import Parts
from dataplane.runner.model_runner import TorchModelRunner
from kernels.lora import LoraAdapter
from protos.planes import AdmittedRequest, EngineSampling

GREEDY = EngineSampling(max_tokens=1 << 20, ignore_eos=True)
# Of random keys and values; what matters is that they are not zero, at which memory and arithmetic are faster.
KV_STD = 0.5


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """num_tokens: KV that all requests hold at once at most. ranks: of all adapters, which stay where they are.

    num_places: rooms in the pool for one more adapter of the largest rank, to be loaded while steps run.
    """

    device: str
    dtype: str
    max_num_seqs: int
    token_budget: int
    num_tokens: int
    modules: tuple[str, ...]
    ranks: tuple[int, ...] = ()
    num_places: int = 0


class StepBench:
    """Owns the model, its pool's books and the adapters in it, by digest."""

    def __init__(self, shape: ModelShape, options: BenchOptions, parts: Parts) -> None:
        with tempfile.TemporaryDirectory() as directory:
            model_dir = write_config(shape, Path(directory) / shape.name, options.dtype)
            config = DataPlaneConfig(
                model_dir,
                model_dir,
                (),
                device=options.device,
                dtype=options.dtype,
                max_num_seqs=options.max_num_seqs,
                token_budget=options.token_budget,
                max_lora_rank=max(options.ranks, default=64),
                load_format=LoadFormat.DUMMY,
            )
            base = read_base_model(config)
            num_pages = _num_pages(base.geometry, options)
            self.loaded = load_model(replace(config, num_pages=num_pages), base, parts=parts)
        for layer in self.loaded.pool:
            layer.normal_(std=KV_STD)
        self.modules = options.modules
        self.pages = PagePool(self.loaded.limits.num_pages)
        self.recorder = RecordingModel(self.loaded.model)
        self.adapters: dict[str, LoraAdapter] = {}
        loaded, limits = self.loaded, self.loaded.limits
        self.runner = TorchModelRunner(
            self.recorder,
            loaded.pool,
            loaded.buffers,
            loaded.sampler,
            limits.page_tokens,
            self.adapters.__getitem__,
            loaded.runs_ahead,
        )
        self.packer = StepPacker(self.pages, _AllResident(self.pages), limits.page_tokens, limits.token_budget)
        self._numbers = itertools.count(1)
        self._requests: dict[int, RequestState] = {}
        self._digests: dict[int, list[str]] = {}
        self.images: dict[int, AdapterImage] = {}
        self.copier = TensorCopier(self.loaded.pool)
        self._place_adapters(options.ranks)
        num_pages = self.images[max(options.ranks)].num_pages if options.num_places else 0
        self.places = [self._allocate(f"place-{i}", num_pages) for i in range(options.num_places)]

    def digests(self, rank: int, count: int) -> list[str]:
        """The first so many adapters of a rank."""
        found = self._digests[rank][:count]
        assert len(found) == count, f"{count} adapters of rank {rank}, but there are {len(found)}"
        return found

    def adapter_bytes(self, digests: Iterable[str]) -> int:
        """Of the weights of all these adapters, in all layers."""
        geometry, num_elems = self.loaded.geometry, 0
        for name, rows in (item for digest in digests for item in self.adapters[digest].modules.items()):
            shape = geometry.module(name)
            assert shape is not None
            num_elems += rows.rank * (shape.in_features + shape.out_features)
        return num_elems * geometry.num_layers * geometry.dtype_bytes

    def decoding(self, num_tokens: int, digest: str = "", sampling: EngineSampling = GREEDY) -> RequestState:
        """A request whose next token has this many before it, all of them in KV."""
        request = self.waiting(num_tokens, digest, sampling)
        request.launch(num_tokens)
        request.append(1)
        return request

    def waiting(self, num_tokens: int, digest: str = "", sampling: EngineSampling = GREEDY) -> RequestState:
        """A request of which nothing is computed."""
        key = next(self._numbers)
        rng, vocab_size = random.Random(key), self.loaded.limits.vocab_size
        token_ids = tuple(rng.choices(range(vocab_size), k=num_tokens))
        admitted = AdmittedRequest(key, f"request-{key}", token_ids, 0, digest, sampling)
        # One more than is computed, or a prompt of the greatest length would be full.
        request = self._requests[key] = RequestState(admitted, 0.0, self.loaded.limits.max_model_len + 1)
        return request

    def free(self, request: RequestState) -> None:
        """Its pages come free."""
        del self._requests[request.request_key]
        self.pages.free(request.page_table.tolist(), request.owner)

    def free_all(self) -> None:
        """The pages of all requests come free: of those that a failure left behind."""
        for request in list(self._requests.values()):
            self.free(request)

    def _place_adapters(self, ranks: Sequence[int]) -> None:
        """Adapters of one rank have the same numbers, each in pages of its own: to the device they are different."""
        images = self.images
        for number, rank in enumerate(ranks):
            if rank not in images:
                image = build_dummy(DummyAdapter(rank, self.modules, seed=rank), self.loaded.geometry)
                images[rank] = replace(image, pages=image.pages.pin_memory()) if self.loaded.pool.is_cuda else image
            digest = f"rank-{rank}-{number}"
            copy = self.copier.start(images[rank], self._allocate(digest, images[rank].num_pages))
            copy.wait()
            self.adapters[digest] = copy.adapter
            self._digests.setdefault(rank, []).append(digest)

    def _allocate(self, name: str, num_pages: int) -> tuple[int, ...]:
        pages = self.pages.allocate(num_pages, PageOwner(PageKind.ADAPTER, name))
        assert pages is not None, "the pool was made too small for the adapters"
        return pages


class _AllResident:
    """Adapters as the packer sees them when all are on the device and none may be evicted."""

    num_idle_pages = 0

    def __init__(self, pages: PagePool) -> None:
        self._pages = pages

    def prepare(self, digest: str, may_allocate: bool) -> Readiness:
        """There."""
        return Readiness.READY

    def reclaim(self, num_pages: int) -> bool:
        """Only what is free is free."""
        return self._pages.num_free >= num_pages


def _num_pages(geometry: BaseGeometry, options: BenchOptions) -> int:
    """Pages for the KV and the adapters. Each request may waste most of a page."""
    num_kv = geometry.num_kv_pages(options.num_tokens) + options.max_num_seqs
    ranks = (*options.ranks, *(max(options.ranks, default=0),) * options.num_places)
    return num_kv + sum(num_adapter_pages(geometry, options.modules, rank) for rank in ranks)


def num_adapter_pages(geometry: BaseGeometry, modules: Sequence[str], rank: int) -> int:
    """Pages that an adapter takes."""
    return pack_rows(dict.fromkeys(modules, rank), geometry).num_pages
