"""Who runs and who waits: pure logic without I/O, time passed in. Never sees a page number, only page counts."""

from controlplane.scheduling.policy import FcfsPolicy
from controlplane.scheduling.request import Request, RequestState
from controlplane.scheduling.scheduler import MakeScheduler, Schedule, Scheduler, SchedulerConfig
from controlplane.scheduling.step_events import EndedRequest, SampledTokens, StepEvents

__all__ = [
    "EndedRequest",
    "FcfsPolicy",
    "MakeScheduler",
    "Request",
    "RequestState",
    "SampledTokens",
    "Schedule",
    "Scheduler",
    "SchedulerConfig",
    "StepEvents",
]
