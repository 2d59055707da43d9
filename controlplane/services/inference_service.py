"""`InferenceService`: one Generate from its message to the end of its stream.

Strings the steps together: check, resolve the adapter, tokenize, submit one request per choice, stream. What each step does lies
elsewhere.
"""

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from controlplane.dispatch.dispatcher import Dispatcher, RequestHandle
from controlplane.errors import AbortedError, InvalidArgumentError, QueueFullError, UnavailableError
from controlplane.messages import AdapterRef, DataPlaneDescription, RequestSpec
from controlplane.registry.directory import AdapterDirectory, AdapterLease
from controlplane.services.auth import current_caller
from controlplane.services.generate_params import ChatPrompt, GenerateParams, ModelLimits, TextPrompt
from controlplane.services.generate_response import ResponseWriter
from controlplane.services.output_processor import GenerationOutput, OutputRules
from controlplane.services.validation import does_not_fit_error, parse_generate, resolve_max_tokens
from controlplane.text.chat_template import ChatTemplateError
from controlplane.text.tokenizer import Tokenizer
from protos.loraplane.v1 import inference_pb2 as pb
from protos.loraplane.v1 import inference_pb2_grpc

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]

log = logging.getLogger(__name__)

_MASK64 = (1 << 64) - 1


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """The public way to generate text."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        directory: AdapterDirectory,
        tokenizer: Tokenizer,
        max_tokenizing: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """max_tokenizing: prompts that may be tokenized, or wait for it, at once; the clock is the dispatcher's."""
        self._dispatcher = dispatcher
        self._directory = directory
        self._tokenizer = tokenizer
        self._max_tokenizing = max_tokenizing
        self._num_tokenizing = 0
        self._clock = clock

    # A coroutine that writes, and not a generator: one layer less for every message.
    async def Generate(self, request: pb.GenerateRequest, context: "Context") -> None:  # type: ignore[override]
        """Generates from one prompt; see inference.proto."""
        received_at = self._clock()
        model = self._model()
        params = parse_generate(request, self._limits(model))
        # Taken before anything awaits, so that the version named is the one that answers.
        lease = self._directory.resolve(params.adapter) if params.adapter else None
        try:
            await self._generate(params, lease, model, context, received_at)
        finally:
            if lease:
                lease.release()

    async def _generate(
        self,
        params: GenerateParams,
        lease: AdapterLease | None,
        model: DataPlaneDescription,
        context: "Context",
        received_at: float,
    ) -> None:
        adapter = lease.ref if lease else None
        time_remaining: float | None = context.time_remaining()
        deadline = None if time_remaining is None else received_at + time_remaining
        prompt_token_ids = await self._tokenize(params)
        if lease and lease.is_revoked:
            # The dispatcher, which aborts what it has of such an adapter, did not have this request yet.
            raise AbortedError(f"adapter {lease.ref.name!r} was unregistered", reason="ADAPTER_REMOVED")
        specs = self._specs(params, prompt_token_ids, adapter, model, received_at, deadline)
        output = GenerationOutput(params.num_choices, _output_rules(params, model), self._tokenizer, received_at, self._clock)
        writer = ResponseWriter(specs[0].request_id, adapter, len(prompt_token_ids), self._tokenizer.token_text)
        handles: list[RequestHandle] = []
        try:
            for spec, choice in zip(specs, output.choices, strict=True):
                handles.append(self._dispatcher.submit(spec, choice))
            async for event in output.stream:
                await context.write(writer.to_proto(event))
        finally:
            # Whatever ended the call, a cancel and a passed deadline too: nothing of it stays in a batch.
            for handle in handles:
                self._dispatcher.abort(handle)
            log.info(
                "generate ended: request_id=%s tenant=%s adapter=%s prompt_tokens=%d choices=%d total_s=%.3f",
                writer.request_id,
                specs[0].tenant,
                adapter.digest[:12] if adapter else "-",
                len(prompt_token_ids),
                params.num_choices,
                output.elapsed_s(),
            )

    def _model(self) -> DataPlaneDescription:
        model = self._dispatcher.description()
        if model is None:
            raise UnavailableError("no data plane has connected yet; retry later", reason="NO_DATA_PLANE")
        return model

    def _limits(self, model: DataPlaneDescription) -> ModelLimits:
        return ModelLimits(
            vocab_size=model.vocab_size,
            max_model_len=model.max_model_len,
            max_token_chars=self._tokenizer.max_token_chars,
            can_chat=self._tokenizer.can_chat,
            can_read_text=self._tokenizer.can_read_text,
        )

    async def _tokenize(self, params: GenerateParams) -> tuple[int, ...]:
        """The prompt's token ids."""
        prompt = params.prompt
        if self._num_tokenizing >= self._max_tokenizing:
            raise QueueFullError(self._num_tokenizing, self._max_tokenizing)
        self._num_tokenizing += 1
        try:
            if isinstance(prompt, TextPrompt):
                return await self._tokenizer.encode_text(prompt.text)
            if isinstance(prompt, ChatPrompt):
                return await self._tokenizer.encode_chat(prompt.messages, prompt.add_generation_prompt)
            return prompt.token_ids
        except ChatTemplateError as error:
            raise InvalidArgumentError.of(
                "chat.messages", f"the model's chat template refuses this conversation: {error}", reason="CHAT_TEMPLATE_ERROR"
            ) from error
        finally:
            self._num_tokenizing -= 1

    def _specs(
        self,
        params: GenerateParams,
        prompt_token_ids: tuple[int, ...],
        adapter: AdapterRef | None,
        model: DataPlaneDescription,
        received_at: float,
        deadline: float | None,
    ) -> list[RequestSpec]:
        """One request per choice; they differ in their seeds alone."""
        max_tokens = resolve_max_tokens(params, len(prompt_token_ids), self._limits(model))
        seed = secrets.randbits(64) if params.seed is None else params.seed
        request_id = params.request_id or f"req-{secrets.token_hex(8)}"
        specs = [
            RequestSpec(
                request_id=request_id,
                prompt_token_ids=prompt_token_ids,
                adapter=adapter,
                sampling=params.engine_sampling(max_tokens, choice_seed(seed, index)),
                priority=params.priority,
                deadline=deadline,
                ttft_deadline=None if params.ttft_slo_s is None else received_at + params.ttft_slo_s,
                tenant=current_caller().tenant,
            )
            for index in range(params.num_choices)
        ]
        misfit = self._dispatcher.check_fits(specs[0])
        if misfit is None:
            return specs
        # A client that named no max_tokens takes what there is room for.
        room = (misfit.available_pages - misfit.adapter_pages) * model.geometry.page_tokens - len(prompt_token_ids)
        if params.max_tokens is None and room >= max(1, params.min_tokens):
            return [replace(spec, sampling=replace(spec.sampling, max_tokens=room)) for spec in specs]
        raise does_not_fit_error(params, len(prompt_token_ids), max_tokens, misfit)


def choice_seed(seed: int, choice_index: int) -> int:
    """The seed of a choice: the request's own for the first, then splitmix64 of what follows it."""
    if choice_index == 0:
        return seed
    mixed = (seed + choice_index * 0x9E3779B97F4A7C15) & _MASK64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK64
    return mixed ^ (mixed >> 31)


def _output_rules(params: GenerateParams, model: DataPlaneDescription) -> OutputRules:
    return OutputRules(
        options=params.output,
        stop=params.stop,
        stop_token_ids=frozenset(params.stop_token_ids),
        eos_token_ids=frozenset() if params.ignore_eos else frozenset(model.eos_token_ids),
        min_tokens=params.min_tokens,
    )
