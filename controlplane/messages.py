"""What the parts of the control plane say to one another: requests, their outcomes, data planes and load.

Imports only the types at the bottom (geometry, wire dataclasses, errors); knows nothing of gRPC, queues or text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from adapter_store.geometry import BaseGeometry
from controlplane.errors import ServiceError
from protos.planes import AdapterPlace, EngineSampling, PoolCounts, StepLogprobs


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One immutable version of an adapter: the name it was asked for by, its content digest, its pages in the pool."""

    name: str
    digest: str
    num_pages: int


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """A validated request for one choice. Deadlines are absolute, on the dispatcher's monotonic clock; None is no limit.

    `sampling` has every default filled in; a larger `priority` is served first.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    adapter: AdapterRef | None
    sampling: EngineSampling
    priority: int = 0
    deadline: float | None = None
    ttft_deadline: float | None = None
    tenant: str = "default"


class FinishReason(Enum):
    """Why a request ended."""

    EOS = "eos"
    STOP_TOKEN = "stop_token"  # the last token given to on_tokens is the one that matched
    LENGTH = "length"
    STOPPED = "stopped"  # on_tokens returned True
    ABORTED = "aborted"  # by the server while it ran, such as at the end of a drain
    ERROR = "error"  # RequestOutcome.error says what to tell the client


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """How a request ended and where its time went. `error` is set exactly when the reason is ERROR."""

    reason: FinishReason
    error: ServiceError | None = None
    queue_s: float = 0.0
    adapter_wait_s: float = 0.0
    num_preemptions: int = 0


class TokenSink(Protocol):
    """Takes one request's tokens as they are made. Called on the event loop, never concurrently; must neither block nor raise.

    Order: on_started once, on_tokens as tokens come, on_finished once and last. A request that fails before it runs gets
    on_finished alone. After `Dispatcher.abort` the sink is not called again.
    """

    def on_started(self, queue_s: float, adapter_wait_s: float) -> None:
        """The request runs: how long it waited for a place in the batch, and since then for its adapter's weights."""

    def on_tokens(self, token_ids: Sequence[int], logprobs: Sequence[StepLogprobs]) -> bool:
        """The next tokens, with one entry of logprobs for each if the request asked for them.

        True ends the request within these tokens: the sink has dropped those past its stop, no more come, and on_finished says
        STOPPED.
        """

    def on_finished(self, outcome: RequestOutcome) -> None:
        """The request ended."""


@dataclass(frozen=True, slots=True)
class DataPlaneDescription:
    """What one start of a data plane is (see DescribeResponse)."""

    epoch: int
    version: str
    geometry: BaseGeometry
    architecture: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_pages: int
    device: str
    max_num_seqs: int
    token_budget: int
    max_model_len: int
    host_cache_bytes: int = 0


class AdapterResidency(NamedTuple):
    """Where an adapter lies in one data plane, or why it does not.

    `last_used` is seconds since the Unix epoch, None if no request used it there; `error` is set where the place is FAILED.
    """

    address: str
    place: AdapterPlace
    size_bytes: int
    last_used: float | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """An adapter on a device and how many running requests use it."""

    digest: str
    num_pages: int
    num_requests: int


@dataclass(frozen=True, slots=True)
class DataPlaneLoad:
    """The load of one data plane as of its latest report. `description` is None until it connected for the first time."""

    address: str
    connected: bool
    description: DataPlaneDescription | None = None
    num_running: int = 0
    pool: PoolCounts = field(default_factory=PoolCounts)
    adapters: tuple[ResidentAdapter, ...] = ()
    num_steps: int = 0
    last_step_s: float = 0.0
    total_step_s: float = 0.0
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class LoadSnapshot:
    """How busy the service is. `output_tokens_per_s` is over the last ten seconds."""

    num_waiting: int
    num_running: int
    data_planes: tuple[DataPlaneLoad, ...]
    output_tokens_per_s: float
    draining: bool


@dataclass(frozen=True, slots=True)
class DrainResult:
    """How a drain ended: requests that finished by themselves, and those aborted at the timeout."""

    num_finished: int
    num_aborted: int


@dataclass(frozen=True, slots=True)
class DoesNotFit:
    """Why a request can never run: pages it needs at its longest, and pages that the largest data plane can give it."""

    kv_pages: int
    adapter_pages: int
    available_pages: int
