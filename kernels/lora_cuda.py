"""The LoRA operation on CUDA: MBGMV for few tokens per adapter, MBGMM for many, over the pool's rows as they lie.

Owns the device buffers of the step plan; knows nothing of requests or pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kernels.lora import LoraAdapter, LoraOps, LoraPlan, LoraTarget
from kernels.lora_kernels import LoraKernels
from kernels.plan_layout import (
    EXPAND_TASK_BYTES,
    HEADER_INTS,
    MATRIX_EXPAND_TASK_BYTES,
    MATRIX_SHRINK_TASK_BYTES,
    SHRINK_TASK_BYTES,
    SPAN_INTS,
    LoraLimits,
    PlanCapacity,
    WantedTasks,
)
from kernels.step_plan import PlanSummary, StepPlanner

# A task of MBGMV reads 8 KiB of weights at least, one of MBGMM is a thread block: enough loads in flight everywhere.
_VECTOR_TASKS_PER_SM = 8
_MATRIX_TASKS_PER_SM = 2
_MAX_LAUNCHES = (1 << 12) - 1
# The number of a step has 20 bits in the mark of a product. Long before one comes round again, all old marks are gone.
_STEPS_BEFORE_CLEARING = 1 << 18


@dataclass(slots=True)
class CudaLoraPlan(LoraPlan):
    """One step's plan, which lies in the buffers of the ops that made it until the next one is made.

    num_launches: since begin(). MBGMV marks its products with it, to tell them from those of the launches before.
    checked: groups whose tensors were looked at.
    """

    summary: PlanSummary
    decode: bool
    has_begun: bool = False
    num_launches: int = 0
    checked: set[int] = field(default_factory=set)

    @property
    def is_empty(self) -> bool:
        """Whether no token of the step has an adapter."""
        return not any(self.summary.has_vector) and not any(self.summary.has_matrix)


@dataclass(frozen=True, slots=True)
class _Step:
    """What a plan is made of."""

    adapter_index: tuple[int, ...]
    adapters: tuple[LoraAdapter, ...]
    decode: bool

    def is_same(self, other: "_Step") -> bool:
        """Whether the plans would be the same. Adapters are the same only if they are one object."""
        return (
            self.decode == other.decode
            and self.adapter_index == other.adapter_index
            and len(self.adapters) == len(other.adapters)
            and all(mine is its for mine, its in zip(self.adapters, other.adapters, strict=True))
        )


class _Buffers:
    """Everything on the device, zeroed, at addresses that never change."""

    def __init__(self, capacity: PlanCapacity, device: torch.device) -> None:
        def room(size_bytes: int) -> torch.Tensor:
            return torch.zeros(max(16, size_bytes), dtype=torch.uint8, device=device)

        self.plan = room(capacity.plan_ints * 4).view(torch.int32)
        self.step = room(4)
        self.shrink_tasks = room(capacity.shrink_tasks * SHRINK_TASK_BYTES)
        self.expand_tasks = room(capacity.expand_tasks * EXPAND_TASK_BYTES)
        self.parts = room(capacity.parts * 8)
        self.rank_rows = room(capacity.rank_rows * 4)
        self.matrix_shrink_tasks = room(capacity.matrix_shrink_tasks * MATRIX_SHRINK_TASK_BYTES)
        self.matrix_expand_tasks = room(capacity.matrix_expand_tasks * MATRIX_EXPAND_TASK_BYTES)
        self.products = room(capacity.products * 4)
        self.partials = room(capacity.partials * 4)
        self.counters = room(capacity.counters * 4)


class CudaLoraOps(LoraOps):
    """Launches for one model's inputs: `groups` are the targets of q, k and v, of o, of gate and up, of down.

    Launches can be captured: plan(decode=True), then begin() and add() for every input within a CUDA graph. A replay computes
    the plan that plan(decode=True) uploaded last. Plans, begins and adds belong to one stream: two steps side by side would
    overwrite each other's products.
    """

    def __init__(
        self, groups: Sequence[tuple[LoraTarget, ...]], dtype: torch.dtype, device: torch.device, limits: LoraLimits
    ) -> None:
        self._groups = tuple(groups)
        self._group_of = {group[0].module: i for i, group in enumerate(groups)}
        self._dtype = dtype
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        wanted = WantedTasks(_VECTOR_TASKS_PER_SM * num_sms, _MATRIX_TASKS_PER_SM * num_sms)
        self._planner = StepPlanner(groups, limits, wanted)
        self._buffers = _Buffers(self._planner.capacity, device)
        self._shape_table = torch.from_numpy(self._planner.shape.device_table()).to(device)
        with torch.cuda.device(device):
            self._kernels = LoraKernels(dtype, limits.max_rank)
        # Two stagings: the plan of the next step is written while the copy of this one may not have run yet.
        self._stagings = [torch.zeros(self._planner.capacity.plan_ints, dtype=torch.int32).pin_memory() for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]  # torch has no type for it
        self._num_steps = self._num_uploads = 0
        # What the device's plan was made of: while a batch decodes on unchanged, so does its plan.
        self._uploaded: tuple[_Step, PlanSummary] | None = None
        self._find_addresses()

    def _find_addresses(self) -> None:
        buffers, shape = self._buffers, self._planner.shape
        plan, shapes, step = buffers.plan.data_ptr(), self._shape_table.data_ptr(), buffers.step.data_ptr()
        shrink, expand, rank_rows = buffers.shrink_tasks.data_ptr(), buffers.expand_tasks.data_ptr(), buffers.rank_rows.data_ptr()
        matrix_shrink, matrix_expand = buffers.matrix_shrink_tasks.data_ptr(), buffers.matrix_expand_tasks.data_ptr()
        token_rows, products = plan + 4 * shape.token_rows_at, buffers.products.data_ptr()
        num_groups, num_targets = shape.num_groups, len(shape.targets)
        tables = (shrink, expand, rank_rows, matrix_shrink, matrix_expand)
        self._begin_arguments = (plan, shapes, shapes + 16 * num_groups, num_groups, num_targets, step, *tables)
        spans = [plan + 4 * (HEADER_INTS + SPAN_INTS * i) for i in range(2 * num_groups)]
        self._vector_spans, self._matrix_spans = spans[::2], spans[1::2]
        self._vector_arguments = (shrink, expand, buffers.parts.data_ptr(), step)
        partials, counters = buffers.partials.data_ptr(), buffers.counters.data_ptr()
        self._shrink_arguments = (matrix_shrink, rank_rows, token_rows, products, partials, counters)
        self._expand_arguments = (matrix_expand, token_rows, products)

    def plan(self, adapter_index: Sequence[int], adapters: Sequence[LoraAdapter], *, decode: bool = False) -> CudaLoraPlan:
        """Writes a step's plan and starts its copy to the device, behind the step before on the current stream.

        adapter_index: [num_tokens], index into `adapters`, or -1 for a token of the base model.
        decode: MBGMV alone, launched for every input, so that one graph serves every such plan.
        """
        self._num_steps += 1
        if self._num_steps % _STEPS_BEFORE_CLEARING == 0:
            self._buffers.parts.zero_()
        wanted = _Step(tuple(adapter_index), tuple(adapters), decode)
        if self._uploaded is None or not self._uploaded[0].is_same(wanted):
            self._uploaded = wanted, self._upload(wanted)
        return CudaLoraPlan(self._uploaded[1], decode)

    def _upload(self, step: _Step) -> PlanSummary:
        turn = self._num_uploads % 2
        self._num_uploads += 1
        self._copied[turn].synchronize()  # of the upload before the last one: long done
        staging = self._stagings[turn]
        summary = self._planner.write(staging.numpy(), step.adapter_index, step.adapters, decode=step.decode)
        self._buffers.plan[: summary.used_ints].copy_(staging[: summary.used_ints], non_blocking=True)
        self._copied[turn].record()
        return summary

    def begin(self, plan: LoraPlan) -> None:
        """Makes the plan's tasks on the device: once before a step's first add, and at the head of a graph of its adds."""
        assert isinstance(plan, CudaLoraPlan), f"plan of another backend: {type(plan).__name__}"
        self._kernels.write_tasks(self._begin_arguments)
        plan.has_begun, plan.num_launches = True, 0

    def add(
        self, y: torch.Tensor, x: torch.Tensor, layer_pool: torch.Tensor, plan: LoraPlan, targets: Sequence[LoraTarget]
    ) -> None:
        """Adds scaling * (x A^T) B to y in place for all targets of one input, in one call.

        Semantics: y[t, o:o+n] += scaling * (x[t] @ A[adapter[t]].T) @ Bt[adapter[t]], nothing for index -1, sums in fp32.

        y: [num_tokens, out_total] dtype of the pool, written in place.
        x: [num_tokens, in_features] dtype of the pool.
        layer_pool: [num_pages * page_elems] one layer of the pool, flat.
        """
        assert isinstance(plan, CudaLoraPlan), f"plan of another backend: {type(plan).__name__}"
        assert plan.has_begun, "begin(plan) comes before the step's first add"
        group = self._group_of[targets[0].module]
        if group not in plan.checked:
            # Once a step: the shapes of its other layers are the same.
            self._check(y, x, layer_pool, plan, group)
            plan.checked.add(group)
        pool, inputs, outputs = layer_pool.data_ptr(), (x.data_ptr(), x.stride(0)), (y.data_ptr(), y.stride(0))
        # The first launch of a step waits for the tasks; whatever comes later may read them before it waits for anything.
        if plan.decode or plan.summary.has_vector[group]:
            plan.num_launches += 1
            assert plan.num_launches <= _MAX_LAUNCHES, f"more than {_MAX_LAUNCHES} launches in one step"
            arguments = (pool, *inputs, *outputs, self._vector_spans[group], *self._vector_arguments, plan.num_launches)
            self._kernels.mbgmv(arguments, may_overlap=plan.num_launches > 1)
        if plan.summary.has_matrix[group]:
            span = self._matrix_spans[group]
            plan.num_launches += 1
            self._kernels.mbgmm_shrink((pool, *inputs, span, *self._shrink_arguments), may_overlap=plan.num_launches > 1)
            self._kernels.mbgmm_expand((pool, *outputs, span, *self._expand_arguments))

    def _check(self, y: torch.Tensor, x: torch.Tensor, layer_pool: torch.Tensor, plan: CudaLoraPlan, group: int) -> None:
        """The door: what the kernels take for granted."""
        targets = self._groups[group]
        num_tokens, in_features = plan.summary.num_tokens, targets[0].in_features
        out_total = max(target.out_start + target.out_features for target in targets)
        assert x.shape == (num_tokens, in_features), f"x is {tuple(x.shape)}, not {(num_tokens, in_features)}"
        assert y.shape[0] == num_tokens and y.shape[1] >= out_total, f"y is {tuple(y.shape)}, not {(num_tokens, out_total)}"
        for name, tensor in (("x", x), ("y", y), ("layer_pool", layer_pool)):
            assert tensor.dtype == self._dtype, f"{name} is {tensor.dtype}, the kernels are for {self._dtype}"
            assert tensor.is_cuda and tensor.data_ptr() % 16 == 0, f"{name} does not begin at 16 bytes on a CUDA device"
            assert tensor.stride(-1) == 1, f"{name} has stride {tensor.stride(-1)} between neighbours"
        assert x.stride(0) % 8 == 0 and y.stride(0) % 8 == 0, (
            f"rows of x or y are not 16 bytes apart: {x.stride(0)}, {y.stride(0)}"
        )
