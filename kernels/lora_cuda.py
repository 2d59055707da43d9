"""The LoRA operation on CUDA: MBGMV for few tokens per adapter, MBGMM for many, over the pool's rows as they lie.

Owns the device buffers of the step plan; knows nothing of requests or pages.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from kernels.lora import Indices, LoraAdapter, LoraLaunches, LoraOps, LoraPlan, LoraTarget
from kernels.lora_kernels import LoraKernels
from kernels.plan_layout import (
    EXPAND_TASK_BYTES,
    HEADER_INTS,
    MATRIX_EXPAND_TASK_BYTES,
    MATRIX_SHRINK_TASK_BYTES,
    SHRINK_TASK_BYTES,
    SPAN_INTS,
    Ints,
    LoraLimits,
    PlanCapacity,
    WantedTasks,
)
from kernels.step_plan import PlanSummary, StepPlanner
from kernels.uploads import upload

# A task of MBGMV reads 8 KiB of weights at least, one of MBGMM is a thread block: enough loads in flight everywhere.
_VECTOR_TASKS_PER_SM = 8
_MATRIX_TASKS_PER_SM = 2
# The number of a launch has 12 bits in the mark of a product. The other 20 are its step's, which write_tasks counts.
_MAX_LAUNCHES = (1 << 12) - 1


@dataclass(slots=True)
class CudaLoraPlan(LoraPlan):
    """One step's plan, which lies in the buffers of the ops that made it until the next one is made.

    group_of: which input's targets begin with that module.
    num_launches: since begin(). MBGMV marks its products with it, to tell them from those of the launches before.
    checked: groups whose tensors were looked at.
    """

    summary: PlanSummary
    launches: LoraLaunches
    group_of: Mapping[str, int]
    has_begun: bool = False
    num_launches: int = 0
    checked: set[int] = field(default_factory=set)

    @property
    def is_empty(self) -> bool:
        """Whether no token of the step has an adapter."""
        return not any(self.summary.has_vector) and not any(self.summary.has_matrix)

    def changes(self, targets: Sequence[LoraTarget]) -> bool:
        """Whether any token's adapter adds anything to the targets of one input."""
        group = self.group_of[targets[0].module]
        return self.summary.has_vector[group] or self.summary.has_matrix[group]


@dataclass(frozen=True, slots=True)
class _Step:
    """What a plan is made of."""

    adapter_index: Ints
    adapters: tuple[LoraAdapter, ...]
    launches: LoraLaunches

    def is_same(self, other: "_Step") -> bool:
        """Whether the plans would be the same. Adapters are the same only if they are one object."""
        return (
            self.launches is other.launches
            and len(self.adapters) == len(other.adapters)
            and all(map(operator.is_, self.adapters, other.adapters))
            and np.array_equal(self.adapter_index, other.adapter_index)
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

    Launches can be captured: a plan that is not AS_NEEDED, then begin() and add() for every input within CUDA graphs. A replay
    computes the plan that was uploaded last, if its launches are enough for it. Plans, begins and adds belong to one stream: two
    steps side by side would overwrite each other's products.
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
        self._plan_on_host = torch.zeros(self._planner.capacity.plan_ints, dtype=torch.int32)
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
        parts, num_parts = buffers.parts.data_ptr(), self._planner.capacity.parts
        self._begin_arguments = (plan, shapes, shapes + 16 * num_groups, num_groups, num_targets, step, *tables, parts, num_parts)
        spans = [plan + 4 * (HEADER_INTS + SPAN_INTS * i) for i in range(2 * num_groups)]
        self._vector_spans, self._matrix_spans = spans[::2], spans[1::2]
        self._vector_arguments = (shrink, expand, parts, step)
        partials, counters = buffers.partials.data_ptr(), buffers.counters.data_ptr()
        self._shrink_arguments = (matrix_shrink, rank_rows, token_rows, products, partials, counters)
        self._expand_arguments = (matrix_expand, token_rows, products)

    @property
    def can_be_captured(self) -> bool:
        """Whether plans other than AS_NEEDED may be captured in CUDA graphs."""
        return True

    def plan(
        self, adapter_index: Indices, adapters: Sequence[LoraAdapter], launches: LoraLaunches = LoraLaunches.AS_NEEDED
    ) -> CudaLoraPlan:
        """Writes a step's plan and starts its copy to the device, behind the step before on the current stream.

        adapter_index: [num_tokens], index into `adapters`, or -1 for a token of the base model.
        """
        wanted = _Step(np.array(adapter_index, dtype=np.int32), tuple(adapters), launches)
        if self._uploaded is None or not self._uploaded[0].is_same(wanted):
            self._uploaded = wanted, self._upload(wanted)
        return CudaLoraPlan(self._uploaded[1], launches, self._group_of)

    def _upload(self, step: _Step) -> PlanSummary:
        summary = self._planner.write(self._plan_on_host.numpy(), step.adapter_index, step.adapters, step.launches)
        upload(self._buffers.plan[: summary.used_ints], self._plan_on_host[: summary.used_ints])
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

        y: [num_rows, out_total] dtype of the pool, written in place. Rows past the plan's tokens are padding, left alone.
        x: [num_rows, in_features] dtype of the pool.
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
        with_matrix = plan.launches is LoraLaunches.MIXED or plan.summary.has_matrix[group]
        with_vector = plan.launches is not LoraLaunches.AS_NEEDED or plan.summary.has_vector[group]
        # The first launch of a step waits for the tasks; whatever comes later may read them before it waits for anything.
        if with_matrix:
            plan.num_launches += 1
            arguments = (pool, *inputs, self._matrix_spans[group], *self._shrink_arguments)
            self._kernels.mbgmm_shrink(arguments, may_overlap=plan.num_launches > 1)
        if with_vector:
            plan.num_launches += 1
            assert plan.num_launches <= _MAX_LAUNCHES, f"more than {_MAX_LAUNCHES} launches in one step"
            # Between the halves of MBGMM, beside the first one, which waits for x and y and changes neither.
            places = (pool, *inputs, *outputs, self._vector_spans[group], *self._vector_arguments)
            self._kernels.mbgmv((*places, plan.num_launches, with_matrix), may_overlap=plan.num_launches > 1)
        if with_matrix:
            self._kernels.mbgmm_expand((pool, *outputs, self._matrix_spans[group], *self._expand_arguments))

    def _check(self, y: torch.Tensor, x: torch.Tensor, layer_pool: torch.Tensor, plan: CudaLoraPlan, group: int) -> None:
        """The door: what the kernels take for granted."""
        targets = self._groups[group]
        num_tokens, in_features = plan.summary.num_tokens, targets[0].in_features
        out_total = max(target.out_start + target.out_features for target in targets)
        assert len(x) >= num_tokens and x.shape[1] == in_features, f"x is {tuple(x.shape)}, not {(num_tokens, in_features)}"
        assert len(y) == len(x) and y.shape[1] >= out_total, f"y is {tuple(y.shape)}, not {(len(x), out_total)}"
        for name, tensor in (("x", x), ("y", y), ("layer_pool", layer_pool)):
            assert tensor.dtype == self._dtype, f"{name} is {tensor.dtype}, the kernels are for {self._dtype}"
            assert tensor.is_cuda and tensor.data_ptr() % 16 == 0, f"{name} does not begin at 16 bytes on a CUDA device"
            assert tensor.stride(-1) == 1, f"{name} has stride {tensor.stride(-1)} between neighbours"
        assert x.stride(0) % 8 == 0 and y.stride(0) % 8 == 0, (
            f"rows of x or y are not 16 bytes apart: {x.stride(0)}, {y.stride(0)}"
        )
