"""Turns the tokens of a request's choices into what its client reads: text, stops, finish reasons and timings.

One `GenerationOutput` per request, one `ChoiceOutput` (a TokenSink) per choice, all writing into one OutputStream. Knows nothing
of gRPC or scheduling.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from controlplane.dispatch.output_stream import OutputStream
from controlplane.messages import FinishReason, RequestOutcome
from controlplane.services.generate_params import OutputOptions
from controlplane.text.stop_strings import StopMatcher
from controlplane.text.tokenizer import Tokenizer
from protos.planes import StepLogprobs


class ChoiceEnd(Enum):
    """Why a choice ended, as its client sees it."""

    STOP = "stop"
    STOP_TOKEN = "stop_token"
    LENGTH = "length"
    ABORTED = "aborted"


_ENDS = {
    FinishReason.EOS: ChoiceEnd.STOP,
    FinishReason.STOPPED: ChoiceEnd.STOP,
    FinishReason.STOP_TOKEN: ChoiceEnd.STOP_TOKEN,
    FinishReason.LENGTH: ChoiceEnd.LENGTH,
    FinishReason.ABORTED: ChoiceEnd.ABORTED,
}


@dataclass(frozen=True, slots=True)
class GenerationStarted:
    """The first choice runs."""

    queue_s: float
    adapter_wait_s: float


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """The last event of a choice. `matched_stop` or `matched_stop_token_id` is set when it ended at one."""

    choice_index: int
    end: ChoiceEnd
    matched_stop: str | None
    matched_stop_token_id: int | None
    completion_tokens: int
    queue_s: float
    adapter_wait_s: float
    ttft_s: float
    total_s: float
    num_preemptions: int


GenerationStream = OutputStream[GenerationStarted | ChoiceFinished]


@dataclass(frozen=True, slots=True)
class OutputRules:
    """What decides how tokens of this request become text."""

    options: OutputOptions = field(default_factory=OutputOptions)
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    # Ends of sequence that the engine honours for this request; empty with ignore_eos.
    eos_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0


class GenerationOutput:
    """All choices of one request, merged into one stream. The stream ends with the last choice, or with the first error."""

    def __init__(
        self,
        num_choices: int,
        rules: OutputRules,
        tokenizer: Tokenizer,
        received_at: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream: GenerationStream = OutputStream()
        self.choices = tuple(ChoiceOutput(self, index, rules, tokenizer) for index in range(num_choices))
        self._num_unfinished = num_choices
        self._has_started = False
        self._received_at = received_at
        self._clock = clock

    def elapsed_s(self) -> float:
        """Seconds since the request was received."""
        return self._clock() - self._received_at

    def choice_started(self, event: GenerationStarted) -> None:
        """Tells the client once, whichever choice is first."""
        if not self._has_started:
            self._has_started = True
            self.stream.put(event)

    def choice_finished(self, event: ChoiceFinished) -> None:
        """Ends the stream after the last choice."""
        self.stream.put(event)
        self._num_unfinished -= 1
        if self._num_unfinished == 0:
            self.stream.close()


class ChoiceOutput:
    """The tokens of one choice on their way to the stream."""

    def __init__(self, generation: GenerationOutput, index: int, rules: OutputRules, tokenizer: Tokenizer) -> None:
        self._generation = generation
        self._index = index
        self._rules = rules
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=not rules.options.show_special_tokens)
        self._matcher = StopMatcher(rules.stop, rules.options.include_stop)
        self._ending_ids = rules.stop_token_ids | rules.eos_token_ids
        self._matched_stop: str | None = None
        self._last_token_id: int | None = None
        self._num_tokens = 0
        self._ttft_s = 0.0
        # What waits for the end, with at_end.
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[StepLogprobs] = []

    def on_started(self, queue_s: float, adapter_wait_s: float) -> None:
        """The choice runs."""
        self._generation.choice_started(GenerationStarted(queue_s, adapter_wait_s))

    def on_tokens(self, token_ids: Sequence[int], logprobs: Sequence[StepLogprobs]) -> bool:
        """Takes the next tokens; True when their text completed a stop string, which ends the choice at that token."""
        if self._num_tokens == 0:
            self._ttft_s = self._generation.elapsed_s()
        if self._rules.stop:
            taken, text = self._take_to_stop(token_ids)
        else:
            taken, text = len(token_ids), "" if self._rules.options.token_ids_only else self._text_of(token_ids)
            self._num_tokens += taken
        self._last_token_id = token_ids[taken - 1]
        if taken < len(token_ids):
            token_ids, logprobs = token_ids[:taken], logprobs[:taken]
        self._emit(token_ids, text, logprobs)
        return self._matched_stop is not None

    def on_finished(self, outcome: RequestOutcome) -> None:
        """Shows what was held back, and why the choice ended."""
        if outcome.reason is FinishReason.ERROR:
            assert outcome.error is not None, "an outcome of reason ERROR carries its error"
            self._generation.stream.fail(outcome.error)
            return
        text = "" if self._rules.options.token_ids_only else self._rest()
        self._emit([], text, [])
        if self._rules.options.at_end:
            self._generation.stream.push(self._index, self._token_ids, "".join(self._texts), self._logprobs)
        end = ChoiceEnd.STOP if self._matched_stop is not None else _ENDS[outcome.reason]
        self._generation.choice_finished(
            ChoiceFinished(
                choice_index=self._index,
                end=end,
                matched_stop=self._matched_stop,
                matched_stop_token_id=self._last_token_id if end is ChoiceEnd.STOP_TOKEN else None,
                completion_tokens=self._num_tokens,
                queue_s=outcome.queue_s,
                adapter_wait_s=outcome.adapter_wait_s,
                ttft_s=self._ttft_s,
                total_s=self._generation.elapsed_s(),
                num_preemptions=outcome.num_preemptions,
            )
        )

    def _take_to_stop(self, token_ids: Sequence[int]) -> tuple[int, str]:
        """Takes tokens until one completes a stop string. Returns how many, and their text."""
        texts = []
        for taken, token_id in enumerate(token_ids, start=1):
            self._num_tokens += 1
            texts.append(self._scan(self._text_of([token_id])))
            if self._matched_stop is not None:
                return taken, "".join(texts)
        return len(token_ids), "".join(texts)

    def _text_of(self, token_ids: Sequence[int]) -> str:
        """The text that is certain with these tokens.

        The engine never samples an end of sequence or a stop token that does not end the request, so only the last token can be
        one; it is left out unless asked for.
        """
        last = token_ids[-1]
        if last not in self._ending_ids:
            return self._detokenizer.extend(token_ids)
        return self._detokenizer.extend(token_ids[:-1]) + self._text_of_ending(last)

    def _text_of_ending(self, token_id: int) -> str:
        rules = self._rules
        if token_id in rules.stop_token_ids:
            if not rules.options.include_stop:
                return ""
            return self._detokenizer.flush() + self._tokenizer.token_text(token_id)
        return self._detokenizer.extend([token_id]) if rules.options.show_special_tokens else ""

    def _scan(self, text: str) -> str:
        scan = self._matcher.feed(text, armed=self._num_tokens >= self._rules.min_tokens)
        self._matched_stop = scan.matched
        return scan.text

    def _rest(self) -> str:
        """What detokenizer and matcher held back; its own end may complete a stop string."""
        if self._matched_stop is not None:
            return ""
        return self._scan(self._detokenizer.flush()) + self._matcher.flush()

    def _emit(self, token_ids: Sequence[int], text: str, logprobs: Sequence[StepLogprobs]) -> None:
        if self._rules.options.at_end:
            self._token_ids.extend(token_ids)
            self._texts.append(text)
            self._logprobs.extend(logprobs)
        elif token_ids or text:
            self._generation.stream.push(self._index, token_ids, text, logprobs)
