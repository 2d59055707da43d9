"""Both planes in one process, over Unix sockets as always, with the engine at hand to check its books. Knows no load."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import tokenizers

from benchmarks.model_shapes import ModelShape, write_config
from controlplane.app import ControlPlane, serve
from controlplane.config import ControlPlaneConfig
from controlplane.messages import DataPlaneLoad
from controlplane.scheduling import MakeScheduler, Scheduler
from dataplane.assembly import load_data_plane
from dataplane.config import DataPlaneConfig, LoadFormat
from dataplane.model.config import load_model_config
from dataplane.parts import Parts
from dataplane.service.server import DataPlaneServer
from protos.loraplane.v1 import inference_pb2_grpc

# The host cache holds this many times what the pool does: adapters fall out of it too, and are read from the store again.
HOST_POOLS = 2
CONNECT_TIMEOUT_S = 30.0
IDLE_TIMEOUT_S = 120.0
IDLE_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class PlaneOptions:
    """What the data plane is told, as in its configuration. parts, make_scheduler: what a baseline replaces, in either plane."""

    device: str
    dtype: str
    num_pages: int
    max_num_seqs: int
    token_budget: int
    max_lora_rank: int
    parts: Parts = field(default_factory=Parts)
    make_scheduler: MakeScheduler = Scheduler


class SoakService:
    """Both planes as a client sees them, over one channel, and what the control plane knows of the data plane."""

    def __init__(self, control_plane: ControlPlane, channel: grpc.aio.Channel) -> None:
        self._control_plane = control_plane
        self.channel = channel
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)

    def load(self) -> DataPlaneLoad:
        """Of the data plane, as of its latest report."""
        (load,) = self._control_plane.dispatcher.load().data_planes
        return load

    async def wait_idle(self) -> None:
        """Waits until nothing runs or waits and no page holds KV.

        Raises:
            TimeoutError: that never happened.
        """
        async with asyncio.timeout(IDLE_TIMEOUT_S):
            while True:
                load = self._control_plane.dispatcher.load()
                (plane,) = load.data_planes
                if plane.connected and not load.num_running and not load.num_waiting and not plane.pool.kv_pages:
                    return
                await asyncio.sleep(IDLE_POLL_S)


@asynccontextmanager
async def serve_both(root: Path, shape: ModelShape, options: PlaneOptions) -> AsyncIterator[SoakService]:
    """Serves a model of random weights while the context is open; then stops both planes and checks every page.

    root: of everything that they write. Adapters may be registered from under it.

    Raises:
        AssertionError: at the end, a page, an adapter or a request is not where the books say.
    """
    model_dir = write_config(shape, root / "model", options.dtype)
    _save_tokenizer(model_dir)
    store_dir = root / "state" / "images"
    store_dir.mkdir(parents=True)
    geometry = load_model_config(model_dir).geometry(options.dtype, options.max_lora_rank, shape.name, "")
    config = DataPlaneConfig(
        model_dir,
        store_dir,
        (f"unix:{root}/dp",),
        device=options.device,
        dtype=options.dtype,
        num_pages=options.num_pages,
        max_num_seqs=options.max_num_seqs,
        token_budget=options.token_budget,
        max_lora_rank=options.max_lora_rank,
        host_cache_bytes=HOST_POOLS * options.num_pages * geometry.page_bytes,
        load_format=LoadFormat.DUMMY,
    )
    data_plane = load_data_plane(config, parts=options.parts)
    server = DataPlaneServer(data_plane, config.listen, config.stop_timeout_s)
    await server.start()
    try:
        front = ControlPlaneConfig(model_dir, config.listen, root / "state", (f"unix:{root}/cp",), adapter_roots=(root,))
        async with (
            serve(front, options.make_scheduler) as control_plane,
            grpc.aio.insecure_channel(control_plane.address) as channel,
        ):
            if not await control_plane.dispatcher.wait_connected(CONNECT_TIMEOUT_S):
                raise TimeoutError(f"the data plane did not connect within {CONNECT_TIMEOUT_S:g} s")
            yield SoakService(control_plane, channel)
    finally:
        await server.stop()
    # The engine checks itself when it ends, but in its own thread; this one is heard.
    data_plane.engine.check_integrity()
    assert data_plane.engine.num_running == 0, f"{data_plane.engine.num_running} requests run on after the end"


def _save_tokenizer(model_dir: Path) -> None:
    """One token for each byte. Prompts are token ids here; ids beyond have no text, which nobody reads."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(model_dir / "tokenizer.json"))
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
