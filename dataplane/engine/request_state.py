"""One request of the standing set: its tokens, what of them is computed, and its page table. Knows no pool and no tensor."""

from collections.abc import Container
from enum import Enum, auto

from dataplane.memory.page_pool import PageKind, PageOwner
from protos.planes import AdmittedRequest, EngineFinishReason, EngineSampling


class RequestPhase(Enum):
    """What a request needs next."""

    PREFILL = auto()
    DECODE = auto()


class RequestState:
    """A running request. `token_ids` is the prompt and all output so far, the output of earlier admissions included."""

    __slots__ = (
        "_num_admitted_tokens",
        "adapter_digest",
        "admitted_at",
        "is_adapter_ready",
        "num_computed_tokens",
        "num_prompt_tokens",
        "owner",
        "page_table",
        "request_id",
        "request_key",
        "sampling",
        "token_ids",
    )

    def __init__(self, admitted: AdmittedRequest, admitted_at: float) -> None:
        self.request_key = admitted.request_key
        self.request_id = admitted.request_id
        self.adapter_digest = admitted.adapter_digest
        self.sampling: EngineSampling = admitted.sampling
        self.token_ids = list(admitted.token_ids)
        self.num_prompt_tokens = len(admitted.token_ids) - admitted.num_output_tokens
        self.num_computed_tokens = 0
        self.page_table: list[int] = []
        self.admitted_at = admitted_at
        self.is_adapter_ready = not admitted.adapter_digest
        self.owner = PageOwner(PageKind.KV, admitted.request_key)
        self._num_admitted_tokens = len(admitted.token_ids)

    @property
    def phase(self) -> RequestPhase:
        """PREFILL until every token it was admitted with is computed."""
        return RequestPhase.PREFILL if self.num_computed_tokens < self._num_admitted_tokens else RequestPhase.DECODE

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that are known and not computed; the last of them gives the next token."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    def append(self, token_id: int) -> None:
        """Adds the token that was just sampled."""
        assert self.num_pending_tokens == 0, f"request {self.request_key}: a token came before {self.num_pending_tokens} others"
        self.token_ids.append(token_id)

    def finish_reason(self, eos_token_ids: Container[int], max_model_len: int) -> EngineFinishReason | None:
        """Whether the last token ends the request, and why."""
        sampling, last = self.sampling, self.token_ids[-1]
        # The token is output number num_output_tokens; min_tokens of them must stand before one that ends the request.
        if self.num_output_tokens > sampling.min_tokens:
            if last in eos_token_ids and not sampling.ignore_eos:
                return EngineFinishReason.EOS
            if last in sampling.stop_token_ids:
                return EngineFinishReason.STOP_TOKEN
        if self.num_output_tokens >= sampling.max_tokens or len(self.token_ids) >= max_model_len:
            return EngineFinishReason.LENGTH
        return None
