"""Keeps one session with the data plane at one address: describe, run, notice every break, connect again.

Owns the channel, the stream and its sequence numbers. Knows nothing of scheduling: it passes on what it hears.
"""

import asyncio
import logging
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc

from adapter_store.geometry import BaseGeometry, LinearShape
from controlplane.messages import DataPlaneDescription
from protos.loraplane.v1 import data_plane_pb2 as pb
from protos.loraplane.v1 import data_plane_pb2_grpc as pb_grpc
from protos.planes import BatchUpdate, EngineState, Hello, StepReport, hello_to_proto, reports_from_proto, update_to_proto

_log = logging.getLogger(__name__)

# Updates that may wait to be written. A data plane that lets more pile up does not read: the session is given up.
MAX_UNSENT_UPDATES = 1024

_CHANNEL_OPTIONS = (
    # Each attempt has a channel of its own; without this they would share a connection and its backoff.
    ("grpc.use_local_subchannel_pool", 1),
    # The Run stream has no deadline, because it lives as long as both planes do; pings notice a peer that is gone.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Little is read ahead: what the other side still holds reaches us merged, what lies in buffers here would come one by one.
    ("grpc.http2.lookahead_bytes", 4096),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.max_send_message_length", 16 << 20),
)


class SessionBrokenError(Exception):
    """The data plane did what the protocol forbids; the session is closed and opened anew."""


class DataPlaneRefusedError(Exception):
    """This data plane cannot serve beside the others; the message says why."""


class SessionListener(Protocol):
    """Hears of a session's life. Called on the event loop: on_described, on_connected, on_reports..., on_lost, and again.

    Raising ends the session; on_lost follows on_connected in any case.
    """

    def on_described(self, address: str, description: DataPlaneDescription) -> None:
        """What the data plane is. Raises DataPlaneRefusedError to have nothing to do with it."""

    def on_connected(self, address: str, description: DataPlaneDescription, state: EngineState) -> None:
        """The session is open and this is what the data plane holds."""

    def on_reports(self, address: str, reports: Sequence[StepReport]) -> None:
        """Steps were done, oldest first. The session's first report follows on_connected at once."""

    def on_lost(self, address: str) -> None:
        """The session has ended; a new one will be tried."""


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """Times of a session. Attempts go on for ever, `backoff_min_s` apart at first, doubling up to `backoff_max_s`.

    Only a session that lasted `stable_s` starts the backoff anew: a data plane that dies at once, or that another control
    plane takes over each time, is not asked again and again.
    """

    describe_timeout_s: float = 10.0
    hello_timeout_s: float = 30.0
    backoff_min_s: float = 0.1
    backoff_max_s: float = 5.0
    stable_s: float = 5.0


class DataPlaneSession:
    """One address. `start` it once; it reconnects by itself until `close`."""

    def __init__(self, address: str, listener: SessionListener, config: SessionConfig | None = None) -> None:
        self.address = address
        self._listener = listener
        self._config = config or SessionConfig()
        self._outbox: asyncio.Queue[BatchUpdate] = asyncio.Queue(MAX_UNSENT_UPDATES)
        self._call: grpc.aio.StreamStreamCall[pb.RunRequest, pb.RunResponse] | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_connected = False
        self._last_sent = 0

    def start(self) -> None:
        """Begins to connect in the background."""
        self._task = asyncio.get_running_loop().create_task(self._keep_connected(), name=f"session {self.address}")

    async def close(self) -> None:
        """Ends the session; on_lost is called if it was connected."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def send(self, update: BatchUpdate) -> None:
        """Queues an update of the session that is open. Its sequence must be one more than the last one's."""
        assert self._is_connected, f"no session with {self.address}"
        assert update.sequence == self._last_sent + 1, f"update {update.sequence} after {self._last_sent}"
        self._last_sent = update.sequence
        try:
            self._outbox.put_nowait(update)
        except asyncio.QueueFull:
            _log.error("updates pile up address=%s unsent=%d", self.address, self._outbox.qsize())
            if self._call is not None:
                self._call.cancel()

    async def _keep_connected(self) -> None:
        loop = asyncio.get_running_loop()
        backoff_s = self._config.backoff_min_s
        while True:
            started_at = loop.time()
            await self._attempt()
            if loop.time() - started_at >= self._config.stable_s:
                backoff_s = self._config.backoff_min_s
            # Jitter: several control planes must not come back in step.
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, self._config.backoff_max_s)

    async def _attempt(self) -> None:
        """One session from Describe to its end."""
        try:
            async with grpc.aio.insecure_channel(self.address, options=_CHANNEL_OPTIONS) as channel:
                await self._run(pb_grpc.DataPlaneServiceStub(channel))
        except grpc.aio.AioRpcError as error:
            _log.info("session ended address=%s code=%s details=%s", self.address, error.code().name, error.details())
        except DataPlaneRefusedError as error:
            _log.error("data plane refused address=%s reason=%s", self.address, error)
        except (SessionBrokenError, ValueError) as error:
            _log.error("session broken address=%s error=%s", self.address, error)
        except TimeoutError:
            _log.error("session broken address=%s error=no report within %g s", self.address, self._config.hello_timeout_s)
        except Exception:
            # A bug on this side of the stream. The session fails closed and is reconciled, like one that broke over there.
            _log.exception("session failed address=%s", self.address)
        finally:
            was_connected, self._is_connected, self._call = self._is_connected, False, None
            if was_connected:
                self._tell_lost()

    def _tell_lost(self) -> None:
        """A listener that fails must not end the attempts."""
        try:
            self._listener.on_lost(self.address)
        except Exception:
            _log.exception("listener failed address=%s", self.address)

    async def _run(self, stub: "pb_grpc.DataPlaneServiceAsyncStub") -> None:
        response = await stub.Describe(pb.DescribeRequest(), timeout=self._config.describe_timeout_s)
        description = description_from_proto(response)
        self._listener.on_described(self.address, description)
        hello = Hello(session_id=uuid.uuid4().hex, epoch=description.epoch)
        self._outbox, self._last_sent = asyncio.Queue(MAX_UNSENT_UPDATES), 0
        call = self._call = stub.Run(_requests(hello, self._outbox))
        try:
            await self._read(call, hello, description)
        finally:
            call.cancel()

    async def _read(
        self, call: "grpc.aio.StreamStreamCall[pb.RunRequest, pb.RunResponse]", hello: Hello, description: DataPlaneDescription
    ) -> None:
        async with asyncio.timeout(self._config.hello_timeout_s):
            reports = await _next_reports(call)
        first = reports[0]
        if first.state is None or first.state.epoch != description.epoch:
            epoch = first.state.epoch if first.state is not None else None
            raise SessionBrokenError(f"the first report must carry the state of epoch {description.epoch}, it has {epoch}")
        _log.info("session open address=%s session=%s epoch=%d", self.address, hello.session_id, hello.epoch)
        self._is_connected = True  # from here on on_lost is due, even if the listener fails halfway
        self._listener.on_connected(self.address, description, first.state)
        sequence, applied = 0, 0
        while True:
            for report in reports:
                sequence += 1
                if report.sequence != sequence:
                    raise SessionBrokenError(f"report {report.sequence} came where {sequence} was due")
                if not applied <= report.applied_update <= self._last_sent:
                    raise SessionBrokenError(
                        f"report {sequence} applies update {report.applied_update}, not within {applied}..{self._last_sent}"
                    )
                applied = report.applied_update
            self._listener.on_reports(self.address, reports)
            reports = await _next_reports(call)


async def _requests(hello: Hello, outbox: asyncio.Queue[BatchUpdate]) -> AsyncIterator[pb.RunRequest]:
    yield hello_to_proto(hello)
    while True:
        yield update_to_proto(await outbox.get())


async def _next_reports(call: "grpc.aio.StreamStreamCall[pb.RunRequest, pb.RunResponse]") -> tuple[StepReport, ...]:
    response = await call.read()
    if not isinstance(response, pb.RunResponse):
        raise SessionBrokenError("the data plane ended the stream")
    return reports_from_proto(response)


def description_from_proto(message: pb.DescribeResponse) -> DataPlaneDescription:
    """What a data plane says of itself.

    Raises:
        SessionBrokenError: its page geometry is not the one that follows from its model: the versions do not match.
    """
    model = message.model
    geometry = BaseGeometry(
        model_name=model.name,
        fingerprint=model.fingerprint,
        dtype=model.dtype,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        modules=tuple(LinearShape(m.name, m.in_features, m.out_features) for m in model.modules),
        max_lora_rank=message.max_lora_rank,
    )
    theirs, ours = (message.pool.page_tokens, message.pool.page_elems), (geometry.page_tokens, geometry.page_elems)
    if theirs != ours:
        raise SessionBrokenError(
            f"page_tokens, page_elems are {theirs} there and {ours} here: run the same version of both planes"
        )
    return DataPlaneDescription(
        epoch=message.epoch,
        version=message.version,
        geometry=geometry,
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        eos_token_ids=tuple(model.eos_token_ids),
        num_pages=message.pool.num_pages,
        device=message.device,
        max_num_seqs=message.max_num_seqs,
        token_budget=message.token_budget,
        max_model_len=message.max_model_len,
        host_cache_bytes=message.host_cache_bytes,
    )
