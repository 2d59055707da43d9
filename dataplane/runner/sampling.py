"""Chooses tokens from logits, each row by its own parameters, without waiting for the device. Knows nothing of requests or pages.

What is chosen for a row never depends on the other rows.
"""

from collections.abc import Sequence

import torch

from dataplane.runner.drawing import Draw
from dataplane.runner.logprobs import Logprobs
from dataplane.runner.penalties import Penalties
from dataplane.runner.sampling_row import SampledToken, SamplingRow
from dataplane.runner.upload import Upload
from kernels.truncation import truncation
from protos.planes import StepLogprobs

__all__ = ["LaunchedSamples", "SampledToken", "Sampler", "SamplingRow"]


class LaunchedSamples:
    """Tokens that the device chooses, or has chosen, on their way to memory of their own."""

    def __init__(self, on_device: torch.Tensor, num_rows: int, asked: Sequence[int], logprobs: Logprobs | None) -> None:
        """on_device: [n] int32, token ids of the rows, then the logprobs of the rows that asked. Copied at once."""
        is_cuda = on_device.is_cuda
        self._num_rows = num_rows
        self._asked = asked
        self._logprobs = logprobs
        self._host = torch.empty(len(on_device), dtype=torch.int32, pin_memory=is_cuda)
        self._host.copy_(on_device, non_blocking=True)
        # Blocking: whoever waits leaves the processor to others. Steps on an H200 take no longer for it.
        self._copied = torch.cuda.Event(blocking=True) if is_cuda else None  # type: ignore[no-untyped-call]  # torch has none
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> tuple[SampledToken, ...]:
        """Blocks until the tokens are chosen; one for each row."""
        if self._copied is not None:
            self._copied.synchronize()
        packed = self._host.numpy()
        token_ids = packed[: self._num_rows].tolist()
        logprobs: dict[int, StepLogprobs] = {}
        if self._logprobs is not None:
            logprobs = dict(zip(self._asked, self._logprobs.read(packed[self._num_rows :]), strict=True))
        return tuple(SampledToken(t, logprobs.get(i)) if t >= 0 else SampledToken(None) for i, t in enumerate(token_ids))


class Sampler:
    """Launches the choice of tokens behind what the current stream has to do, and keeps the last ones on the device."""

    def __init__(self, vocab_size: int, eos_token_ids: Sequence[int], max_rows: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._device = device
        self._truncate = truncation(device)
        self._chosen = torch.full((max_rows + 1,), -1, dtype=torch.int32, device=device)

    @property
    def chosen(self) -> torch.Tensor:
        """[max_rows + 1] int32, always the same memory: what the last launch chose in each of its rows, -1 where nothing can be.

        The last one is -1 always: where to look for what is not there.
        """
        return self._chosen

    @torch.inference_mode()
    def launch(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> LaunchedSamples:
        """Starts choosing one token for each row. logits: [num_rows, vocab] float32, overwritten."""
        assert logits.shape == (len(rows), self._vocab_size), f"logits are {tuple(logits.shape)} for {len(rows)} rows"
        assert len(rows) < len(self._chosen), f"{len(rows)} rows, at most {len(self._chosen) - 1}"
        if not rows:
            return LaunchedSamples(self._chosen[:0], 0, (), None)
        asked = [i for i, row in enumerate(rows) if row.sampling.num_logprobs is not None]
        drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
        upload = Upload(self._device)
        penalties = Penalties(rows, self._eos_token_ids, self._vocab_size, upload)
        draw = Draw(rows, drawn, self._vocab_size, self._truncate, upload) if drawn else None
        num_top = [rows[i].sampling.num_logprobs or 0 for i in asked]
        logprobs = Logprobs(asked, num_top, self._vocab_size, upload) if asked else None
        upload.send()

        raw = logprobs.raw(logits, upload) if logprobs is not None else None
        # Reads what was chosen before, which is overwritten further down.
        penalties.apply(logits, self._chosen, upload)
        # The first of several maxima; a NaN counts as the largest.
        best, token_ids = logits.max(dim=-1)
        if draw is not None:
            draw.into(token_ids, logits, upload)
        chosen = self._chosen[: len(rows)]
        chosen.copy_(torch.where(best.isfinite(), token_ids, -1))
        if logprobs is None or raw is None:
            return LaunchedSamples(chosen, len(rows), (), None)
        packed = torch.cat([chosen, *logprobs.compute(raw, token_ids, upload)])
        return LaunchedSamples(packed, len(rows), asked, logprobs)
