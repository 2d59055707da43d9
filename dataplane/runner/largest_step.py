"""How much memory a step takes beside weights and pool: runs the largest one there can be, with the sampler's largest work.

Knows how steps look, not what the pool gets of what is left.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from adapter_store.geometry import BaseGeometry
from dataplane.model.step_inputs import StepArrays, starts_of
from dataplane.runner.model_runner import ForwardModel
from dataplane.runner.sampling import Sampler, SamplingRow
from dataplane.runner.step_buffers import StepBuffers
from kernels.lora import LoraAdapter, LoraRows
from protos.planes import EngineSampling

# Tokens that all requests together find in KV, and that one finds at most. What attention allocates depends on no more than that
# (the torch backend gathers a bounded number at once), and a start-up should not take as long as the longest context does.
_MAX_CONTEXT_TOKENS = 1 << 18

# What a captured step keeps of the device for each layer beside tensors, in one graph or in several: descriptions of a dozen
# launches. An upper estimate; the driver does not tell.
_CAPTURED_LAYER_BYTES = 256 << 10

# Everything that a row can ask of the sampler at once.
_SAMPLING = EngineSampling(
    max_tokens=2,
    min_tokens=2,
    temperature=1.0,
    top_p=0.9,
    top_k=50,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    num_logprobs=20,
)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What no step exceeds. captured_rows: of each step that will be captured in CUDA graphs, its rows; none without them."""

    token_budget: int
    max_num_seqs: int
    max_model_len: int
    captured_rows: tuple[int, ...] = ()


@torch.inference_mode()
def measure_step_bytes(
    model: ForwardModel, sampler: Sampler, geometry: BaseGeometry, limits: StepLimits, device: torch.device
) -> int:
    """Most that steps of the model and its sampler will take of the device at once, the memory of graphs included.

    Runs them over a pool of one page that stands for all. Of every row with an adapter of the largest rank on every module: what
    the LoRA operation allocates during a step, if it does, is in the measure too. Buffers that model and sampler made when they
    were built are not: they are in use already.
    """
    pool = torch.zeros((geometry.num_layers, 2, geometry.page_elems), dtype=getattr(torch, geometry.dtype), device=device)
    adapter = largest_adapter(geometry, device)

    def forward(num_tokens: int) -> torch.Tensor:
        step = largest_step(limits, num_tokens, geometry.page_tokens, adapter)
        num_rows = model.num_rows(step)
        return model.forward(StepBuffers(num_rows, geometry.page_tokens, 1, device).upload(step, num_rows), pool)

    def whole_step() -> None:
        logits = forward(limits.token_budget)
        history = np.arange(min(limits.max_model_len, limits.token_budget), dtype=np.int32) % logits.shape[1]
        sampler.launch(logits, [SamplingRow(_SAMPLING, history, len(history) - 1)] * len(logits)).wait()

    num_bytes = _peak_bytes(whole_step, device)
    if limits.captured_rows:
        # Graphs are replayed one at a time and share their memory, which is that of the largest; it stays taken between replays.
        num_bytes += _peak_bytes(lambda: forward(max(limits.captured_rows)), device)
        num_bytes += len(limits.captured_rows) * geometry.num_layers * _CAPTURED_LAYER_BYTES
    return num_bytes


def largest_step(limits: StepLimits, num_tokens: int, page_tokens: int, adapter: LoraAdapter) -> StepArrays:
    """A step of that many tokens, or as many as there can be: every request runs, most of them decode, and all want logits.

    Its requests all read and write the pool's first page.
    """
    num_requests = min(limits.max_num_seqs, num_tokens)
    # One token each; what is left goes to prompts, the last request's first.
    spare = num_tokens - num_requests - np.arange(num_requests)[::-1] * (limits.max_model_len - 1)
    lengths = (1 + np.clip(spare, 0, limits.max_model_len - 1)).astype(np.int32)
    decode_len = max(1, min(limits.max_model_len, _MAX_CONTEXT_TOKENS // num_requests))
    prefill_len = min(limits.max_model_len, _MAX_CONTEXT_TOKENS)
    context_lens = np.maximum(lengths, np.where(lengths > 1, prefill_len, decode_len)).astype(np.int32)
    query_starts, page_starts = starts_of(lengths), starts_of(-(-context_lens // page_tokens))
    positions = np.arange(query_starts[-1]) + np.repeat(context_lens - query_starts[1:], lengths)
    return StepArrays(
        token_ids=np.zeros(query_starts[-1], dtype=np.int32),
        positions=positions.astype(np.int32),
        slots=(positions % page_tokens).astype(np.int32),
        query_starts=query_starts,
        context_lens=context_lens,
        page_starts=page_starts,
        page_ids=np.zeros(page_starts[-1], dtype=np.int32),
        logits_rows=query_starts[1:] - 1,
        adapter_index=np.zeros(query_starts[-1], dtype=np.int32),
        adapters=(adapter,),
        num_decodes=int((lengths == 1).sum()),
    )


def largest_adapter(geometry: BaseGeometry, device: torch.device) -> LoraAdapter:
    """An adapter of the largest rank on every module, all of whose rows lie at the start of the pool."""
    rows = torch.zeros(geometry.max_lora_rank, dtype=torch.int64, device=device)
    return LoraAdapter({module.name: LoraRows(geometry.max_lora_rank, 1.0, rows, rows) for module in geometry.modules})


def _peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """How much more of the device torch holds while this runs than before it. Nothing counts it on the CPU: 0 there."""
    if device.type != "cuda":
        run()
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device) - before
