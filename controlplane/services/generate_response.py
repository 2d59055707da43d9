"""Events of a generation as `GenerateResponse` messages: the outgoing half of InferenceService's edge to protobuf."""

from collections.abc import Callable
from dataclasses import dataclass

from controlplane.dispatch.output_stream import OutputChunk
from controlplane.messages import AdapterRef
from controlplane.services.output_processor import ChoiceEnd, ChoiceFinished, GenerationStarted
from protos.loraplane.v1 import inference_pb2 as pb
from protos.planes import StepLogprobs, duration_from_seconds

_FINISH_REASONS = {
    ChoiceEnd.STOP: pb.FINISH_REASON_STOP,
    ChoiceEnd.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    ChoiceEnd.LENGTH: pb.FINISH_REASON_LENGTH,
    ChoiceEnd.ABORTED: pb.FINISH_REASON_ABORTED,
}


@dataclass(frozen=True, slots=True)
class ResponseWriter:
    """Turns the events of one request into messages."""

    request_id: str
    adapter: AdapterRef | None
    num_prompt_tokens: int
    token_text: Callable[[int], str]

    def to_proto(self, event: OutputChunk | GenerationStarted | ChoiceFinished) -> pb.GenerateResponse:
        """The message that tells of an event."""
        if isinstance(event, OutputChunk):
            return self._chunk(event)
        if isinstance(event, GenerationStarted):
            return pb.GenerateResponse(started=self._started(event))
        return pb.GenerateResponse(finished=self._finished(event))

    def _chunk(self, chunk: OutputChunk) -> pb.GenerateResponse:
        # Filled in place, a third of the cost of passing a finished Chunk: this runs for every message of every stream.
        response = pb.GenerateResponse()
        message = response.chunk
        message.choice_index = chunk.choice_index
        message.token_ids.extend(chunk.token_ids)
        message.text = chunk.text
        if chunk.logprobs:
            message.logprobs.extend(map(self._logprobs, chunk.logprobs))
        return response

    def _logprobs(self, entry: StepLogprobs) -> pb.TokenLogprobs:
        top = zip(entry.top_token_ids, entry.top_logprobs, strict=True)
        return pb.TokenLogprobs(
            logprob=entry.logprob,
            top=[pb.TopLogprob(token_id=token_id, logprob=value, text=self.token_text(token_id)) for token_id, value in top],
        )

    def _started(self, event: GenerationStarted) -> pb.Started:
        return pb.Started(
            request_id=self.request_id,
            adapter=self.adapter.name if self.adapter else "",
            adapter_version=self.adapter.digest if self.adapter else "",
            prompt_tokens=self.num_prompt_tokens,
            queue_time=duration_from_seconds(event.queue_s),
            adapter_wait_time=duration_from_seconds(event.adapter_wait_s),
        )

    def _finished(self, event: ChoiceFinished) -> pb.Finished:
        finished = pb.Finished(
            choice_index=event.choice_index,
            finish_reason=_FINISH_REASONS[event.end],
            usage=pb.Usage(prompt_tokens=self.num_prompt_tokens, completion_tokens=event.completion_tokens),
            timings=pb.Timings(
                queue_time=duration_from_seconds(event.queue_s),
                adapter_wait_time=duration_from_seconds(event.adapter_wait_s),
                time_to_first_token=duration_from_seconds(event.ttft_s),
                total_time=duration_from_seconds(event.total_s),
                num_preemptions=event.num_preemptions,
            ),
        )
        if event.matched_stop is not None:
            finished.matched_stop = event.matched_stop
        elif event.matched_stop_token_id is not None:
            finished.matched_stop_token_id = event.matched_stop_token_id
        return finished
