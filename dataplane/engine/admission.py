"""What the engine can take in: its limits, and the check of an admitted request against them. Changes nothing."""

from collections.abc import Container
from dataclasses import dataclass

from protos.planes import AdmittedRequest


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Sizes that the engine never exceeds, and the tokens that end a sequence."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    max_num_seqs: int
    token_budget: int
    num_pages: int
    page_tokens: int

    def __post_init__(self) -> None:
        assert self.token_budget >= self.max_num_seqs, "every step computes one token of each decoding request"


def refusal(request: AdmittedRequest, limits: EngineLimits, running_keys: Container[int], num_running: int) -> str | None:
    """Why the engine cannot take this request, in words with numbers; None if it can. A refusal is a bug of the caller."""
    num_tokens = len(request.token_ids)
    if request.request_key in running_keys:
        return f"request_key {request.request_key} is running already"
    if num_running >= limits.max_num_seqs:
        return f"{num_running} requests are running, the limit max_num_seqs is {limits.max_num_seqs}"
    if not 0 <= request.num_output_tokens < num_tokens:
        return f"{num_tokens} token_ids of which {request.num_output_tokens} are output: at least one must be prompt"
    if num_tokens >= limits.max_model_len:
        return f"{num_tokens} tokens leave no room for another: max_model_len is {limits.max_model_len}"
    if request.num_output_tokens >= request.sampling.max_tokens:
        return f"{request.num_output_tokens} output tokens are there already, max_tokens is {request.sampling.max_tokens}"
    largest = max(request.token_ids)
    if largest >= limits.vocab_size:
        return f"token id {largest} is outside the vocabulary of {limits.vocab_size}"
    num_pages = -(-num_tokens // limits.page_tokens)
    if num_pages > limits.num_pages:
        return f"{num_tokens} tokens take {num_pages} pages; the whole pool has {limits.num_pages}"
    return None
