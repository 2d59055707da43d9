"""What the LoRA kernels are compared with: a padded torch.bmm, and one adapter after the other."""

import torch

from benchmarks.device_timing import Times, replay_times
from benchmarks.lora.steps import NUM_LAYERS, LoraStep, Weights

# They take up to a hundred times as long: their times are scaled to all layers.
BASELINE_LAYERS = 4


def time_padded_bmm(step: LoraStep, weights: Weights) -> Times:
    """Tokens padded to the busiest adapter's, ranks to the largest: two torch.bmm per module over stacked weights."""
    index = torch.tensor(step.adapter_index)
    rows = [torch.nonzero(index == i).flatten() for i in range(len(step.ranks))]
    most = max(len(r) for r in rows)
    padded = torch.stack([torch.cat([r, r[:1].expand(most - len(r))]) for r in rows]).flatten().to("cuda")
    layers = [
        [[weights.matrices(layer, target, max(step.ranks)) for target in g] for g in step.groups]
        for layer in range(BASELINE_LAYERS)
    ]

    def run() -> None:
        for layer in layers:
            for x, y, g, matrices in zip(weights.x, weights.y, step.groups, layer, strict=True):
                x_padded = x[padded].view(len(rows), most, -1)
                for target, (a, b) in zip(g, matrices, strict=True):
                    delta = torch.bmm(torch.bmm(x_padded, a) * 0.5, b).view(len(padded), -1)
                    y.narrow(1, target.out_start, target.out_features).index_add_(0, padded, delta)

    return replay_times(run, NUM_LAYERS / BASELINE_LAYERS)


def time_adapter_loop(step: LoraStep, weights: Weights) -> Times:
    """Two torch.mm for each adapter and module, with its own rank."""
    index = torch.tensor(step.adapter_index)
    rows = [torch.nonzero(index == i).flatten().to("cuda") for i in range(len(step.ranks))]
    layers = [[[weights.matrices(layer, t, max(step.ranks)) for t in g] for g in step.groups] for layer in range(BASELINE_LAYERS)]

    def run() -> None:
        for layer in layers:
            for x, y, g, matrices in zip(weights.x, weights.y, step.groups, layer, strict=True):
                for i, rank in enumerate(step.ranks):
                    x_rows = x[rows[i]]
                    for target, (a, b) in zip(g, matrices, strict=True):
                        delta = torch.mm(torch.mm(x_rows, a[i, :, :rank]) * 0.5, b[i, :rank])
                        y.narrow(1, target.out_start, target.out_features).index_add_(0, rows[i], delta)

    return replay_times(run, NUM_LAYERS / BASELINE_LAYERS)
