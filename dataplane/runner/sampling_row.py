"""What goes into choosing one token, and what comes out. Knows nothing of how it is chosen."""

from dataclasses import dataclass

from dataplane.model.step_inputs import Ints
from protos.planes import EngineSampling, StepLogprobs


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What choosing the next token of one request needs to know.

    token_ids: tokens that the host knows, the first num_prompt_tokens of them the prompt.
    unknown_row: if not -1, one more token follows them: the one that the launch before chose in this row.
    """

    sampling: EngineSampling
    token_ids: Ints
    num_prompt_tokens: int
    unknown_row: int = -1

    @property
    def position(self) -> int:
        """Place of the new token in its request."""
        return len(self.token_ids) + (self.unknown_row >= 0)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return self.position - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token chosen, or None if no logit was finite or one was NaN; its logprobs if the request asked for them."""

    token_id: int | None
    logprobs: StepLogprobs | None = None
