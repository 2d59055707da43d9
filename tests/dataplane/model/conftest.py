"""Small random models as transformers saves them, and a paged runner that feeds the decoder steps over scattered pages."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from adapter_store.geometry import BaseGeometry
from dataplane.attention.torch_attention import TorchAttention
from dataplane.model.config import load_model_config
from dataplane.model.decoder import Decoder
from dataplane.model.layer_ops import TorchLayerOps
from dataplane.model.step_inputs import Ints, StepArrays
from dataplane.model.weights import load_weights
from dataplane.runner.step_buffers import StepBuffers
from kernels.lora import LoraAdapter, LoraRows
from kernels.lora_torch import TorchLoraOps

NUM_PAGES = 128
ALIGN_ELEMS = 8


def ints(values: Iterable[int]) -> Ints:
    """An array as steps hold them."""
    return np.array(list(values), dtype=np.int32)


@dataclass(slots=True)
class PagedRequest:
    """Tokens to feed, teacher-forced; `logits` collects a row for each token that was computed."""

    token_ids: list[int]
    adapter: LoraAdapter | None = None
    num_computed: int = 0
    page_table: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


class PagedModel:
    """The decoder over a pool of NaN, with pages handed out in random order."""

    def __init__(self, model_dir: Path, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        config = load_model_config(model_dir)
        weights = load_weights(model_dir, config, dtype, torch.device(device))
        name = str(dtype).removeprefix("torch.")
        self.geometry: BaseGeometry = config.geometry(name, max_lora_rank=64, model_name="test", fingerprint="")
        shape = (config.num_layers, NUM_PAGES + 1, self.geometry.page_elems)
        self.pool = torch.full(shape, torch.nan, dtype=dtype, device=device)
        attention, ops = TorchAttention(self.geometry.page_tokens), TorchLayerOps(config, torch.device(device))
        self._decoder = Decoder(config, weights, TorchLoraOps(), attention, ops)
        self._buffers = StepBuffers(512, self.geometry.page_tokens, NUM_PAGES, torch.device(device))
        self._free = random.Random(seed).sample(range(NUM_PAGES), NUM_PAGES)

    def place_rows(self, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """Writes row j of each layer's matrix to one place of the pool, a few rows per page; returns the starts."""
        starts = []
        rank, length = matrices[0].shape
        page, used = self._free.pop(), 0
        for j in range(rank):
            if used + length > self.geometry.page_elems:
                page, used = self._free.pop(), 0
            for layer, matrix in enumerate(matrices):
                self.pool[layer, page, used : used + length] = matrix[j]
            starts.append(page * self.geometry.page_elems + used)
            used += -(-length // ALIGN_ELEMS) * ALIGN_ELEMS
        return torch.tensor(starts, dtype=torch.int64, device=self.pool.device)

    def add_adapter(self, model: PeftModel, name: str) -> LoraAdapter:
        """Reads an adapter out of a PEFT model into the pool."""
        modules = {}
        for shape in self.geometry.modules:
            found = [m for path, m in model.named_modules() if path.endswith("." + shape.name)]
            if not all(hasattr(m, "lora_A") and name in m.lora_A for m in found):
                continue
            rank = found[0].r[name]
            a_rows = self.place_rows([m.lora_A[name].weight.detach() for m in found])
            b_rows = self.place_rows([m.lora_B[name].weight.detach().T for m in found])
            modules[shape.name] = LoraRows(rank, found[0].scaling[name], a_rows, b_rows)
        return LoraAdapter(modules)

    def step(self, scheduled: Sequence[tuple[PagedRequest, int]]) -> None:
        """Computes the next n tokens of each request in one step."""
        adapters = list({id(r.adapter): r.adapter for r, _ in scheduled if r.adapter is not None}.values())
        scheduled = sorted(scheduled, key=lambda chunk: chunk[1] != 1)  # decodes first, as steps are packed
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        index: list[int] = []
        page_tokens = self.geometry.page_tokens
        for request, n in scheduled:
            new = range(request.num_computed, request.num_computed + n)
            while len(request.page_table) * page_tokens < new.stop:
                request.page_table.append(self._free.pop())
            token_ids += request.token_ids[new.start : new.stop]
            positions += new
            slots += [request.page_table[p // page_tokens] * page_tokens + p % page_tokens for p in new]
            index += [-1 if request.adapter is None else [id(a) for a in adapters].index(id(request.adapter))] * n
            request.num_computed = new.stop
        step = StepArrays(
            token_ids=ints(token_ids),
            positions=ints(positions),
            slots=ints(slots),
            query_starts=ints([0, *accumulate(n for _, n in scheduled)]),
            context_lens=ints([r.num_computed for r, _ in scheduled]),
            page_starts=ints([0, *accumulate(len(r.page_table) for r, _ in scheduled)]),
            page_ids=ints([page for r, _ in scheduled for page in r.page_table]),
            logits_rows=ints(range(len(token_ids))),
            adapter_index=ints(index),
            adapters=tuple(adapters),
            num_decodes=sum(n == 1 for _, n in scheduled),
        )
        inputs = self._buffers.upload(step, self._decoder.num_rows(step))
        logits = self._decoder.forward(inputs, self.pool)
        for (request, _), rows in zip(scheduled, logits.split_with_sizes([n for _, n in scheduled]), strict=True):
            request.logits.append(rows)


def transformers_logits(model: PreTrainedModel | PeftModel, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits of every token of one text, in one pass."""
    device = next(model.parameters()).device
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([list(token_ids)], device=device)).logits[0].float()
    return logits


@pytest.fixture
def paged_model() -> type[PagedModel]:
    """Runs a saved model over pages."""
    return PagedModel


@pytest.fixture
def paged_request() -> type[PagedRequest]:
    """A request of the paged runner."""
    return PagedRequest


@pytest.fixture
def oracle() -> Callable[[PreTrainedModel | PeftModel, Sequence[int]], torch.Tensor]:
    """What transformers computes."""
    return transformers_logits
