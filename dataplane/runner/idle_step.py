"""A step that computes one token for nobody, in the padding page: what graphs are captured with."""

import numpy as np

from dataplane.model.step_inputs import Ints, StepArrays


def idle_step(padding_page: int, page_tokens: int, *, is_decode: bool) -> StepArrays:
    """One request of one token, without an adapter, which decodes or does not."""
    return StepArrays(
        token_ids=_ints(0),
        positions=_ints(0),
        slots=_ints(padding_page * page_tokens),
        query_starts=_ints(0, 1),
        context_lens=_ints(1),
        page_starts=_ints(0, 1),
        page_ids=_ints(padding_page),
        logits_rows=_ints(0),
        adapter_index=_ints(-1),
        adapters=(),
        num_decodes=int(is_decode),
    )


def _ints(*values: int) -> Ints:
    return np.array(values, dtype=np.int32)
