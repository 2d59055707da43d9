"""Captures CUDA graphs that share their memory. Knows nothing of what they compute."""

from collections.abc import Callable

import torch


class GraphRecorder:
    """Graphs of one recorder are replayed one after another, never side by side: each may overwrite what another left.

    torch's own context manager collects garbage around each capture, which would take minutes for a thousand of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        # A stream of its own, as the one that work is usually launched on cannot be captured.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no type for it
        self.num_graphs = 0

    def record(self, launch: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """A graph of what `launch` launches, none of which runs now. It must not wait for the device."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Other threads may use the device meanwhile, as those that fetch adapters do.
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        self.num_graphs += 1
        return graph
