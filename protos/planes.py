"""What crosses between the planes, as dataclasses, with the one conversion to and from protobuf that both planes use.

Knows nothing about scheduling or memory: it is the vocabulary in which the two planes speak (`data_plane.proto`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from google.protobuf import duration_pb2

from protos.loraplane.v1 import data_plane_pb2 as pb


class EngineFinishReason(Enum):
    """Why the engine ended a request by itself."""

    EOS = pb.ENGINE_FINISH_REASON_EOS
    STOP_TOKEN = pb.ENGINE_FINISH_REASON_STOP_TOKEN
    LENGTH = pb.ENGINE_FINISH_REASON_LENGTH
    ADAPTER_FAILED = pb.ENGINE_FINISH_REASON_ADAPTER_FAILED
    REJECTED = pb.ENGINE_FINISH_REASON_REJECTED


class AdapterPlace(Enum):
    """Where an adapter lies in a data plane."""

    NONE = pb.ADAPTER_PLACE_NONE
    FETCHING = pb.ADAPTER_PLACE_FETCHING
    HOST = pb.ADAPTER_PLACE_HOST
    DEVICE = pb.ADAPTER_PLACE_DEVICE
    FAILED = pb.ADAPTER_PLACE_FAILED


@dataclass(frozen=True, slots=True)
class EngineSampling:
    """How the engine chooses tokens; every default filled in, every value already validated."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A request in full, as it joins the batch. `token_ids` is the prompt, then `num_output_tokens` tokens of output so far."""

    request_key: int
    request_id: str
    token_ids: tuple[int, ...]
    num_output_tokens: int
    adapter_digest: str
    sampling: EngineSampling


@dataclass(frozen=True, slots=True)
class BatchUpdate:
    """Changes to the standing set, applied whole between two steps: abort, admit, prefetch, pinned (None = unchanged)."""

    sequence: int
    abort: tuple[int, ...] = ()
    admit: tuple[AdmittedRequest, ...] = ()
    prefetch: tuple[str, ...] | None = None
    pinned: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Hello:
    """Opens a session with the data plane that started with this epoch."""

    session_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class StepLogprobs:
    """Natural-log probabilities of one sampled token and of the most likely alternatives, best first."""

    logprob: float
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A request that ended in this step; its pages are free."""

    request_key: int
    reason: EngineFinishReason
    error: str = ""


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """An adapter is now elsewhere. `num_pages` counts device pages, `size_bytes` its bytes in that place."""

    digest: str
    place: AdapterPlace
    num_pages: int = 0
    size_bytes: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class AdapterReady:
    """A request's adapter is in place, `wait_s` seconds after the request's admission."""

    request_key: int
    wait_s: float


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """Pages by use. `idle_adapter_pages` is the part of `adapter_pages` that can be reclaimed at once."""

    kv_pages: int = 0
    adapter_pages: int = 0
    idle_adapter_pages: int = 0
    free_pages: int = 0


@dataclass(frozen=True, slots=True)
class StepTiming:
    """What a step was; `duration_s` is 0 for a report between steps."""

    num_steps: int = 0
    duration_s: float = 0.0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineState:
    """Everything a data plane holds when a session opens."""

    epoch: int
    held_request_keys: tuple[int, ...] = ()
    adapters: tuple[AdapterEvent, ...] = ()


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did. `token_ids[i]` was sampled for `request_keys[i]`; `logprobs` maps the keys that asked for them."""

    sequence: int
    applied_update: int
    request_keys: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: Mapping[int, StepLogprobs] = field(default_factory=dict)
    finished: tuple[FinishedRequest, ...] = ()
    starved: tuple[int, ...] = ()
    adapter_events: tuple[AdapterEvent, ...] = ()
    adapter_ready: tuple[AdapterReady, ...] = ()
    pool: PoolCounts = PoolCounts()
    timing: StepTiming = StepTiming()
    state: EngineState | None = None


def duration_from_seconds(seconds: float) -> duration_pb2.Duration:
    """Seconds as a protobuf Duration, rounded to the nanosecond."""
    nanos = round(seconds * 1e9)
    sign = -1 if nanos < 0 else 1
    whole, rest = divmod(abs(nanos), 1_000_000_000)
    return duration_pb2.Duration(seconds=sign * whole, nanos=sign * rest)


def duration_to_seconds(duration: duration_pb2.Duration) -> float:
    """A protobuf Duration as seconds."""
    return duration.seconds + duration.nanos / 1e9


def hello_to_proto(hello: Hello) -> pb.RunRequest:
    """The first message of a session."""
    return pb.RunRequest(hello=pb.Hello(session_id=hello.session_id, epoch=hello.epoch))


def update_to_proto(update: BatchUpdate) -> pb.RunRequest:
    """A batch update as it goes over the wire."""
    message = pb.BatchUpdate(sequence=update.sequence, abort=update.abort, admit=[_admit_to_proto(a) for a in update.admit])
    if update.prefetch is not None:
        message.prefetch.CopyFrom(pb.AdapterList(digests=update.prefetch))
    if update.pinned is not None:
        message.pinned.CopyFrom(pb.AdapterList(digests=update.pinned))
    return pb.RunRequest(update=message)


def run_request_from_proto(message: pb.RunRequest) -> Hello | BatchUpdate:
    """What a control plane sent.

    Raises:
        ValueError: the message is neither a hello nor an update.
    """
    kind = message.WhichOneof("message")
    if kind == "hello":
        return Hello(session_id=message.hello.session_id, epoch=message.hello.epoch)
    if kind != "update":
        raise ValueError("RunRequest must carry hello or update; neither is set")
    update = message.update
    return BatchUpdate(
        sequence=update.sequence,
        abort=tuple(update.abort),
        admit=tuple(_admit_from_proto(a) for a in update.admit),
        prefetch=tuple(update.prefetch.digests) if update.HasField("prefetch") else None,
        pinned=tuple(update.pinned.digests) if update.HasField("pinned") else None,
    )


def reports_to_proto(reports: Sequence[StepReport]) -> pb.RunResponse:
    """Step reports as they go over the wire, oldest first."""
    return pb.RunResponse(reports=[_report_to_proto(report) for report in reports])


def reports_from_proto(response: pb.RunResponse) -> tuple[StepReport, ...]:
    """What a data plane reported, oldest first.

    Raises:
        ValueError: there is no report, packed arrays differ in length, or an enum holds a value this version does not know.
    """
    if not response.reports:
        raise ValueError("RunResponse must carry at least one report")
    return tuple(_report_from_proto(report) for report in response.reports)


def _report_to_proto(report: StepReport) -> pb.StepReport:
    message = pb.StepReport(
        sequence=report.sequence,
        applied_update=report.applied_update,
        request_keys=report.request_keys,
        token_ids=report.token_ids,
        logprobs=[
            pb.StepLogprobs(request_key=key, logprob=lp.logprob, top_token_ids=lp.top_token_ids, top_logprobs=lp.top_logprobs)
            for key, lp in report.logprobs.items()
        ],
        finished=[
            pb.FinishedRequest(request_key=f.request_key, reason=pb.EngineFinishReason.ValueType(f.reason.value), error=f.error)
            for f in report.finished
        ],
        starved=report.starved,
        adapter_events=[_event_to_proto(event) for event in report.adapter_events],
        adapter_ready=[
            pb.AdapterReady(request_key=r.request_key, wait=duration_from_seconds(r.wait_s)) for r in report.adapter_ready
        ],
        pool=pb.PoolCounts(
            kv_pages=report.pool.kv_pages,
            adapter_pages=report.pool.adapter_pages,
            idle_adapter_pages=report.pool.idle_adapter_pages,
            free_pages=report.pool.free_pages,
        ),
        timing=pb.StepTiming(
            num_steps=report.timing.num_steps,
            duration=duration_from_seconds(report.timing.duration_s),
            num_prefill_tokens=report.timing.num_prefill_tokens,
            num_decode_tokens=report.timing.num_decode_tokens,
        ),
    )
    if report.state is not None:
        message.state.CopyFrom(
            pb.EngineState(
                epoch=report.state.epoch,
                held_request_keys=report.state.held_request_keys,
                adapters=[_event_to_proto(event) for event in report.state.adapters],
            )
        )
    return message


def _report_from_proto(message: pb.StepReport) -> StepReport:
    if len(message.request_keys) != len(message.token_ids):
        raise ValueError(
            f"report {message.sequence}: {len(message.request_keys)} request_keys but {len(message.token_ids)} token_ids"
        )
    state = None
    if message.HasField("state"):
        state = EngineState(
            epoch=message.state.epoch,
            held_request_keys=tuple(message.state.held_request_keys),
            adapters=tuple(_event_from_proto(event) for event in message.state.adapters),
        )
    return StepReport(
        sequence=message.sequence,
        applied_update=message.applied_update,
        request_keys=tuple(message.request_keys),
        token_ids=tuple(message.token_ids),
        logprobs={
            lp.request_key: StepLogprobs(lp.logprob, tuple(lp.top_token_ids), tuple(lp.top_logprobs)) for lp in message.logprobs
        },
        finished=tuple(FinishedRequest(f.request_key, EngineFinishReason(f.reason), f.error) for f in message.finished),
        starved=tuple(message.starved),
        adapter_events=tuple(_event_from_proto(event) for event in message.adapter_events),
        adapter_ready=tuple(AdapterReady(r.request_key, duration_to_seconds(r.wait)) for r in message.adapter_ready),
        pool=PoolCounts(
            message.pool.kv_pages, message.pool.adapter_pages, message.pool.idle_adapter_pages, message.pool.free_pages
        ),
        timing=StepTiming(
            message.timing.num_steps,
            duration_to_seconds(message.timing.duration),
            message.timing.num_prefill_tokens,
            message.timing.num_decode_tokens,
        ),
        state=state,
    )


def _admit_to_proto(request: AdmittedRequest) -> pb.AdmittedRequest:
    s = request.sampling
    return pb.AdmittedRequest(
        request_key=request.request_key,
        request_id=request.request_id,
        token_ids=request.token_ids,
        num_output_tokens=request.num_output_tokens,
        adapter_digest=request.adapter_digest,
        sampling=pb.EngineSampling(
            max_tokens=s.max_tokens,
            min_tokens=s.min_tokens,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            seed=s.seed,
            repetition_penalty=s.repetition_penalty,
            presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty,
            stop_token_ids=s.stop_token_ids,
            ignore_eos=s.ignore_eos,
            num_logprobs=s.num_logprobs,
        ),
    )


def _admit_from_proto(message: pb.AdmittedRequest) -> AdmittedRequest:
    s = message.sampling
    return AdmittedRequest(
        request_key=message.request_key,
        request_id=message.request_id,
        token_ids=tuple(message.token_ids),
        num_output_tokens=message.num_output_tokens,
        adapter_digest=message.adapter_digest,
        sampling=EngineSampling(
            max_tokens=s.max_tokens,
            min_tokens=s.min_tokens,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            seed=s.seed,
            repetition_penalty=s.repetition_penalty,
            presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty,
            stop_token_ids=tuple(s.stop_token_ids),
            ignore_eos=s.ignore_eos,
            num_logprobs=s.num_logprobs if s.HasField("num_logprobs") else None,
        ),
    )


def _event_to_proto(event: AdapterEvent) -> pb.AdapterEvent:
    return pb.AdapterEvent(
        digest=event.digest,
        place=pb.AdapterPlace.ValueType(event.place.value),
        num_pages=event.num_pages,
        size_bytes=event.size_bytes,
        error=event.error,
    )


def _event_from_proto(message: pb.AdapterEvent) -> AdapterEvent:
    return AdapterEvent(message.digest, AdapterPlace(message.place), message.num_pages, message.size_bytes, message.error)
