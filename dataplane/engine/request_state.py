"""One request of the standing set: its tokens, what of them is computed, and its page table. Knows no pool and no tensor."""

from collections.abc import Container, Sequence
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from dataplane.engine.int_array import IntArray
from dataplane.memory.page_pool import PageKind, PageOwner
from protos.planes import AdmittedRequest, EngineFinishReason, EngineSampling


class RequestPhase(Enum):
    """What a request needs next."""

    PREFILL = auto()
    DECODE = auto()


class RequestState:
    """A running request. `token_ids` is the prompt and all output so far, the output of earlier admissions included.

    A step that was launched counts as computed: whatever is launched later finds its KV written. The token that it chooses is
    unknown until the step is awaited; it is counted, but not in `token_ids`.
    """

    __slots__ = (
        "_num_admitted_tokens",
        "_pages",
        "_tokens",
        "adapter_digest",
        "admitted_at",
        "has_waited_for_adapter",
        "is_adapter_ready",
        "max_num_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_unknown_tokens",
        "owner",
        "request_id",
        "request_key",
        "sampling",
    )

    def __init__(self, admitted: AdmittedRequest, admitted_at: float, max_model_len: int) -> None:
        self.request_key = admitted.request_key
        self.request_id = admitted.request_id
        self.adapter_digest = admitted.adapter_digest
        self.sampling: EngineSampling = admitted.sampling
        self.num_prompt_tokens = len(admitted.token_ids) - admitted.num_output_tokens
        self.max_num_tokens = min(self.num_prompt_tokens + admitted.sampling.max_tokens, max_model_len)
        self.num_computed_tokens = 0
        self.num_unknown_tokens = 0
        self.admitted_at = admitted_at
        self.is_adapter_ready = not admitted.adapter_digest
        self.has_waited_for_adapter = False
        self.owner = PageOwner(PageKind.KV, admitted.request_key)
        self._tokens = IntArray(admitted.token_ids)
        self._pages = IntArray()
        self._num_admitted_tokens = len(admitted.token_ids)

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Every token that is known."""
        return self._tokens.view

    @property
    def page_table(self) -> NDArray[np.int32]:
        """Its pages, in the order of the tokens that they hold."""
        return self._pages.view

    @property
    def num_pages(self) -> int:
        """Pages that it holds."""
        return len(self._pages)

    @property
    def num_tokens(self) -> int:
        """Tokens known, and the one on its way."""
        return len(self._tokens) + self.num_unknown_tokens

    @property
    def phase(self) -> RequestPhase:
        """PREFILL until every token it was admitted with is computed."""
        return RequestPhase.PREFILL if self.num_computed_tokens < self._num_admitted_tokens else RequestPhase.DECODE

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that are there, or on their way, and not computed; the last of them gives the next token."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, as far as they are known."""
        return len(self._tokens) - self.num_prompt_tokens

    @property
    def is_full(self) -> bool:
        """Whether the token on its way is the last that it may have: nothing is left to compute."""
        return self.num_tokens >= self.max_num_tokens

    def add_pages(self, pages: Sequence[int]) -> None:
        """Its page table grows."""
        self._pages.extend(pages)

    def launch(self, num_tokens: int) -> None:
        """A step that computes its next tokens is on its way, and with it a new token if those are all."""
        assert num_tokens <= self.num_pending_tokens, f"request {self.request_key}: {num_tokens} of {self.num_pending_tokens}"
        is_last = num_tokens == self.num_pending_tokens
        self.num_computed_tokens += num_tokens
        if is_last:
            # Of two steps on their way at once, the first is awaited before a third is launched; its token comes first.
            self.num_unknown_tokens += 1

    def append(self, token_id: int) -> None:
        """The oldest token on its way has come."""
        assert self.num_unknown_tokens > 0, f"request {self.request_key}: a token came that was not on its way"
        self.num_unknown_tokens -= 1
        self._tokens.append(token_id)

    def finish_reason(self, eos_token_ids: Container[int]) -> EngineFinishReason | None:
        """Whether the last known token ends the request, and why."""
        sampling, last = self.sampling, int(self.token_ids[-1])
        # The token is output number num_output_tokens; min_tokens of them must stand before one that ends the request.
        if self.num_output_tokens > sampling.min_tokens:
            if last in eos_token_ids and not sampling.ignore_eos:
                return EngineFinishReason.EOS
            if last in sampling.stop_token_ids:
                return EngineFinishReason.STOP_TOKEN
        return EngineFinishReason.LENGTH if len(self._tokens) >= self.max_num_tokens else None
