"""Builds a data plane from its configuration: model, pool, residency and engine, wired together. Serves nothing yet."""

import os
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

import torch

from adapter_store.errors import HostMemoryError
from adapter_store.host_cache import HostCache
from adapter_store.image_store import ImageStore
from dataplane.config import DataPlaneConfig
from dataplane.engine.admission import EngineLimits
from dataplane.engine.engine import Engine
from dataplane.engine.inbox import Inbox
from dataplane.errors import DataPlaneError
from dataplane.loading import BaseModel, LoadedModel, load_model, read_base_model
from dataplane.memory.adapter_copy import TensorCopier
from dataplane.memory.residency import MAX_FETCHES_AHEAD
from dataplane.model.weights import Progress
from dataplane.parts import Parts
from protos.loraplane.v1 import data_plane_pb2 as pb

# Threads that read adapters from the store, each of them busy with hashing. Half of the cores are left to the rest; with fewer
# than MAX_FETCHES_AHEAD, what a request waits for would queue behind what it does not.
NUM_FETCH_WORKERS = max(MAX_FETCHES_AHEAD, min(8, (os.cpu_count() or 1) // 2))


@dataclass(frozen=True, slots=True)
class DataPlane:
    """A loaded model and its engine, whose thread has not been started."""

    inbox: Inbox
    engine: Engine
    host_cache: HostCache
    description: pb.DescribeResponse

    def start_engine(self, on_failure: Callable[[], None]) -> threading.Thread:
        """Starts the engine's thread. It is a daemon: a step that hangs must not keep a process alive that was told to end."""
        thread = threading.Thread(target=self.engine.run, args=(on_failure,), name="engine", daemon=True)
        thread.start()
        return thread


def load_data_plane(config: DataPlaneConfig, progress: Progress | None = None, parts: Parts | None = None) -> DataPlane:
    """Loads the model and sizes the pool; takes as long as reading the weights does.

    Raises:
        DataPlaneError, ModelError, PoolTooSmallError: it cannot be served; the message says why.
    """
    parts = parts or Parts()
    store = _open_store(config)
    base = read_base_model(config)
    inbox = Inbox()
    with ThreadPoolExecutor(1, thread_name_prefix="host-cache") as beside:
        # Page-locking takes a third of a second a GiB, about as long as the model takes.
        host_memory = beside.submit(_open_host_cache, config, store, base, inbox)
        loaded = load_model(config, base, progress, parts)
        host_cache = host_memory.result()
    epoch = secrets.randbits(63)
    copier = TensorCopier(loaded.pool)
    pages, residency = parts.memory(loaded.geometry, loaded.limits.num_pages, host_cache, copier, inbox.put_fetched)
    limits = replace(loaded.limits, num_pages=pages.num_pages)
    engine = Engine(inbox, loaded.runner(residency.adapter), pages, residency, limits, epoch, config.orphan_grace_s)
    return DataPlane(inbox, engine, host_cache, _describe(config, loaded, limits, epoch))


def _open_host_cache(config: DataPlaneConfig, store: ImageStore, base: BaseModel, inbox: Inbox) -> HostCache:
    try:
        return HostCache(
            store,
            base.geometry,
            config.host_cache_bytes,
            num_workers=NUM_FETCH_WORKERS,
            pin_memory=base.device.type == "cuda",
            on_evict=inbox.put_evicted,
        )
    except HostMemoryError as error:
        raise DataPlaneError(str(error)) from error


def _open_store(config: DataPlaneConfig) -> ImageStore:
    """Before the model is loaded, which may take minutes that a wrong path should not cost."""
    try:
        return ImageStore(config.store_dir)
    except OSError as error:
        raise DataPlaneError(f"--store-dir {config.store_dir} cannot be opened: {error.strerror}") from error


def _describe(config: DataPlaneConfig, loaded: LoadedModel, limits: EngineLimits, epoch: int) -> pb.DescribeResponse:
    model, geometry, device = loaded.config, loaded.geometry, loaded.device
    return pb.DescribeResponse(
        epoch=epoch,
        version=_version(),
        model=pb.ModelDescription(
            name=geometry.model_name,
            fingerprint=geometry.fingerprint,
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            num_layers=geometry.num_layers,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            dtype=geometry.dtype,
            modules=[
                pb.LinearModule(name=m.name, in_features=m.in_features, out_features=m.out_features) for m in geometry.modules
            ],
        ),
        pool=pb.PoolDescription(num_pages=limits.num_pages, page_tokens=geometry.page_tokens, page_elems=geometry.page_elems),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        max_num_seqs=limits.max_num_seqs,
        token_budget=limits.token_budget,
        max_model_len=limits.max_model_len,
        max_lora_rank=config.max_lora_rank,
        host_cache_bytes=config.host_cache_bytes,
    )


def _version() -> str:
    try:
        return version("loraplane")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"
