"""Which pages each request of a step attends to, in the ragged form that attention kernels take. Pure NumPy, no device."""

from dataclasses import dataclass

import numpy as np

from dataplane.model.step_inputs import Ints, StepArrays, starts_of


@dataclass(frozen=True, slots=True)
class ReadPages:
    """The pages that the requests' rows attend to.

    indptr: [R + 1]; pages of request r are indices[indptr[r]:indptr[r + 1]].
    last_page_lens: [R] tokens in the last page of each.
    """

    indptr: Ints
    indices: Ints
    last_page_lens: Ints

    @staticmethod
    def of(step: StepArrays, page_tokens: int, sliding_window: int | None) -> "ReadPages":
        """Page tables without the pages before every row's window; masks count from a request's end, so nothing shifts."""
        last_page_lens = (step.context_lens - 1) % page_tokens + 1
        if sliding_window is None:
            return ReadPages(step.page_starts, step.page_ids, last_page_lens)
        num_rows = np.diff(step.query_starts)
        unread = np.maximum(step.context_lens - num_rows - sliding_window + 1, 0) // page_tokens
        num_read = np.diff(step.page_starts) - unread
        indptr = starts_of(num_read)
        shifts = step.page_starts[:-1] + unread - indptr[:-1]
        indices = step.page_ids[np.arange(indptr[-1]) + np.repeat(shifts, num_read)]
        return ReadPages(indptr, indices, last_page_lens)

    def padded(self, num_requests: int, padding_page: int) -> "ReadPages":
        """With requests of one token in the padding page behind, up to that number."""
        num_added = num_requests - len(self.last_page_lens)
        more = np.arange(1, num_added + 1, dtype=np.int32)
        return ReadPages(
            np.concatenate((self.indptr, self.indptr[-1] + more)),
            np.concatenate((self.indices, np.full(num_added, padding_page, dtype=np.int32))),
            np.concatenate((self.last_page_lens, np.ones(num_added, dtype=np.int32))),
        )
