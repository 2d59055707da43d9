"""Whom each unfinished request's tokens go to, and what happens when such a sink fails. Knows nothing of scheduling."""

import asyncio
import logging
from collections.abc import Sequence

from controlplane.errors import InternalError
from controlplane.messages import FinishReason, RequestOutcome, TokenSink
from controlplane.scheduling import EndedRequest, Request
from protos.planes import StepLogprobs

_log = logging.getLogger(__name__)


class Sinks:
    """The sinks of all unfinished requests. A sink that raises is a bug; it ends its own request and no other."""

    def __init__(self) -> None:
        self._sinks: dict[Request, TokenSink] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._sinks)

    def add(self, request: Request, sink: TokenSink) -> None:
        """From here on the sink hears of the request."""
        self._sinks[request] = sink
        self._idle.clear()

    def forget(self, request: Request) -> None:
        """From here on it does not."""
        self._sinks.pop(request, None)
        if not self._sinks:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Waits until no request is unfinished."""
        await self._idle.wait()

    def start(self, request: Request) -> bool:
        """Tells that the request runs. Returns whether its sink failed."""
        sink = self._sinks.get(request)
        if sink is None:
            return False
        try:
            sink.on_started(request.queue_s, request.adapter_wait_s)
        except Exception:
            return self._fail(request, sink)
        return False

    def tokens(self, request: Request, token_ids: Sequence[int], logprobs: Sequence[StepLogprobs]) -> FinishReason | None:
        """Hands over new tokens. Returns why the request should end now, if it should."""
        sink = self._sinks.get(request)
        if sink is None:
            return None
        try:
            return FinishReason.STOPPED if sink.on_tokens(token_ids, logprobs) else None
        except Exception:
            self._fail(request, sink)
            return FinishReason.ERROR

    def finish(self, ended: EndedRequest) -> None:
        """Tells how a request ended; its sink hears nothing after that."""
        sink = self._sinks.get(ended.request)
        self.forget(ended.request)
        if sink is None:
            return
        try:
            sink.on_finished(ended.outcome)
        except Exception:
            _log.exception("sink failed at the end request=%s", ended.request.spec.request_id)

    def _fail(self, request: Request, sink: TokenSink) -> bool:
        request_id = request.spec.request_id
        _log.exception("sink failed request=%s", request_id)
        error = InternalError(f"request {request_id!r} failed in the service; see its log", metadata={"id": request_id})
        self.finish(EndedRequest(request, RequestOutcome(FinishReason.ERROR, error)))
        return True
