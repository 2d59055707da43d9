"""Chooses tokens from logits, each row by its own parameters. Knows nothing of requests, pages or other rows.

The random number of a token is a pure function of (seed, position), so a request draws the same numbers in any batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from protos.planes import EngineSampling, StepLogprobs

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What choosing the token after `token_ids` needs to know; the first num_prompt_tokens of them are the prompt."""

    sampling: EngineSampling
    token_ids: Sequence[int]
    num_prompt_tokens: int

    @property
    def position(self) -> int:
        """Place of the new token in its request."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token chosen, or None if no logit was finite or one was NaN; its logprobs if the request asked for them."""

    token_id: int | None
    logprobs: StepLogprobs | None = None


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow], eos_token_ids: Sequence[int]) -> tuple[SampledToken, ...]:
    """Chooses one token for each row. logits: [num_rows, vocab] float32, overwritten."""
    if not rows:
        return ()
    asked = [i for i, row in enumerate(rows) if row.sampling.num_logprobs is not None]
    raw = logits[asked] if asked else None  # a copy
    for i, row in enumerate(rows):
        sampling = row.sampling
        if sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty:
            _penalize(logits[i], row)
        if row.num_output_tokens < sampling.min_tokens:
            _forbid_end(logits[i], sampling, eos_token_ids)
    # The first of several maxima; a NaN counts as the largest.
    chosen = logits.argmax(dim=-1)
    best = logits.gather(1, chosen.unsqueeze(1)).squeeze(1)
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        chosen[drawn] = _draw(logits[drawn], [rows[i] for i in drawn])
    # The one transfer of a step without logprobs: the tokens themselves must reach the host to be reported.
    token_ids = torch.where(best.isfinite(), chosen, -1).tolist()
    logprobs: dict[int, StepLogprobs] = {}
    if raw is not None:
        num_top = [rows[i].sampling.num_logprobs or 0 for i in asked]
        logprobs = dict(zip(asked, _logprobs(raw, chosen[asked], num_top), strict=True))
    return tuple(SampledToken(t, logprobs.get(i)) if t >= 0 else SampledToken(None) for i, t in enumerate(token_ids))


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    """One number in [0, 1) for each (seed, position): SplitMix64 over the position, in a sequence that the seed selects."""
    seed = torch.tensor([_signed(s) for s in seeds], dtype=torch.int64)
    position = torch.tensor(positions, dtype=torch.int64)
    # Mixed before the position is added: else neighbouring seeds would give the same numbers at shifted positions.
    bits = _mix(_mix(seed + _GOLDEN) + (position + 1) * _GOLDEN)
    # 48 bits: u * total then stays below total when rounded, so the inverse CDF never runs past the last token.
    return _shift_right(bits, 16).to(torch.float64) * 2.0**-48


def _signed(value: int) -> int:
    """An unsigned 64-bit value as the signed one of the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift; torch shifts the sign in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finalizer of SplitMix64; int64 multiplication wraps, so the bits are those of uint64."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _penalize(logits: torch.Tensor, row: SamplingRow) -> None:
    """Repetition over prompt and output, presence and frequency over the output. logits: [vocab], in place."""
    sampling = row.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(list(set(row.token_ids)), dtype=torch.int64, device=logits.device)
        value = logits[seen]
        value = torch.where(value > 0, value / sampling.repetition_penalty, value * sampling.repetition_penalty)
        # A penalty near 0 (or a huge one) is a strong wish, not a broken logit.
        logits[seen] = value.clamp(-_LARGEST, _LARGEST)
    if sampling.presence_penalty or sampling.frequency_penalty:
        output = torch.tensor(row.token_ids[row.num_prompt_tokens :], dtype=torch.int64, device=logits.device)
        used, counts = torch.unique(output, return_counts=True)
        logits[used] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def _forbid_end(logits: torch.Tensor, sampling: EngineSampling, eos_token_ids: Sequence[int]) -> None:
    """Masks every token that would end the request. logits: [vocab], in place."""
    for token_id in (*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)):
        if token_id < len(logits):
            logits[token_id] = -torch.inf


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Temperature, top_k, top_p of what that leaves, min_p, then the inverse CDF in order of token id. Returns [num_rows].

    In float64, so that a sum over the vocabulary does not round another way when the batch has another shape.
    """

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(1)

    scaled = logits.double()
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / column([row.sampling.temperature for row in rows])
    probs = scaled.softmax(dim=-1)
    truncated = [i for i, row in enumerate(rows) if row.sampling.top_k or row.sampling.top_p < 1]
    if truncated:
        probs[truncated] = _truncate(probs[truncated], [rows[i].sampling for i in truncated])
    min_p = column([row.sampling.min_p for row in rows])
    probs = torch.where(probs >= min_p * probs.amax(dim=-1, keepdim=True), probs, 0.0)
    cdf = probs.cumsum(dim=-1)
    u = uniforms([row.sampling.seed for row in rows], [row.position for row in rows]).to(logits.device).unsqueeze(1)
    # Clamped for rows of NaN alone, whose token is thrown away.
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)


def _truncate(probs: torch.Tensor, samplings: Sequence[EngineSampling]) -> torch.Tensor:
    """Keeps the top_k most likely tokens, and of these the fewest whose share reaches top_p. Lower ids win ties."""
    vocab = probs.shape[1]
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor([[s.top_k or vocab] for s in samplings], device=probs.device)
    top_p = torch.tensor([[s.top_p] for s in samplings], dtype=torch.float64, device=probs.device)
    ordered = torch.where(torch.arange(vocab, device=probs.device) < top_k, ordered, 0.0)
    before = ordered.cumsum(dim=-1) - ordered
    # A token stays while those before it fall short of top_p; the first always stays. 1 keeps all, whatever the rounding.
    kept = (before < top_p * ordered.sum(dim=-1, keepdim=True)) | (top_p >= 1)
    return torch.zeros_like(probs).scatter_(1, order, torch.where(kept, ordered, 0.0))


def _logprobs(raw: torch.Tensor, chosen: torch.Tensor, num_top: Sequence[int]) -> list[StepLogprobs]:
    """Of the chosen tokens, and of the num_top most likely ones of each row; of equals the lowest ids.

    raw: [num_rows, vocab] logits before penalties and temperature: these logprobs are the model's own.
    """
    logprobs = raw.log_softmax(dim=-1)
    own = logprobs.gather(1, chosen.unsqueeze(1)).squeeze(1)
    top, ids = logprobs.sort(descending=True, stable=True)
    columns = (own, ids[:, : max(num_top)], top[:, : max(num_top)])
    by_row = zip(*(column.tolist() for column in columns), num_top, strict=True)
    return [StepLogprobs(own, tuple(ids[:n]), tuple(top[:n])) for own, ids, top, n in by_row]
